"""The daemon in trouble of its own: a full run directory, a dead mounter, records of other versions, no descriptors."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lazyfs.fs import mountapi
from lazyfs.image.manifest import parse_lazy_manifest, parse_manifest
from lazyfs.image.prefetch import parse_prefetch
from lazyfs.node import protocol
from lazyfs.registry import RegistryOptions, open_source
from lazyfs.registry.select import select_image
from tests.convertkit import Layout, run_convert
from tests.daemonkit import WAIT_S, Daemon, running_daemon
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.mountkit import Machine, require_mounting
from tests.registrykit import running_registry
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.mount
DATA = random.Random(5).randbytes(400_000)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    require_mounting()
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        source = Layout(tmp_path_factory.mktemp("source") / "in")
        source.add_image("app", [TarBuilder().file("file", DATA).file("other", DATA[::-1]).build()])
        name = f"{running.host}/app:lazy"
        run_convert(source.reference("app"), f"docker://{name}", registry=RegistryOptions(insecure=True))
        yield name


@pytest.fixture
def daemon(machine: Machine) -> Iterator[Daemon]:
    with running_daemon(machine) as running:
        yield running


def mount(machine: Machine, image: str, name: str = "mnt") -> Path:
    target = machine.target(name)
    machine.lazyfs("mount", image, target, "--insecure")
    return target


def kill_worker(daemon: Daemon) -> None:
    worker = daemon.worker()
    os.kill(worker, signal.SIGKILL)
    daemon.wait_ready(not_worker=worker)


def test_a_full_run_directory_keeps_no_worker_from_taking_over(machine: Machine, image: str) -> None:
    machine.run_dir.mkdir()
    mountapi.mount("none", str(machine.run_dir), "tmpfs", 0, "size=256k")
    with running_daemon(machine) as daemon:
        target = mount(machine, image)
        filler = machine.run_dir / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            for _ in range(1000):
                file.write(bytes(4096))
                file.flush()
        kill_worker(daemon)
        assert (target / "file").read_bytes() == DATA
        filler.unlink()
        kill_worker(daemon)
        assert (target / "other").read_bytes() == DATA[::-1]
        machine.umount(target)


def test_a_worker_whose_mounter_is_dead_is_replaced(machine: Machine, daemon: Daemon, image: str) -> None:
    worker = daemon.worker()
    children = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    assert len(children) == 1
    os.kill(int(children[0]), signal.SIGKILL)
    target = mount(machine, image)    # the next worker does it
    assert daemon.worker() != worker
    assert (target / "file").read_bytes() == DATA
    machine.umount(target)


def test_umount_waits_for_the_next_worker(machine: Machine, daemon: Daemon, image: str) -> None:
    target = mount(machine, image)
    worker = daemon.worker()
    os.kill(worker, signal.SIGKILL)
    machine.umount(target)
    assert mountapi.mount_at(str(target)) is None
    daemon.wait_ready(not_worker=worker)
    assert daemon.directory.records() == []


def test_records_of_an_older_and_a_newer_version_are_served(machine: Machine, daemon: Daemon, image: str) -> None:
    older, newer = mount(machine, image, "older"), mount(machine, image, "newer")
    for path in daemon.directory.mounts.glob("*.json"):
        record = json.loads(path.read_text())
        if record["target"] == str(older):
            del record["detached"], record["bdi_names"]
            del record["order"]["bootstrap_dir"]
        else:
            record["invented"] = record["order"]["invented"] = {"by": "a later version"}
        path.write_text(json.dumps(record))
    kill_worker(daemon)
    with protocol.ControlClient.connect(daemon.directory.socket) as client:
        assert {one["target"] for one in client.request(protocol.LIST, 5)} == {str(older), str(newer)}
    assert (older / "file").read_bytes() == (newer / "file").read_bytes() == DATA
    for path in (older, newer):
        machine.umount(path)


def test_a_broken_image_can_be_unmounted(machine: Machine, daemon: Daemon, image: str) -> None:
    target = mount(machine, image)
    os.kill(daemon.worker(), signal.SIGSTOP)
    for path in (*machine.cache.glob("images/*.erofs"), *machine.cache.glob("bootstraps/*")):
        path.unlink()
    (record,) = daemon.directory.mounts.glob("*.json")
    changed = json.loads(record.read_text())
    changed["order"]["image"] = "127.0.0.1:1/gone:lazy"
    record.write_text(json.dumps(changed))
    kill_worker(daemon)
    status = daemon.status()
    assert status is not None
    assert [one["target"] for one in status["health"]["broken"]] == [str(target)]
    machine.umount(target)
    assert mountapi.mount_at(str(target)) is None
    assert daemon.directory.records() == []
    mount(machine, image)
    assert (target / "file").read_bytes() == DATA
    machine.umount(target)


def test_an_upgrade_to_settings_that_do_not_work_changes_nothing(machine: Machine, daemon: Daemon, image: str) -> None:
    target = mount(machine, image)
    answer = ask_keeper(daemon, {"op": "upgrade", "settings": {"worker": {"config": 5}}})
    assert "could not start" in answer["error"]
    kill_worker(daemon)
    assert (target / "file").read_bytes() == DATA
    machine.umount(target)


def test_an_upgrade_of_an_idle_daemon_keeps_its_connection(machine: Machine, daemon: Daemon) -> None:
    before = mountapi.mount_at(str(daemon.directory.fuse))
    assert before is not None
    machine.lazyfs("daemon", "upgrade")
    assert mountapi.mount_at(str(daemon.directory.fuse)) == before
    assert "died" not in (machine.directory / "daemon.log").read_text()
    daemon.stop()
    machine.assert_clean()


def test_a_stopped_daemon_leaves_nothing_that_crashes_and_others_have_put_there(
    machine: Machine, daemon: Daemon
) -> None:
    directory = daemon.directory
    for path in (directory.handed, directory.root / "numbers.tmp", directory.mounts / "7.tmp"):
        path.touch(0o600)
    daemon.stop()
    machine.assert_clean()


def test_the_next_worker_goes_on_fetching_ahead(
    machine: Machine, daemon: Daemon, image: str, tmp_path: Path
) -> None:
    host, options = image.partition("/")[0], RegistryOptions(insecure=True)
    source = Layout(tmp_path / "ahead")
    source.add_image("app", [TarBuilder().file("first", DATA).file("second", DATA[1:]).build()])
    run_convert(source.reference("app"), f"docker://{host}/ahead:lazy", registry=options,
                prefetch=parse_prefetch(b"first\n"))
    with FaultProxy(host) as proxy, contextlib.closing(open_source(f"{proxy.host}/ahead:lazy", options)) as place:
        document = select_image(place, None)
        lazy = parse_lazy_manifest(parse_manifest(document.data, document.media_type))
        assert lazy.hot is not None
        stall = proxy.add(Fault(Kind.STALL, path=rf"/blobs/{lazy.hot.digest}", times=1))
        target = mount(machine, f"{proxy.host}/ahead:lazy")
        deadline = time.monotonic() + WAIT_S
        while not stall.applied:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        kill_worker(daemon)
        while machine.statistics()["mounts"][0]["prefetched_chunks"] == 0:
            assert time.monotonic() < deadline + WAIT_S
            time.sleep(0.05)
        assert (target / "first").read_bytes() == DATA
        assert machine.statistics()["fetch"]["misses"] == 0
        machine.umount(target)


def test_silent_clients_do_not_keep_others_from_the_keeper(daemon: Daemon) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(connected(daemon))
        assert ask_keeper(daemon, {"op": "status"})["result"]["ready"]


def test_a_worker_without_descriptors_left_lives_on(machine: Machine, daemon: Daemon, image: str) -> None:
    target = mount(machine, image)
    worker = daemon.worker()
    before = resource.prlimit(worker, resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with protocol.ControlClient.connect(daemon.directory.socket) as client:
        log = machine.directory / "daemon.log"
        deadline = time.monotonic() + WAIT_S
        while "not accepted" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        resource.prlimit(worker, resource.RLIMIT_NOFILE, before)
        assert client.request(protocol.HEALTH, WAIT_S)["pid"] == worker
    assert (target / "file").read_bytes() == DATA
    machine.umount(target)


def connected(daemon: Daemon) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    place = os.open(daemon.directory.root, os.O_PATH)   # sockaddr_un holds 108 bytes
    try:
        client.connect(f"/proc/self/fd/{place}/keeper.sock")
    finally:
        os.close(place)
    client.settimeout(WAIT_S)   # not before: a full backlog would then be an error
    return client


def ask_keeper(daemon: Daemon, request: dict[str, Any]) -> dict[str, Any]:
    with connected(daemon) as client, client.makefile("rwb") as stream:
        stream.write(json.dumps(request).encode())
        stream.flush()
        answer: dict[str, Any] = json.loads(stream.readline())
        return answer
