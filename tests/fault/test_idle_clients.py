"""Clients that connect to what a node listens on, and say nothing: others are answered (faults, row 18)."""

from __future__ import annotations

import contextlib
import http.client
import resource
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazyfs.node import protocol
from tests.convertkit import registry_with, tar_of
from tests.daemonkit import WAIT_S, running_daemon
from tests.mountkit import Machine, require_mounting
from tests.node.test_profile_upload import write_token
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.mount
COUNT = 500
DATA = bytes(range(256)) * 800


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    require_mounting()
    with registry_with(tmp_path_factory.mktemp("registry"), {"app": [tar_of({"file": DATA})]}) as running:
        yield running.host


@contextlib.contextmanager
def silent(place: tuple[str, int] | Path) -> Iterator[None]:
    """As many connections as the other side's queue takes, up to COUNT. Half of them begin a sentence."""
    made: list[socket.socket] = []
    try:
        for number in range(COUNT):
            client = socket.socket(socket.AF_UNIX if isinstance(place, Path) else socket.AF_INET)
            made.append(client)
            client.settimeout(0.2)
            with contextlib.suppress(OSError):      # its queue is full: that is its answer
                if isinstance(place, Path):
                    protocol.connect_to(client, place)
                else:
                    client.connect(place)
                if number % 2:
                    client.send(b"P")
        yield
    finally:
        for client in made:
            client.close()


def test_five_hundred_silent_clients_at_every_port_and_socket(machine: Machine, registry: str, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * COUNT + 1000), hard))
    health, collect = free_port(), free_port()
    machine.directory.mkdir(exist_ok=True)
    file = machine.directory / "config.toml"
    file.write_text(f"[daemon]\nhealth_address = '127.0.0.1:{health}'\n[profile]\ncollect = '127.0.0.1:{collect}'\n"
                    f"collect_dir = '{tmp_path / 'collected'}'\ntoken_file = '{write_token(tmp_path)}'\n")
    try:
        with running_daemon(machine, "--config", str(file)) as daemon, contextlib.ExitStack() as stack:
            target = machine.target()
            machine.lazyfs("mount", f"{registry}/app:lazy", target, "--insecure")
            wait_status(health, "/healthz", 200)
            wait_status(collect, "/", 404)
            worker, root = daemon.worker(), daemon.directory.root
            for port in (health, collect):
                stack.enter_context(silent(("127.0.0.1", port)))
            for name in ("control.sock", "keeper.sock"):
                stack.enter_context(silent(root / name))
            wait_status(health, "/healthz", 200)
            wait_status(collect, "/", 404)
            status = daemon.status()
            assert status is not None
            assert status["health"]["ready"]
            assert status["worker"] == worker
            assert (target / "file").read_bytes() == DATA
            # The worker does not hold what nobody talks on for ever: the kernel's queues hold the rest.
            assert len(list(Path(f"/proc/{worker}/fd").iterdir())) < 2 * COUNT
            machine.umount(target)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def wait_status(port: int, path: str, code: int) -> None:
    """Soon, however many are silent: some more of them may come in between."""
    deadline = time.monotonic() + WAIT_S
    while (found := status_of(port, path)) != code:
        assert time.monotonic() < deadline, f"{port}: {found}"
        time.sleep(0.1)


def status_of(port: int, path: str) -> int | str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return str(error)
    finally:
        connection.close()
