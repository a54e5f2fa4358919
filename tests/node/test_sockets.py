"""Who may ask: root. A socket that somebody opened to all still refuses, with one line that says who came."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from lazyfs.node import callers, protocol
from tests.daemonkit import WAIT_S, running_daemon
from tests.mountkit import Machine, require_mounting
from tests.snapshotter.test_service import commit
from tests.snapshotter.test_service import running as running_snapshotter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.mount
NOBODY = 65534
# From inside the directory: the way to it is root's alone.
SCRIPT = """
import os, socket, sys
os.chdir(sys.argv[1])
os.setgroups([]); os.setgid(65534); os.setuid(65534)
client = socket.socket(socket.AF_UNIX)
client.settimeout(20)
client.connect(sys.argv[2])
try:
    client.sendall(b'{"op": "list"}\\n')
    answer = client.recv(100)
except OSError:
    answer = b""
print(len(answer), os.getpid())
"""


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    require_mounting()
    made = Machine(tmp_path / "machine")
    made.directory.mkdir()
    yield made
    made.close()


def ask_as_nobody(path: Path) -> int:
    """Ask at a socket that is open to all: bytes of the answer must be none. Returns the pid that asked."""
    path.parent.chmod(0o755)
    path.chmod(0o777)
    done = subprocess.run([sys.executable, "-c", SCRIPT, path.parent, path.name], capture_output=True, text=True,
                          check=True, timeout=60)
    size, pid = map(int, done.stdout.split())
    assert size == 0
    return pid


def wait_for_line(path: Path, text: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while text not in path.read_text():
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.02)


def test_sockets_and_directories_are_roots_alone(machine: Machine) -> None:
    with running_daemon(machine) as daemon:
        root = daemon.directory.root
        for path, mode in {root: 0o700, root / "control.sock": 0o600, root / "keeper.sock": 0o600,
                           machine.cache: 0o700}.items():
            assert stat.S_IMODE(path.stat().st_mode) == mode, path


@pytest.mark.parametrize("name", ["control.sock", "keeper.sock"])
def test_another_user_is_refused_and_root_is_served(machine: Machine, name: str) -> None:
    with running_daemon(machine) as daemon:
        pid = ask_as_nobody(daemon.directory.root / name)
        log = machine.directory / "daemon.log"
        wait_for_line(log, f"connection refused: user {NOBODY}, process {pid}")
        assert log.read_text().count("connection refused") == 1
        assert daemon.status() is not None
        with protocol.ControlClient.connect(daemon.directory.socket) as client:
            assert client.request(protocol.LIST, WAIT_S) == []


def test_the_snapshotters_door_is_closed_to_others(tmp_path: Path) -> None:
    with running_snapshotter(tmp_path) as found:
        address = found.address
        assert stat.S_IMODE(address.stat().st_mode) == 0o600
        pid = ask_as_nobody(address)
        wait_for_line(tmp_path / "log", f"connection refused: user {NOBODY}, process {pid}")
        commit(found.stub, "base")   # root is served


def test_who_is_foreign() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        assert callers.foreigner(ours) == ""

    class Other:
        def getsockopt(self, _level: int, _option: int, _size: int, /) -> bytes:
            return b"".join(number.to_bytes(4, sys.byteorder) for number in (77, os.geteuid() + 1000, 5))

    assert callers.foreigner(Other()) == f"user {os.geteuid() + 1000}, process 77"


@pytest.mark.parametrize(("given", "host"), [("9440", "127.0.0.1"), (":9440", "127.0.0.1"), ("", "")])
def test_ports_are_on_loopback_unless_said_otherwise(machine: Machine, given: str, host: str) -> None:
    for key in ("daemon.health_address", "profile.collect"):
        variable = f"LAZYFS_{key.replace('.', '_').upper()}"
        done = subprocess.run(
            [sys.executable, "-m", "lazyfs", "config", "show", "--json"], capture_output=True, check=False,
            env={**machine.environment, variable: given, "LAZYFS_PROFILE_TOKEN_FILE": "/x"})
        value = json.loads(done.stdout)["keys"][key]["value"]
        assert value.rpartition(":")[0] == host
