"""The daemon: its worker may die, hang, be replaced; its keeper may die; readers get the right bytes, and no error."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest
import zstandard

from lazyfs.errors import IntegrityError
from lazyfs.fs import mountapi
from lazyfs.image.digest import Digest
from lazyfs.image.oci import parse_manifest
from lazyfs.node import protocol
from lazyfs.registry import RegistryOptions, open_source
from tests.convertkit import Layout, run_convert
from tests.daemonkit import WAIT_S, Daemon, end_daemon, running_daemon, start_daemon
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.mountkit import LAZYFS, Machine
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.mount
RNG = random.Random(12)
FILES = {f"f{number}": RNG.randbytes(700_000) for number in range(24)}
DRIVERS = pytest.mark.parametrize("driver", ["erofs", "fuse"])


@pytest.fixture
def daemon(machine: Machine) -> Iterator[Daemon]:
    with running_daemon(machine, "--hang-timeout", "2") as running:
        yield running


def mount(machine: Machine, host: str, driver: str = "erofs", name: str = "mnt") -> Path:
    target = machine.target(name)
    machine.lazyfs("mount", f"{host}/app:lazy", target, "--insecure", "--driver", driver)
    return target


class Reader(threading.Thread):
    """Reads all files in turn, past the page cache, until told to stop; keeps what went wrong, and its longest wait."""

    def __init__(self, target: Path) -> None:
        super().__init__()
        self.target = target
        self.problems: list[str] = []
        self.rounds = 0
        self.longest_s = 0.0
        self._stop_it = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stop_it.is_set():
            for name, data in FILES.items():
                begin = time.monotonic()
                try:
                    descriptor = os.open(self.target / name, os.O_RDONLY)
                    try:
                        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                        found = os.pread(descriptor, len(data) + 1, 0)
                    finally:
                        os.close(descriptor)
                    if found != data:
                        self.problems.append(f"{name}: wrong bytes")
                except OSError as error:
                    self.problems.append(f"{name}: {error}")
                self.longest_s = max(self.longest_s, time.monotonic() - begin)
            self.rounds += 1

    def finish(self) -> None:
        """Two whole rounds more, then the end; everything was right."""
        goal, deadline = self.rounds + 2, time.monotonic() + 60
        while self.rounds < goal and not self.problems:
            assert time.monotonic() < deadline, "the reader is stuck"
            time.sleep(0.01)
        self._stop_it.set()
        self.join(60)
        assert not self.is_alive(), "the reader is stuck"
        assert not self.problems, self.problems[:5]


@DRIVERS
def test_readers_see_nothing_of_a_killed_worker(machine: Machine, daemon: Daemon, registry: str, driver: str) -> None:
    target = mount(machine, registry, driver)
    reader = Reader(target)
    worker = daemon.worker()
    for _ in range(3):
        os.kill(worker, signal.SIGKILL)
        worker = daemon.wait_ready(not_worker=worker)
    reader.finish()
    machine.umount(target)
    daemon.stop()
    machine.assert_clean()


@DRIVERS
def test_a_read_that_waits_for_the_registry_survives_its_worker(
    machine: Machine, daemon: Daemon, registry: str, driver: str
) -> None:
    with FaultProxy(registry) as proxy:
        target = mount(machine, proxy.host, driver)
        stall = proxy.add(Fault(Kind.STALL, path=r"/blobs/", at=1000))
        found: list[bytes] = []
        waiting = threading.Thread(target=lambda: found.append((target / "f5").read_bytes()))
        waiting.start()
        deadline = time.monotonic() + WAIT_S
        while not stall.applied:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        worker = daemon.worker()
        os.kill(worker, signal.SIGKILL)
        proxy.clear()
        waiting.join(30)
        assert found == [FILES["f5"]]
        machine.umount(target)


def test_an_upgrade_is_not_noticed(machine: Machine, daemon: Daemon, registry: str) -> None:
    targets = [mount(machine, registry, driver, driver) for driver in ("erofs", "fuse")]
    readers = [Reader(target) for target in targets]
    keeper, worker = daemon.process.pid, daemon.worker()
    for _ in range(3):
        machine.lazyfs("daemon", "upgrade")
        assert daemon.worker() != worker
        worker = daemon.wait_ready(not_worker=worker)
    status = daemon.status()
    assert status is not None
    assert status["keeper"] == keeper == daemon.process.pid
    for reader in readers:
        reader.finish()
    for target in targets:
        machine.umount(target)


def test_a_worker_that_hangs_is_replaced(machine: Machine, daemon: Daemon, registry: str) -> None:
    target = mount(machine, registry)
    worker = daemon.worker()
    os.kill(worker, signal.SIGSTOP)
    reader = Reader(target)
    daemon.wait_ready(not_worker=worker)
    reader.finish()
    machine.umount(target)


def test_the_worker_goes_on_without_its_keeper_and_the_next_keeper_takes_it_over(
    machine: Machine, registry: str
) -> None:
    first = start_daemon(machine)
    try:
        first.wait_ready()
        target = mount(machine, registry)
        reader = Reader(target)
        worker = first.worker()
        first.process.kill()
        first.process.wait()
        assert (target / "f1").read_bytes() == FILES["f1"]
        # without a keeper everything but a crash of the worker is as before
        other = mount(machine, registry, name="other")
        assert "still serves" in machine.lazyfs("daemon", "status", code=41)
        second = start_daemon(machine)
        try:
            second.wait_ready(not_worker=worker)
            os.kill(second.worker(), signal.SIGKILL)
            assert (other / "f2").read_bytes() == FILES["f2"]
            reader.finish()
            for path in (target, other):
                machine.umount(path)
            second.stop()
        finally:
            end_daemon(second)
    finally:
        end_daemon(first)
    machine.assert_clean()


def test_stop_leaves_what_is_mounted_to_the_worker(machine: Machine, daemon: Daemon, registry: str) -> None:
    target = mount(machine, registry)
    worker = daemon.worker()
    daemon.stop()
    assert (target / "f3").read_bytes() == FILES["f3"]
    second = start_daemon(machine)
    try:
        second.wait_ready(not_worker=worker)
        assert (target / "f4").read_bytes() == FILES["f4"]
        machine.umount(target)
        second.stop()
    finally:
        end_daemon(second)
    machine.assert_clean()


def test_keeper_and_worker_killed_is_said_and_cleaned_up(machine: Machine, registry: str) -> None:
    first = start_daemon(machine)
    try:
        first.wait_ready()
        target = mount(machine, registry)
        first.process.kill()
        first.process.wait()
        os.kill(first.worker(), signal.SIGKILL)
        deadline = time.monotonic() + WAIT_S
        while first.directory.worker() is not None:
            assert time.monotonic() < deadline
        with pytest.raises(OSError, match=r"Transport endpoint|Software caused|Input/output"):
            (target / "f7").read_bytes()
        second = start_daemon(machine)
        try:
            second.wait_ready()
            assert "was lost" in (machine.directory / "daemon.log").read_text()
            assert mountapi.mount_at(str(target)) is None
            mount(machine, registry)
            assert (target / "f7").read_bytes() == FILES["f7"]
            machine.umount(target)
            second.stop()
        finally:
            end_daemon(second)
    finally:
        end_daemon(first)
    machine.assert_clean()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])   # SIGTERM to all of us: systemctl kill
def test_systemds_descriptor_store_keeps_the_mounts_over_both_deaths(
    machine: Machine, registry: str, number: signal.Signals
) -> None:
    """The protocol of sd_notify(3) and sd_listen_fds(3), played by this test."""
    path = machine.directory / "notify"
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    stored: dict[str, int] = {}
    with receiver:
        receiver.bind(str(path))
        receiver.settimeout(WAIT_S)
        first = start_daemon(machine, environment={"NOTIFY_SOCKET": str(path)})
        try:
            words: list[str] = []
            while not any("READY=1" in text for text in words):
                data, descriptors, _, _ = socket.recv_fds(receiver, 4096, 4)
                words.append(data.decode())
                if "FDSTORE=1" in words[-1]:
                    (name,) = (line.removeprefix("FDNAME=") for line in words[-1].splitlines() if "FDNAME" in line)
                    stored[name] = descriptors[0]
            assert set(stored) == {"fuse", "control"}
            assert any(f"MAINPID={first.process.pid}" in text for text in words)
            target = mount(machine, registry)
            reader = Reader(target)
            for process in (first.process.pid, first.worker()):
                os.kill(process, number)
            first.process.wait(WAIT_S)
            receiver.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while data := receiver.recv(4096):
                    assert b"FDSTOREREMOVE" not in data
            second = start_stored(machine, stored)
            try:
                second.wait_ready()
                reader.finish()
                machine.umount(target)
                for descriptor in stored.values():
                    os.close(descriptor)
                stored.clear()
                second.stop()
            finally:
                end_daemon(second)
        finally:
            for descriptor in stored.values():
                os.close(descriptor)
            end_daemon(first)
    machine.assert_clean()


def start_stored(machine: Machine, stored: dict[str, int]) -> Daemon:
    """As systemd starts a service that has descriptors in the store: 3 and on, LISTEN_PID being the new process."""
    names = ":".join(stored)
    moves = " ".join(f"{3 + place}<&{descriptor}" for place, descriptor in enumerate(stored.values()))
    words = [*LAZYFS, "daemon", "--cache-dir", str(machine.cache)]
    script = f'exec env LISTEN_PID=$$ LISTEN_FDS={len(stored)} LISTEN_FDNAMES={names} "$@" {moves}'
    with (machine.directory / "daemon.log").open("a") as log:
        process = subprocess.Popen(["bash", "-c", script, "start", *words], env=machine.environment, stdout=log,
                                   stderr=log, pass_fds=tuple(stored.values()), text=True)
    return Daemon(machine, process)


def test_one_broken_image_does_not_keep_others_from_being_served(
    machine: Machine, daemon: Daemon, registry: str, tmp_path: Path
) -> None:
    source = Layout(tmp_path / "other-in")
    source.add_image("other", [TarBuilder().file("only", b"x" * 300_000).build()])
    run_convert(source.reference("other"), f"docker://{registry}/other:lazy", registry=RegistryOptions(insecure=True))
    good = mount(machine, registry)
    bad = machine.target("bad")
    machine.lazyfs("mount", f"{registry}/other:lazy", bad, "--insecure")
    with protocol.ControlClient.connect(daemon.directory.socket) as client:
        described = {one["target"]: one for one in client.request(protocol.LIST, 5)}
    hexadecimal = described[str(bad)]["bootstrap"].partition(":")[2]
    (machine.cache / "images" / f"{hexadecimal}.erofs").unlink()
    damaged = machine.cache / "bootstraps" / f"{hexadecimal}.zst"
    kept = damaged.read_bytes()
    os.kill(daemon.worker(), signal.SIGSTOP)   # so that it does not look before both are gone
    damaged.write_bytes(b"nonsense")
    worker = daemon.worker()
    record = next(path for path in daemon.directory.mounts.glob("*.json") if str(bad) in path.read_text())
    changed = json.loads(record.read_text())
    changed["order"]["image"] = "127.0.0.1:1/gone:lazy"   # and the registry is down
    record.write_text(json.dumps(changed))
    os.kill(worker, signal.SIGKILL)
    daemon.wait_ready(not_worker=worker)
    assert (good / "f9").read_bytes() == FILES["f9"]
    status = daemon.status()
    assert status is not None
    assert [one["target"] for one in status["health"]["broken"]] == [str(bad)]
    with pytest.raises(OSError, match=r"."):
        (bad / "only").read_bytes()
    damaged.write_bytes(kept)   # it is tried again, without anybody asking
    deadline = time.monotonic() + WAIT_S
    while True:
        with contextlib.suppress(OSError):
            if (bad / "only").stat().st_size == 300_000 and not daemon.status()["health"]["broken"]:  # type: ignore[index]
                break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for path in (good, bad):
        machine.umount(path)


def test_a_second_daemon_is_refused_by_name_of_the_first(machine: Machine, daemon: Daemon) -> None:
    errors = machine.lazyfs("daemon", "--cache-dir", str(machine.cache), code=42)
    assert str(daemon.process.pid) in errors


def test_mount_waits_for_the_next_worker(machine: Machine, daemon: Daemon, registry: str) -> None:
    worker = daemon.worker()
    os.kill(worker, signal.SIGKILL)
    target = mount(machine, registry)
    assert (target / "f0").read_bytes() == FILES["f0"]
    machine.umount(target)


def test_ensure_is_content_with_what_is_there(machine: Machine, daemon: Daemon, registry: str) -> None:
    target = mount(machine, registry)
    order = {"image": f"{registry}/app:lazy", "target": str(target), "registry": {"insecure": True}}
    with protocol.ControlClient.connect(daemon.directory.socket) as client:
        answer = client.request(protocol.MOUNT, 30, order=order, ensure=True)
        assert answer["target"] == str(target)
    errors = machine.lazyfs("mount", f"{registry}/app:lazy", target, "--insecure", code=41)
    assert "mount point already" in errors
    machine.umount(target)


def test_an_unpacked_bootstrap_needs_no_registry(machine: Machine, daemon: Daemon, registry: str) -> None:
    """As the snapshotter orders it: containerd has unpacked the bootstrap layer already."""
    with FaultProxy(registry) as proxy:
        image = f"{proxy.host}/app:lazy"
        source = open_source(image, RegistryOptions(insecure=True))
        manifest = parse_manifest(source.root().data, source.root().media_type)
        layer = manifest.layers[-1]
        tar = zstandard.ZstdDecompressor().decompress(source.read_blob(layer.digest, layer.size))
        source.close()
        unpacked = machine.target("unpacked")
        subprocess.run(["tar", "x", "-C", str(unpacked)], input=tar, check=True)
        proxy.down()
        target = machine.target()
        order = {"image": image, "target": str(target), "registry": {"insecure": True}, "bootstrap_dir": str(unpacked)}
        with protocol.ControlClient.connect(daemon.directory.socket) as client:
            wrong = (Digest.of(b"another").text, 0, 0)
            with pytest.raises(IntegrityError, match="expected"):
                client.request(protocol.MOUNT, 30, order={**order, "layer": wrong})
            client.request(protocol.MOUNT, 30, order={**order, "layer": (Digest.of(tar).text, 0, 0)})
        assert sorted(path.name for path in target.iterdir()) == sorted(FILES)
        proxy.up()
        assert (target / "f1").read_bytes() == FILES["f1"]
        shutil.rmtree(unpacked)   # a worker that takes over has its own copy
        worker = daemon.worker()
        os.kill(worker, signal.SIGKILL)
        assert (target / "f2").read_bytes() == FILES["f2"]
        daemon.wait_ready(not_worker=worker)
        machine.umount(target)


def test_the_idle_daemon_leaves_nothing(machine: Machine, daemon: Daemon) -> None:
    daemon.stop()
    machine.assert_clean()
