"""Passwords are planted wherever a node takes them from; after a busy run they are found nowhere but there."""

from __future__ import annotations

import base64
import json
import os
import random
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazyfs.node import protocol
from lazyfs.registry import RegistryOptions
from lazyfs.registry.options import Secret
from tests.convertkit import Layout, run_convert, tar_of
from tests.daemonkit import Daemon, running_daemon
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.mountkit import LAZYFS, Machine, require_mounting
from tests.registrykit import running_registry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.registrykit import Registry

pytestmark = pytest.mark.mount
PASSWORD = "planted-correct-horse"
WRONG = "planted-wrong-staple"
LEASED = "planted-handed-over"
RNG = random.Random(5)
FILES = {f"f{number}": RNG.randbytes(400_000) for number in range(4)}
RECORDS = "/run/daemon/mounts/"    # what --username gave is kept there, for root (docs/credentials.md)


def spellings() -> list[bytes]:
    found = []
    for secret in (PASSWORD, WRONG, LEASED):
        found += [secret.encode(), base64.b64encode(f"kim:{secret}".encode())[4:-4],
                  base64.b64encode(f"kubelet:{secret}".encode())[4:-4]]
    return found


def holds_secret(data: bytes) -> bool:
    return any(spelling in data for spelling in spellings())


class Watcher(threading.Thread):
    """Looks at the command lines and environments of all processes that the daemon or a command has."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.count = 0
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.1):
            for process in Path("/proc").glob("[0-9]*"):
                for name in ("cmdline", "environ"):
                    try:
                        data = (process / name).read_bytes()
                    except OSError:
                        continue
                    self.count += 1
                    if holds_secret(data):
                        self.found.append(f"{process}/{name}")

    def stop(self) -> None:
        self._done.set()
        self.join()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    require_mounting()
    with running_registry(tmp_path_factory.mktemp("registry"), username="kim", password=PASSWORD) as running:
        source = Layout(tmp_path_factory.mktemp("source") / "in")
        options = RegistryOptions(username="kim", password=Secret(PASSWORD))
        for name in ("app", "other"):
            source.add_image(name, [tar_of({**FILES, "name": name.encode()})])
            run_convert(source.reference(name), f"docker://{running.host}/{name}:lazy", registry=options)
        yield running


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LAZYFS_LOG_LEVEL", "debug")
    made = Machine(tmp_path / "machine")
    made.directory.mkdir()
    yield made
    made.close()


def mount(machine: Machine, image: str, password: str = "", name: str = "mnt") -> subprocess.CompletedProcess[bytes]:
    words = ["--username", "kim", "--password-stdin"] if password else []
    return subprocess.run(
        [*LAZYFS, "--debug", "mount", image, str(machine.target(name)), "--cache-dir", str(machine.cache), "--insecure",
         *words], env=machine.environment, input=password.encode(), capture_output=True, check=False, timeout=120)


def busy_run(machine: Machine, daemon: Daemon, front: FaultProxy, docker_config: Path) -> bytes:
    """Every source of credentials, right and wrong ones, and a registry that fails in between; all that was said."""
    said = [mount(machine, f"{front.host}/app:lazy", WRONG, "a"), mount(machine, f"{front.host}/app:lazy", name="b")]
    assert all(done.returncode == 22 for done in said)
    front.add(Fault(Kind.STATUS, path="/blobs/", status=500, times=1))
    said.append(mount(machine, f"{front.host}/app:lazy", PASSWORD, "a"))
    assert said[-1].returncode == 0, said[-1].stderr
    for file, data in FILES.items():
        assert (machine.directory / "a" / file).read_bytes() == data
    with protocol.ControlClient.connect(daemon.directory.socket) as client:
        entries = [{"host": front.host, "repository": "other", "username": "kubelet", "password": LEASED,
                    "lifetime_s": 600}]
        client.request(protocol.CREDENTIALS, 20, entries=entries)
    docker_config.parent.mkdir(exist_ok=True)
    secret = base64.b64encode(f"kim:{PASSWORD}".encode()).decode()
    docker_config.write_text(json.dumps({"auths": {front.host: {"auth": secret}}}))
    front.add(Fault(Kind.CUT, path="/blobs/", at=1000, times=2))
    said.append(mount(machine, f"{front.host}/other:lazy", name="b"))
    assert said[-1].returncode == 0, said[-1].stderr
    asked = (["daemon", "status"], ["daemon", "status", "--json"], ["cache", "ls"], ["config", "show"])
    said += [subprocess.run([*LAZYFS, *words], env=machine.environment, capture_output=True, check=False, timeout=60)
             for words in asked]
    return b"".join(done.stdout + done.stderr for done in said)


def test_they_are_in_no_output_no_file_and_no_process(machine: Machine, registry: Registry, tmp_path: Path) -> None:
    docker_config = tmp_path / ".docker" / "config.json"
    watcher = Watcher()
    with FaultProxy(registry.host) as front, running_daemon(machine) as daemon:
        watcher.start()
        try:
            said = busy_run(machine, daemon, front, docker_config)
            os.kill(daemon.worker(), 11)     # what is left of a worker that crashes
            daemon.wait_ready()
        finally:
            watcher.stop()
        assert any("authorization" in seen.headers for seen in front.requests), "the run was not busy"
        assert not holds_secret(said)
        assert b"Traceback" in said or b"error" in said
        assert watcher.count > 100
        assert watcher.found == []
        hits = [path for path in machine.directory.rglob("*")
                if path.is_file() and not path.is_symlink() and holds_secret(path.read_bytes())]
        assert [path for path in hits if RECORDS not in str(path)] == []
        assert hits, "what --username gave is kept for the next worker"
        assert all(path.stat().st_mode & 0o077 == 0 for path in hits), "a record that others can read"
        for name in ("a", "b"):
            machine.umount(machine.directory / name)
        assert not list((machine.run_dir / "daemon/mounts").glob("*.json")), "records go with their mounts"
