"""Quota, floor and eviction under a running daemon: real mounts, real disks, and `lazyfs cache`."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from lazyfs.errors import FormatError
from lazyfs.image.digest import Digest
from lazyfs.node import protocol
from tests.convertkit import registry_with, tar_of
from tests.daemonkit import WAIT_S, Daemon, daemon_with, running_daemon
from tests.diskkit import ext4, mounted_disks, needs_mounts
from tests.mountkit import Machine, require_mounting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.mount
IMAGES = ("one", "two", "three")
FILE_COUNT, FILE_BYTES = 6, 700_000


def content(image: str, number: int) -> bytes:
    return random.Random(f"{image}{number}").randbytes(FILE_BYTES)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`one`, `two` and `three`: a layer that all have, and one of their own; 8.4 MB each."""
    require_mounting()
    base = tar_of({f"base{number}": content("base", number) for number in range(FILE_COUNT)})
    images = {image: [base, tar_of({f"own{number}": content(image, number) for number in range(FILE_COUNT)})]
              for image in IMAGES}
    with registry_with(tmp_path_factory.mktemp("registry"), images) as running:
        yield running.host


@pytest.fixture
def daemon(machine: Machine) -> Iterator[Daemon]:
    with running_daemon(machine) as running:
        yield running


def mount(machine: Machine, host: str, image: str, driver: str = "auto") -> Path:
    target = machine.target(image)
    machine.lazyfs("mount", f"{host}/{image}:lazy", target, "--insecure", "--driver", driver)
    return target


def check(target: Path, image: str) -> None:
    """Every byte of the image, past the page cache."""
    for name, of in (("base", "base"), ("own", image)):
        for number in range(FILE_COUNT):
            with (target / f"{name}{number}").open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert file.read() == content(of, number), f"{image}: {name}{number}"


def cache(machine: Machine, *words: str, code: int = 0) -> dict[str, Any]:
    """`lazyfs cache ... --json`."""
    with machine.start("cache", "--cache-dir", machine.cache, *words, "--json") as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    found: dict[str, Any] = json.loads(output) if output else {"errors": errors}
    return found


def ask(daemon: Daemon, operation: str, **arguments: Any) -> dict[str, Any]:
    with protocol.ControlClient.connect(daemon.directory.socket) as client:
        found: dict[str, Any] = client.request(operation, 20, **arguments)
        return found


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def complete(machine: Machine) -> list[str]:
    return [one["image"] for one in cache(machine, "ls")["images"] if one["present"] == 1]


def data_left(machine: Machine) -> list[str]:
    return [str(path) for path in machine.cache.rglob("*") if path.is_file() and path.name != "lock"]


# --- what is mounted stays, what is not goes --------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["erofs", "fuse"])
def test_an_evicted_image_is_mounted_again_and_when_all_is_gone_no_byte_is_left(
    machine: Machine, daemon: Daemon, registry: str, driver: str
) -> None:
    one, two = mount(machine, registry, "one", driver), mount(machine, registry, "two", driver)
    check(one, "one")
    check(two, "two")
    machine.umount(one)
    answer = cache(machine, "gc", "--all")
    assert (answer["device_count"], answer["image_count"]) == (1, 1), "the shared layer is that of a mounted image, too"
    assert answer["images"][0]["image"].endswith("/one:lazy")
    check(two, "two")
    one = mount(machine, registry, "one", driver)
    check(one, "one")
    assert cache(machine, "gc", "--all")["device_count"] == 0
    for target in (one, two):
        check(target, target.name)
        machine.umount(target)
    answer = cache(machine, "gc", "--all")
    assert (answer["device_count"], answer["image_count"]) == (3, 2)
    assert not data_left(machine)
    assert ask(daemon, protocol.USAGE)["devices"] == 0
    check(mount(machine, registry, "one", driver), "one")
    machine.umount(one)


def test_nothing_that_is_read_while_eviction_runs_is_damaged(machine: Machine, daemon: Daemon, registry: str) -> None:
    problems: list[BaseException] = []
    done = threading.Event()

    def tidy() -> None:
        try:
            while not done.is_set():
                ask(daemon, protocol.EVICT, everything=True)
        except BaseException as error:   # noqa: BLE001 - shown below
            problems.append(error)

    thread = threading.Thread(target=tidy)
    thread.start()
    try:
        stays = mount(machine, registry, "three")
        for _ in range(3):
            for image in ("one", "two"):
                target = mount(machine, registry, image)
                check(target, image)
                check(stays, "three")
                machine.umount(target)
    finally:
        done.set()
        thread.join(WAIT_S)
    assert not problems
    machine.umount(stays)


