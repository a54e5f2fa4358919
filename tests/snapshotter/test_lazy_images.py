"""The lazy hook over a real daemon: mounts, sharing, forgetting, restarts. Core is played by the test."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import HostError, IntegrityError, LazyfsError, NotFoundError
from lazyfs.fs import mountapi
from lazyfs.node import protocol
from lazyfs.node.rundir import WorkerDir
from snapshotter.lazy import LABEL_FULL_COPY, LABEL_IMAGE_REF, LazyImages, MountSettings
from snapshotter.lazydaemon import DaemonLink
from snapshotter.lazydigest import bootstrap_digest
from snapshotter.lazyhook import LABEL_BLOB, LABEL_BOOTSTRAP, LayerKind, LazyLayer
from snapshotter.model import Usage
from tests.daemonkit import WAIT_S, Daemon, end_daemon, running_daemon, start_daemon
from tests.lazykit import push_lazy, unpack_bootstrap
from tests.registrykit import require_registry, running_registry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from tests.mountkit import Machine

FILES = {f"f{number}": random.Random(number).randbytes(200_000 + number) for number in range(6)}
DRIVERS = pytest.mark.parametrize("driver", ["erofs", "fuse"])


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    require_registry()
    directory = tmp_path_factory.mktemp("registry")
    with running_registry(directory) as running:
        push_lazy(directory, running.host, "app", FILES)
        yield running.host


@pytest.fixture
def daemon(machine: Machine) -> Iterator[Daemon]:
    with running_daemon(machine) as running:
        yield running


class Rig:
    """A snapshotter's root with one unpacked bootstrap a snapshot, and what containerd would answer."""

    def __init__(self, machine: Machine, host: str) -> None:
        self.root = machine.directory / "root"
        self.link = DaemonLink(WorkerDir(machine.run_dir / "daemon"))
        self.image = f"{host}/app:lazy"
        self.found: list[str] | LazyfsError = [self.image]
        self.guessed: list[str] = []
        self.asked: list[str] = []

    def lazy(self, driver: str = "auto") -> LazyImages:
        """A snapshotter that has just started."""
        return LazyImages(self.root, self.link, self, MountSettings(driver))

    def images(self, digest: str) -> list[str]:
        self.asked.append(digest)
        if isinstance(self.found, LazyfsError):
            raise self.found
        return self.found

    def guesses(self, digest: str) -> list[str]:
        return self.guessed

    def layer(self, number: int, **labels: str) -> LazyLayer:
        fs_dir = self.root / "snapshots" / str(number) / "fs"
        unpack_bootstrap(self.image, fs_dir)
        return LazyLayer(f"ns{number}/{number}/sha256:x", {LABEL_BOOTSTRAP: "1", **labels}, fs_dir, number)

    def mounted(self) -> list[str]:
        return [entry.target for entry in mountapi.mounts() if entry.target.startswith(f"{self.root}/images/")]

    def assert_nothing_left(self) -> None:
        """No mount, no mount point, no record, and nothing that the daemon serves."""
        assert self.mounted() == []
        assert list((self.root / "images").iterdir()) == []
        assert list((self.root / "lazy").iterdir()) == []
        deadline = time.monotonic() + WAIT_S
        while left := [*self.served(), *self.link.directory.mounts.glob("*.json")]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)

    def served(self) -> list[object]:
        with protocol.ControlClient.connect(self.link.directory.socket) as client:
            found: list[object] = client.request(protocol.LIST, 5)
            return found


@pytest.fixture
def rig(machine: Machine, host: str) -> Rig:
    return Rig(machine, host)


def assert_right(target: Path) -> None:
    assert {path.name: path.read_bytes() for path in target.iterdir()} == FILES


@DRIVERS
def test_one_mount_serves_all_snapshots_of_a_bootstrap_until_the_last_is_gone(
    rig: Rig, daemon: Daemon, driver: str
) -> None:
    lazy = rig.lazy(driver)
    first, second = rig.layer(1), rig.layer(2)
    target = lazy.ensure_mounted(first)
    assert_right(target)
    assert lazy.ensure_mounted(second) == target
    assert rig.mounted() == [str(target)]
    assert len(rig.asked) == 1, "what is mounted needs no other reference"
    lazy.forget(first)
    lazy.forget(first)
    assert_right(target)
    lazy.forget(second)
    rig.assert_nothing_left()
    assert_right(lazy.ensure_mounted(second))
    lazy.forget(second)
    rig.assert_nothing_left()


