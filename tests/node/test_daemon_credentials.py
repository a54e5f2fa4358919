"""Credentials that the snapshotter hands to the daemon: reads use them, each worker has them, nobody writes them."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import LazyfsError, UsageError
from lazyfs.node import protocol
from lazyfs.node.order import MountOrder
from lazyfs.registry import RegistryOptions
from lazyfs.registry.fields import to_fields
from lazyfs.registry.options import Secret
from snapshotter.credentials.feeder import Feeder
from snapshotter.credentials.pulled import Pulled, PulledCredentials
from tests.convertkit import Layout, run_convert
from tests.daemonkit import Daemon, running_daemon
from tests.mountkit import Machine, require_mounting
from tests.registrykit import running_registry
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.registrykit import Registry

pytestmark = pytest.mark.mount
RNG = random.Random(31)
FILES = {f"f{number}": RNG.randbytes(1_500_000) for number in range(8)}
PASSWORD = "a-secret-of-kim"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    require_mounting()
    with running_registry(tmp_path_factory.mktemp("registry"), username="kim", password=PASSWORD) as running:
        source = Layout(tmp_path_factory.mktemp("source") / "in")
        tar = TarBuilder()
        for name, data in FILES.items():
            tar.file(name, data)
        source.add_image("app", [tar.build()])
        options = RegistryOptions(username="kim", password=Secret(PASSWORD))
        run_convert(source.reference("app"), f"docker://{running.host}/app:lazy", registry=options)
        yield running


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setenv("HOME", str(tmp_path))
    made = Machine(tmp_path / "machine")
    yield made
    made.close()


@pytest.fixture
def daemon(machine: Machine) -> Iterator[Daemon]:
    with running_daemon(machine) as running:
        yield running


def pulled(registry: Registry) -> Pulled:
    return Pulled(registry.host, "app", "kim", Secret(PASSWORD), Secret(""))


def mount(daemon: Daemon, registry: Registry) -> Path:
    """As the snapshotter does: an order without credentials."""
    target = daemon.machine.target()
    order = MountOrder(f"{registry.host}/app:lazy", str(target), prefetch=False,
                       registry=to_fields(RegistryOptions(insecure=True)))
    with protocol.ControlClient.connect(daemon.directory.socket) as client:
        client.request(protocol.MOUNT, 30, order=order.to_json(), ensure=True)
    return target


def wait_known(daemon: Daemon, count: int = 1) -> None:
    deadline = time.monotonic() + 15
    while True:
        with protocol.ControlClient.connect(daemon.directory.socket) as client:
            found = client.request(protocol.CREDENTIALS, 5, entries=[])
        if found["known"] == count:
            return
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def test_a_new_worker_has_them_again(daemon: Daemon, registry: Registry) -> None:
    with pytest.raises(LazyfsError):
        mount(daemon, registry)
    with Feeder(PulledCredentials(), daemon.directory.socket) as feeder:
        feeder.note(pulled(registry))
        wait_known(daemon)
        target = mount(daemon, registry)
        names = iter(FILES)
        for _ in range(2):
            name = next(names)
            assert (target / name).read_bytes() == FILES[name]
            worker = daemon.worker()
            os.kill(worker, signal.SIGKILL)
            name = next(names)
            assert (target / name).read_bytes() == FILES[name], "no reader sees an error"
            daemon.wait_ready(not_worker=worker)
    check_nothing_is_written_down(daemon)
    daemon.machine.umount(target)


def test_a_worker_waits_for_them_where_they_were_handed_over_before(daemon: Daemon, registry: Registry) -> None:
    keep = PulledCredentials()
    with Feeder(keep, daemon.directory.socket) as feeder:
        feeder.note(pulled(registry))
        wait_known(daemon)
        target = mount(daemon, registry)
    worker = daemon.worker()
    os.kill(worker, signal.SIGKILL)
    daemon.wait_ready(not_worker=worker)
    found: list[bool] = []
    reader = threading.Thread(target=lambda: found.append((target / "f7").read_bytes() == FILES["f7"]))
    reader.start()
    reader.join(0.3)
    assert reader.is_alive()
    with Feeder(keep, daemon.directory.socket):
        reader.join(20)
    assert found == [True]
    daemon.machine.umount(target)


def test_malformed_ones_are_refused_without_being_shown(daemon: Daemon) -> None:
    with protocol.ControlClient.connect(daemon.directory.socket) as client:
        for entries in (None, "x", [{"host": "a"}], [{"host": "a", "username": "kim", "password": [PASSWORD]}]):
            with pytest.raises(UsageError) as caught:
                client.request(protocol.CREDENTIALS, 5, entries=entries)
            assert PASSWORD not in str(caught.value)
        assert client.request(protocol.CREDENTIALS, 5, entries=[]) == {"known": 0, "used": []}
    check_nothing_is_written_down(daemon)


def check_nothing_is_written_down(daemon: Daemon) -> None:
    machine = daemon.machine
    files = [path for path in (*machine.run_dir.rglob("*.json"), *machine.directory.glob("*.log")) if path.is_file()]
    assert files
    for path in files:
        assert PASSWORD not in path.read_text(errors="replace"), path