def test_an_image_that_is_still_used_after_it_was_detached_is_not_evicted(
    machine: Machine, daemon: Daemon, registry: str
) -> None:
    target = mount(machine, registry, "one")
    with (target / "own1").open("rb") as held:
        machine.umount(target, "--lazy")
        assert cache(machine, "gc", "--all")["device_count"] == 0
        assert held.read() == content("one", 1)
    until(lambda: cache(machine, "gc", "--all")["device_count"] == 2)
    until(lambda: not data_left(machine))


def test_what_a_takeover_serves_is_not_evicted(machine: Machine, daemon: Daemon, registry: str) -> None:
    target = mount(machine, registry, "one")
    check(target, "one")
    worker = daemon.worker()
    os.kill(worker, signal.SIGKILL)
    daemon.wait_ready(not_worker=worker)
    assert cache(machine, "gc", "--all")["device_count"] == 0
    check(target, "one")
    machine.umount(target)
    assert cache(machine, "gc", "--all")["device_count"] == 2


# --- by itself --------------------------------------------------------------------------------------------------------


def test_the_worker_keeps_to_its_quota_by_evicting_what_was_used_first(machine: Machine, registry: str) -> None:
    with daemon_with(machine, quota_bytes="14000000", free_floor_bytes="0", evict_interval_s="1") as daemon:
        for image in IMAGES:
            target = mount(machine, registry, image)
            check(target, image)
            machine.umount(target)
            assert ask(daemon, protocol.USAGE)["bytes"] < 14_200_000, "small files are not counted at once"
        until(lambda: ask(daemon, protocol.USAGE)["bytes"] <= 14_000_000)
        until(lambda: [one["image"].rpartition("/")[2] for one in cache(machine, "ls")["images"]][:1] == ["three:lazy"])
        until(lambda: f"{registry}/one:lazy" not in complete(machine))    # what had no room asked for some
        for image in IMAGES:
            target = mount(machine, registry, image)
            check(target, image)
            machine.umount(target)


def test_a_mounted_image_greater_than_the_quota_is_served_all_the_same(machine: Machine, registry: str) -> None:
    with daemon_with(machine, quota_bytes="4000000", free_floor_bytes="0", evict_interval_s="1") as daemon:
        target = mount(machine, registry, "one")
        check(target, "one")
        check(target, "one")
        assert ask(daemon, protocol.USAGE)["bytes"] <= 4_200_000
        assert ask(daemon, protocol.STATS)["fetch"]["not_stored"] > 0
        machine.umount(target)


@needs_mounts
def test_a_full_disk_is_served_through_and_recovers_when_something_can_go(machine: Machine, registry: str) -> None:
    """The cache's disk holds one image and a half."""
    machine.cache.mkdir()
    with mounted_disks(machine.directory) as disks:
        disk = disks("-o", "loop", ext4(machine.directory / "disk", 24 << 20), name="cache")
        (disk / "lost+found").rmdir()
        with daemon_with(machine, free_floor_bytes="0", evict_interval_s="3600") as daemon:
            one = mount(machine, registry, "one")
            check(one, "one")
            found = os.statvfs(disk)
            (disk / "filler").write_bytes(bytes(found.f_bfree * found.f_frsize - 3_700_000))    # not the cache's
            two = mount(machine, registry, "two")
            check(two, "two")
            assert ask(daemon, protocol.STATS)["fetch"]["not_stored"] > 0
            check(one, "one")
            machine.umount(one)
            # a read that finds no room has it made at once, long before the next look
            three = mount(machine, registry, "three")
            check(three, "three")
            until(lambda: len(cache(machine, "ls")["devices"]) == 3)
            machine.umount(three)
            (disk / "filler").unlink()
            check(mount(machine, registry, "three"), "three")
            (described,) = (one for one in ask(daemon, protocol.LIST) if one["target"] == str(three))  # type: ignore[index]
            assert described["complete"]
            check(two, "two")
            machine.umount(three)
            machine.umount(two)
            daemon.stop()