def test_a_snapshot_that_is_removed_while_it_is_mounted_leaves_nothing(rig: Rig, daemon: Daemon) -> None:
    """Core discards the directory, then says forget(); here the mount comes after both."""
    lazy = rig.lazy()
    layer = rig.layer(1)
    lazy.ensure_mounted(layer)
    shutil.rmtree(layer.fs_dir)
    with pytest.raises(NotFoundError, match="removed meanwhile"):
        lazy.ensure_mounted(layer)
    rig.assert_nothing_left()


def test_usage_is_what_the_cache_holds_of_the_image(rig: Rig, daemon: Daemon) -> None:
    lazy = rig.lazy()
    layer = rig.layer(1)
    assert lazy.usage(layer) == Usage(0, 0)
    target = lazy.ensure_mounted(layer)
    assert_right(target)
    total = sum(map(len, FILES.values()))
    usage = lazy.usage(layer)
    assert total <= usage.size_bytes <= 2 * total
    assert usage.inodes
    lazy.forget(layer)
    rig.assert_nothing_left()


def test_what_the_image_says_of_its_full_copy_is_ordered(rig: Rig, daemon: Daemon) -> None:
    lazy = rig.lazy()
    for number, (said, ordered) in enumerate((("idle", "idle"), ("always", ""), ("", ""))):
        layer = rig.layer(number, **({LABEL_FULL_COPY: said} if said else {}))
        lazy.ensure_mounted(layer)
        (record,) = rig.link.directory.records()
        assert record.order["full_copy"] == ordered
        lazy.forget(layer)
    rig.assert_nothing_left()


def test_labels_tell_what_a_layer_is(rig: Rig) -> None:
    lazy = rig.lazy()
    assert lazy.classify({LABEL_BLOB: "layer"}) is LayerKind.LAZY_BLOB
    assert lazy.classify({LABEL_BOOTSTRAP: "1"}) is LayerKind.LAZY_BOOTSTRAP
    assert lazy.classify({"containerd.io/snapshot.ref": "sha256:x"}) is LayerKind.ORDINARY


def test_the_digest_is_the_layers_diff_id(rig: Rig, tmp_path: Path) -> None:
    assert bootstrap_digest(rig.layer(1).fs_dir) == unpack_bootstrap(rig.image, tmp_path / "again")


@pytest.mark.parametrize("damage", ["missing", "link", "empty"])
def test_what_is_no_bootstrap_is_refused(rig: Rig, daemon: Daemon, damage: str) -> None:
    layer = rig.layer(1)
    path = layer.fs_dir / "lazyfs" / "image.erofs"
    path.unlink()
    if damage == "link":
        path.symlink_to("/etc/passwd")
    if damage == "empty":
        path.touch()
    with pytest.raises(LazyfsError):
        rig.lazy().ensure_mounted(layer)
    assert rig.mounted() == []
    rig.lazy().forget(layer)
    rig.assert_nothing_left()


def test_a_bootstrap_that_changed_after_its_digest_is_known_is_refused(rig: Rig, daemon: Daemon) -> None:
    layer = rig.layer(1)
    lazy = rig.lazy()
    rig.found = NotFoundError("nothing")
    with pytest.raises(NotFoundError):
        lazy.ensure_mounted(layer)
    rig.found = [rig.image]
    with (layer.fs_dir / "lazyfs" / "tables.bin").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(IntegrityError, match="expected"):
        lazy.ensure_mounted(layer)
    assert rig.mounted() == []