# --- looking ----------------------------------------------------------------------------------------------------------


def test_usage_is_real_disk_use_and_says_whether_all_is_there(machine: Machine, daemon: Daemon, registry: str) -> None:
    target = mount(machine, registry, "one")
    bootstrap = ask(daemon, protocol.LIST)[0]["bootstrap"]  # type: ignore[index]
    begun = ask(daemon, protocol.USAGE, bootstrap=bootstrap)
    assert (begun["devices"], begun["complete"]) == (2, False)
    assert begun["bytes"] < 1_000_000
    check(target, "one")
    whole = ask(daemon, protocol.USAGE, bootstrap=bootstrap)
    assert whole["complete"]
    assert 2 * FILE_COUNT * FILE_BYTES <= whole["bytes"] < 2 * FILE_COUNT * FILE_BYTES + 1_000_000
    assert whole["inodes"] >= 2 * 3 + 3
    machine.umount(target)
    assert ask(daemon, protocol.USAGE, bootstrap=bootstrap) == pytest.approx(whole, abs=10_000), "unmounted: as before"
    other = mount(machine, registry, "two")
    check(other, "two")
    total = ask(daemon, protocol.USAGE)
    assert total["devices"] == 3
    assert total["bytes"] < 2 * whole["bytes"], "the shared layer counts once"
    unknown = ask(daemon, protocol.USAGE, bootstrap=Digest.of(b"unknown").text)
    assert unknown == {"bytes": 0, "inodes": 0, "devices": 0, "complete": False}
    with pytest.raises(FormatError):
        ask(daemon, protocol.USAGE, bootstrap="../../etc")
    machine.umount(other)


def test_ls_and_rm_with_a_daemon_and_without_one(machine: Machine, registry: str) -> None:
    cache(machine, "ls", code=2)
    assert not machine.cache.exists()
    with running_daemon(machine) as daemon:
        one = mount(machine, registry, "one")
        check(one, "one")
        listed = cache(machine, "ls")
        (image,) = listed["images"]
        assert (image["image"], image["present"]) == (f"{registry}/one:lazy", 1)
        assert image["mountedOn"] == [str(one)]
        assert [device["mountedOn"] for device in listed["devices"]] == [[str(one)]] * 2
        assert time.time() - 60 < image["lastUse"] <= time.time()
        with machine.start("cache", "--cache-dir", machine.cache, "ls") as process:
            text, _ = process.communicate(timeout=60)
        assert f"{registry}/one:lazy" in text
        assert "100%" in text
        assert str(one) in text
        for name in (image["image"], image["bootstrap"], image["devices"][0]):
            assert str(one) in cache(machine, "rm", name, code=42)["errors"]
        two = mount(machine, registry, "two")
        machine.umount(one)
        assert cache(machine, "rm", image["image"], "--dry-run")["device_count"] == 1
        assert cache(machine, "rm", image["image"])["device_count"] == 1, "the other layer is that of two"
        assert "is not in the cache" in cache(machine, "rm", image["image"], code=21)["errors"]
        check(two, "two")
        machine.umount(two)
        daemon.stop()
    listed = cache(machine, "ls")
    assert [one["image"] for one in listed["images"]] == [f"{registry}/two:lazy"]
    assert cache(machine, "rm", listed["images"][0]["bootstrap"])["device_count"] == 2
    assert not data_left(machine)


def test_a_mount_whose_worker_is_dead_keeps_its_data(machine: Machine, registry: str) -> None:
    """A complete image is read by the kernel itself: nobody has taken it from its readers yet."""
    target = machine.target("one")
    for _ in range(2):
        machine.mount(f"{registry}/one:lazy", target, "--insecure", "--driver", "auto")
        check(target, "one")
        worker = machine.worker()
        assert worker is not None
        if machine.statistics()["fetch"]["requests"]:
            machine.umount(target)
    os.kill(worker.pid, signal.SIGKILL)
    until(lambda: machine.worker() is None)
    assert cache(machine, "gc", "--all")["device_count"] == 0
    assert "mounted on" in cache(machine, "rm", f"{registry}/one:lazy", code=42)["errors"]
    machine.umount(target)
    assert cache(machine, "gc", "--all")["device_count"] == 2
    assert not data_left(machine)