def test_many_at_once_make_one_mount(rig: Rig, daemon: Daemon) -> None:
    lazy = rig.lazy()
    layers = [rig.layer(1), rig.layer(2)]
    found: list[Path] = []
    threads = [threading.Thread(target=lambda n=number: found.append(lazy.ensure_mounted(layers[n % 2])))
               for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 20
    assert len(set(found)) == 1
    assert len(rig.served()) == 1
    assert_right(found[0])
    for layer in layers:
        lazy.forget(layer)
    rig.assert_nothing_left()


def test_mounting_and_forgetting_at_once_never_takes_away_what_was_promised(rig: Rig, daemon: Daemon) -> None:
    """One snapshot comes and goes; the other one's mount is there whenever it has asked."""
    lazy = rig.lazy()
    stays, goes = rig.layer(1), rig.layer(2)
    stop = threading.Event()
    problems: list[str] = []

    def come_and_go() -> None:
        while not stop.is_set():
            try:
                lazy.ensure_mounted(goes)
                lazy.forget(goes)
            except LazyfsError as error:
                problems.append(str(error))

    thread = threading.Thread(target=come_and_go)
    thread.start()
    for _ in range(15):
        target = lazy.ensure_mounted(stays)
        assert mountapi.mount_at(str(target)) is not None
        assert (target / "f1").read_bytes() == FILES["f1"]
        lazy.forget(stays)
    stop.set()
    thread.join(60)
    assert problems == []
    rig.assert_nothing_left()


def test_a_daemon_that_does_not_run_is_said_in_one_line(rig: Rig) -> None:
    begin = time.monotonic()
    with pytest.raises(HostError, match="does not run") as caught:
        rig.lazy().ensure_mounted(rig.layer(1))
    assert time.monotonic() - begin < 20
    assert "systemctl start lazyfs" in caught.value.hint


def test_a_worker_that_dies_while_it_is_asked_is_not_noticed(rig: Rig, daemon: Daemon) -> None:
    lazy = rig.lazy()
    layer = rig.layer(1)
    for _ in range(3):
        os.kill(daemon.worker(), signal.SIGSTOP)
        worker = daemon.worker()
        thread = threading.Thread(target=lambda: lazy.ensure_mounted(layer))
        thread.start()
        os.kill(worker, signal.SIGKILL)
        thread.join(60)
        assert_right(lazy.ensure_mounted(layer))
        lazy.forget(layer)
    rig.assert_nothing_left()


def test_an_upgrade_is_not_noticed(rig: Rig, machine: Machine, daemon: Daemon) -> None:
    lazy = rig.lazy()
    layer = rig.layer(1)
    done = threading.Event()
    problems: list[str] = []

    def go_on() -> None:
        while not done.is_set():
            try:
                assert (lazy.ensure_mounted(layer) / "f1").stat().st_size == len(FILES["f1"])
            except LazyfsError as error:
                problems.append(str(error))

    thread = threading.Thread(target=go_on)
    thread.start()
    machine.lazyfs("daemon", "upgrade")
    done.set()
    thread.join(60)
    assert problems == []
    lazy.forget(layer)
    rig.assert_nothing_left()


def test_the_next_snapshotter_finds_what_the_last_one_mounted(rig: Rig, daemon: Daemon) -> None:
    layer = rig.layer(1)
    target = rig.lazy().ensure_mounted(layer)
    before = mountapi.mount_at(str(target))
    later = rig.lazy()
    later.reconcile({1: layer.name})
    rig.found = NotFoundError("containerd is down")
    assert later.ensure_mounted(layer) == target
    assert mountapi.mount_at(str(target)) == before
    later.forget(layer)
    rig.assert_nothing_left()


def test_a_start_without_daemon_takes_away_what_belongs_to_no_snapshot(rig: Rig, machine: Machine, host: str) -> None:
    with running_daemon(machine):
        kept, gone = rig.layer(1), rig.layer(2)
        other = push_lazy(machine.directory, host, "other", {"only": b"x" * 100_000})
        (gone.fs_dir / "lazyfs" / "image.json").unlink()
        unpack_bootstrap(other, gone.fs_dir)
        lazy = rig.lazy()
        targets = [lazy.ensure_mounted(layer) for layer in (kept, gone)]
        assert sorted(rig.mounted()) == sorted(map(str, targets))
        (rig.root / "lazy" / "77.json").write_text("no record")
        (rig.root / "lazy" / "5.1234.tmp").touch()
        (rig.root / "lazy" / f"{'0' * 32}.image").touch()
        (rig.root / "images" / "0123").mkdir()
    # the daemon is gone, with the mounts of the test (as after a reboot)
    assert rig.mounted() == []
    later = rig.lazy()
    later.reconcile({kept.snapshot_id: kept.name})
    assert {path.name for path in (rig.root / "lazy").iterdir()} == {"1.json", f"{targets[0].name}.image"}
    assert list((rig.root / "images").iterdir()) == [targets[0]]
    with running_daemon(machine):
        assert_right(later.ensure_mounted(kept))
        assert len(rig.asked) == 3, "after a reboot the reference is asked for again"
        later.forget(kept)
        rig.assert_nothing_left()


def test_mounts_of_no_snapshot_are_taken_away_at_the_start(rig: Rig, daemon: Daemon) -> None:
    layer = rig.layer(1)
    rig.lazy().ensure_mounted(layer)
    rig.lazy().reconcile({1: "another/name"})
    rig.assert_nothing_left()


def test_a_mount_whose_daemon_is_gone_is_replaced(rig: Rig, machine: Machine) -> None:
    first = start_daemon(machine)
    layer = rig.layer(1)
    lazy = rig.lazy()
    try:
        first.wait_ready()
        target = lazy.ensure_mounted(layer)
        first.process.kill()
        first.process.wait()
        worker = WorkerDir(machine.run_dir / "daemon").worker()
        assert worker is not None
        os.kill(worker.pid, signal.SIGKILL)
        deadline = time.monotonic() + WAIT_S
        while worker.alive:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for record in first.directory.mounts.glob("*.json"):
            record.unlink()   # so that the next daemon knows nothing of it
        second = start_daemon(machine)
        try:
            second.wait_ready()
            assert mountapi.mount_at(str(target)) is not None
            assert_right(lazy.ensure_mounted(layer))
            lazy.forget(layer)
            rig.assert_nothing_left()
        finally:
            end_daemon(second)
    finally:
        end_daemon(first)


def test_a_mount_that_somebody_else_took_away_is_made_again(rig: Rig, daemon: Daemon) -> None:
    lazy = rig.lazy()
    layer = rig.layer(1)
    for _ in range(2):
        target = lazy.ensure_mounted(layer)
        assert_right(lazy.ensure_mounted(layer))
        mountapi.unmount(str(target), mountapi.MNT_DETACH)
    assert_right(lazy.ensure_mounted(layer))
    lazy.forget(layer)
    rig.assert_nothing_left()


def test_what_stands_needs_no_word_of_the_daemon(rig: Rig, daemon: Daemon) -> None:
    """A busy daemon keeps no second container from starting."""
    lazy = rig.lazy()
    layer = rig.layer(1)
    target = lazy.ensure_mounted(layer)
    os.kill(daemon.worker(), signal.SIGSTOP)
    try:
        begin = time.monotonic()
        assert lazy.ensure_mounted(layer) == target
        assert time.monotonic() - begin < 10, "it did not wait for the worker to be replaced"
    finally:
        os.kill(daemon.worker(), signal.SIGCONT)
    lazy.forget(layer)
    rig.assert_nothing_left()


def test_forgetting_needs_no_daemon(rig: Rig, machine: Machine) -> None:
    first = start_daemon(machine)
    layer = rig.layer(1)
    lazy = rig.lazy()
    try:
        first.wait_ready()
        target = lazy.ensure_mounted(layer)
        first.process.kill()
        first.process.wait()
        os.kill(first.worker(), signal.SIGKILL)
        lazy.forget(layer)
        assert mountapi.mount_at(str(target)) is None
        assert not target.exists()
    finally:
        end_daemon(first)


def test_who_reads_while_the_image_is_forgotten_reads_on(rig: Rig, daemon: Daemon) -> None:
    lazy = rig.lazy()
    layer = rig.layer(1)
    with (lazy.ensure_mounted(layer) / "f4").open("rb") as file:
        lazy.forget(layer)
        assert file.read() == FILES["f4"]
    rig.assert_nothing_left()


def test_the_newest_reference_wins_and_the_label_is_for_when_containerd_is_silent(rig: Rig, daemon: Daemon) -> None:
    lazy = rig.lazy()
    labelled = rig.layer(1, **{LABEL_IMAGE_REF: "127.0.0.1:1/gone:lazy"})
    assert_right(lazy.ensure_mounted(labelled))
    lazy.forget(labelled)
    rig.found = HostError("containerd is down")
    labelled = rig.layer(2, **{LABEL_IMAGE_REF: rig.image})
    assert_right(lazy.ensure_mounted(labelled))
    lazy.forget(labelled)
    rig.found = []
    with pytest.raises(NotFoundError, match="no image in containerd"):
        lazy.ensure_mounted(rig.layer(3))


def test_what_was_mounted_by_a_guess_is_mounted_again_when_the_image_is_known(rig: Rig, daemon: Daemon) -> None:
    lazy = rig.lazy()
    layer = rig.layer(1)
    rig.found, rig.guessed = [], ["127.0.0.1:1/app"]
    target = lazy.ensure_mounted(layer)
    before = mountapi.mount_at(str(target))
    assert sorted(path.name for path in target.iterdir()) == sorted(FILES), "metadata needs no registry"
    assert lazy.ensure_mounted(layer) == target
    assert mountapi.mount_at(str(target)) == before
    rig.found = [rig.image]
    assert_right(lazy.ensure_mounted(layer))
    lazy.forget(layer)
    rig.assert_nothing_left()


def test_what_is_mounted_ahead_goes_by_its_label_until_a_container_asks(rig: Rig, daemon: Daemon) -> None:
    lazy = rig.lazy()
    plain, layer = rig.layer(1), rig.layer(2, **{LABEL_IMAGE_REF: "127.0.0.1:1/gone:lazy"})
    lazy.mount_ahead(plain)
    LazyImages(rig.root, rig.link, rig, MountSettings(ahead=False)).mount_ahead(layer)
    assert rig.mounted() == [], "no label, not wanted"
    lazy.mount_ahead(layer)
    assert (len(rig.mounted()), rig.asked) == (1, []), "containerd does not have the image yet"
    lazy.mount_ahead(layer)
    assert_right(lazy.ensure_mounted(layer))   # by now it is known to come from elsewhere
    lazy.mount_ahead(layer)
    assert_right(lazy.ensure_mounted(layer))
    assert len(rig.asked) == 1
    lazy.forget(layer)
    rig.assert_nothing_left()


def test_what_is_mounted_ahead_by_the_right_name_stays(rig: Rig, daemon: Daemon) -> None:
    lazy = rig.lazy()
    layer = rig.layer(1, **{LABEL_IMAGE_REF: rig.image})
    lazy.mount_ahead(layer)
    (target,) = rig.mounted()
    before = mountapi.mount_at(target)
    assert_right(lazy.ensure_mounted(layer))
    assert mountapi.mount_at(target) == before
    lazy.forget(layer)
    rig.assert_nothing_left()


def test_an_image_that_nobody_uses_rests_until_the_next_container(rig: Rig, daemon: Daemon) -> None:
    lazy = rig.lazy()
    first, second = rig.layer(1), rig.layer(2)
    target = lazy.ensure_mounted(first)
    lazy.ensure_mounted(second)
    asked: list[list[int]] = []

    def in_use(ids: Iterable[int]) -> bool:
        asked.append(sorted(ids))
        return len(asked) == 1

    lazy.rest(first, in_use)
    assert lazy._confirmed, "nothing is said to the daemon while somebody uses it"
    lazy.rest(first, in_use)
    assert asked == [[1, 2]] * 2, "both are the one image"
    assert not lazy._confirmed, "so the next container's mount is ordered"
    before = mountapi.mount_at(str(target))
    assert lazy.ensure_mounted(second) == target
    assert mountapi.mount_at(str(target)) == before
    assert_right(target)
    for layer in (first, second):
        lazy.forget(layer)
    lazy.rest(first, in_use)
    rig.assert_nothing_left()


def test_a_record_of_another_snapshot_is_not_believed(rig: Rig, daemon: Daemon) -> None:
    layer = rig.layer(1)
    lazy = rig.lazy()
    lazy.ensure_mounted(layer)
    path = rig.root / "lazy" / "1.json"
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps({**record, "name": "else", "digest": "sha256:" + "0" * 64}))
    assert_right(lazy.ensure_mounted(layer))
    lazy.forget(layer)
    rig.assert_nothing_left()
