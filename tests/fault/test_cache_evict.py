"""
Eviction on disks that are full, in processes that are killed, on machines that lose power.

Whatever the moment: a device is there whole, with the bytes that it had, or it is not there at all; what is in use is
never touched; and what a crash has left is gone after the next eviction.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from typing import TYPE_CHECKING

import pytest

from lazyfs.cache import evict, inventory
from lazyfs.cache.inventory import ImageRecord
from lazyfs.cache.plan import choose, choose_all
from lazyfs.cache.space import Disk, Limits
from lazyfs.cache.store import CachedDevice, CacheDir
from lazyfs.config.kinds import Amount
from lazyfs.errors import CacheError
from lazyfs.image.digest import Digest
from lazyfs.node.housekeeping import Request, evict_unserved
from tests.diskkit import (
    CuttingOs,
    PowerCutError,
    cut_power,
    ext4,
    needs_mounts,
    run,
    umount,
    wait_detached,
    xfs,
)

if TYPE_CHECKING:
    from pathlib import Path

CHUNK, COUNT = 64 * 1024, 4
BOOT, LATER_BOOT = b"a" * 16, b"b" * 16
DIGESTS = [Digest.of(f"device {number}".encode()) for number in range(3)]
IMAGE = Digest.of(b"bootstrap")


def chunk(digest: Digest, index: int) -> bytes:
    return random.Random(f"{digest}{index}").randbytes(CHUNK)


def open_device(cache: CacheDir, digest: Digest, count: int = COUNT) -> CachedDevice:
    return cache.device(digest, CHUNK, count * CHUNK)


def fill(path: Path, digests: list[Digest], *, boot_id: bytes = BOOT) -> None:
    """Devices that are complete and durable, used in that order; and one image made of all of them."""
    with CacheDir.open(path, boot_id=boot_id) as cache:
        for age, digest in enumerate(digests):
            cached = open_device(cache, digest)
            for index in range(COUNT):
                assert cached.write(index, chunk(digest, index))
            assert cached.checkpoint()
            cached.release()
            os.utime(cache.path / "v1" / digest.hex, (1000 + age, 1000 + age))
        for name in (f"bootstraps/{IMAGE.hex}.zst", f"images/{IMAGE.hex}.erofs"):
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(b"x" * 5000)
        ImageRecord("app:1", tuple(digest.hex for digest in digests)).write(path, IMAGE)


def whole_or_nothing(path: Path, boot_id: bytes) -> list[bool]:
    """Of each device, whether it is there; if so it is whole and right, for this boot and after it."""
    found = []
    with CacheDir.open(path, boot_id=boot_id) as cache:
        for digest in DIGESTS:
            cached = open_device(cache, digest)
            assert cached.present_count in {0, COUNT}, "half a device"
            for index in range(cached.present_count):
                assert cached.read(index * CHUNK, CHUNK) == chunk(digest, index)
            found.append(cached.present_count > 0)
            cached.release()
    return found


def evict_all(path: Path) -> None:
    with CacheDir.open(path, boot_id=BOOT) as cache:
        plan = choose_all(*inventory.take(cache.path).candidates((), ()))
        evict.take_away(cache, plan)
        evict.take_away_images(cache.path, plan.images)
        evict.clean(cache.path)


def files_left(path: Path) -> list[str]:
    return sorted(str(one.relative_to(path)) for one in path.rglob("*") if one.is_file() and one.name != "lock")


# --- killed -----------------------------------------------------------------------------------------------------------


def killed_at(calls: int, path: Path) -> bool:
    """Evict everything in a process that is killed at its Nth call. Whether it was: else it had fewer calls."""
    child = os.fork()
    if child == 0:
        evict.os = CuttingOs(calls, kill=True)  # type: ignore[assignment, attr-defined]
        with contextlib.suppress(BaseException):
            evict_all(path)
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in {0, 9}, status
    return status == 9


def test_killed_at_any_call_eviction_leaves_each_device_whole_or_not_at_all(tmp_path):
    for calls in range(200):
        path = tmp_path / str(calls)
        fill(path, DIGESTS)
        killed = killed_at(calls, path)
        found = whole_or_nothing(path, BOOT)
        assert found == sorted(found), "the oldest go first"
        if not killed:
            assert not any(found)
            assert calls > 20
            return
        evict_all(path)
        assert not files_left(path)
        assert not list((path / "evicted").iterdir())
    raise AssertionError("eviction made more calls than expected")


@needs_mounts
@pytest.mark.mount
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_power_cut_at_any_call_of_an_eviction_leaves_whole_devices_or_none(mounts, tmp_path, monkeypatch, kind):
    template = ext4(tmp_path / "template", 16 * 1024 * 1024) if kind == "ext4" else xfs(tmp_path / "template")
    options = "loop" if kind == "ext4" else "loop,nouuid"    # copies of one file system
    for calls in range(0, 200, 2 if kind == "ext4" else 5):
        image = tmp_path / f"image{calls}"
        run("cp", "--sparse=always", template, image)
        disk = mounts("-o", options, image, name=f"disk{calls}")
        fill(disk / "cache", DIGESTS)
        run("sync", "-f", disk)
        finished = False
        with monkeypatch.context() as patch:
            patch.setattr(evict, "os", CuttingOs(calls))
            try:
                evict_all(disk / "cache")
                finished = True
            except PowerCutError:
                pass
        cut_power(disk)
        umount(disk)
        wait_detached(image)
        run("mount", "-o", options, image, disk)
        with contextlib.ExitStack() as stack:
            stack.callback(umount, disk)
            whole_or_nothing(disk / "cache", LATER_BOOT)
            evict_all(disk / "cache")
            assert not files_left(disk / "cache")
        image.unlink()
        if finished:
            return
    raise AssertionError("eviction made more calls than expected")


# --- in use -----------------------------------------------------------------------------------------------------------


def test_what_is_in_use_is_never_evicted_and_comes_back_whole_otherwise(tmp_path):
    """Readers open, fill, read and release devices while everything that may go goes, all the time."""
    path = tmp_path / "cache"
    problems: list[str] = []
    done = threading.Event()
    with CacheDir.open(path) as cache:
        def use(seed: int) -> None:
            draw = random.Random(seed)
            for _ in range(120):
                digest = draw.choice(DIGESTS)
                cached = open_device(cache, digest)
                for index in cached.missing(0, COUNT - 1):
                    cached.write(index, chunk(digest, index))
                problems.extend(f"{digest.short}: chunk {index}" for index in range(COUNT)
                                if cached.read_if_present(index * CHUNK, CHUNK) != chunk(digest, index))
                cached.release()

        def tidy() -> None:
            while not done.is_set():
                evict.take_away(cache, choose_all(*inventory.take(path).candidates((), ())))
                evict.clean(path)

        users = [threading.Thread(target=use, args=(seed,)) for seed in range(3)]
        tidier = threading.Thread(target=tidy)
        for thread in (*users, tidier):
            thread.start()
        for thread in users:
            thread.join()
        done.set()
        tidier.join()
        assert not problems
        assert cache.in_use() == set()
        evict.take_away(cache, choose_all(*inventory.take(path).candidates((), ())))
        evict.clean(path)
    assert not files_left(path)


def test_a_file_that_the_kernel_still_has_open_keeps_its_bytes(tmp_path):
    """As below an EROFS mount of a worker that died: eviction unlinks, it never shortens."""
    path = tmp_path / "cache"
    fill(path, DIGESTS[:1])
    with next((path / "v1" / DIGESTS[0].hex).glob("data.*")).open("rb") as held:
        evict_all(path)
        assert not files_left(path)
        assert held.read() == b"".join(chunk(DIGESTS[0], index) for index in range(COUNT))


# --- leftovers --------------------------------------------------------------------------------------------------------


def test_leftovers_of_crashes_are_found_and_other_files_left_alone(tmp_path):
    path = tmp_path / "cache"
    fill(path, DIGESTS)
    half = path / "evicted" / f"{DIGESTS[0].hex}.0011223344556677"
    half.mkdir()
    (half / "data.0011223344556677").write_bytes(b"z" * 8192)
    stale = path / "images" / f"{IMAGE.hex}.999999999.tmp"
    stale.write_bytes(b"z" * 8192)
    own = path / "images" / f"{IMAGE.hex}.{os.getpid()}.tmp"
    own.write_bytes(b"being written")
    strange = path / "v1" / "notes.txt"
    strange.write_text("of somebody")
    assert inventory.take(path).leftover_use.size_bytes >= 16384
    answer = evict_unserved(path, Request(Limits()))
    assert (answer["device_count"], answer["image_count"]) == (0, 0)
    assert answer["freed_bytes"] >= 16384
    assert not half.exists()
    assert not stale.exists()
    assert own.exists()
    assert strange.exists()
    assert whole_or_nothing(path, BOOT) == [True] * 3


def test_an_image_whose_devices_are_gone_goes_too(tmp_path):
    path = tmp_path / "cache"
    fill(path, DIGESTS)
    quota = inventory.take(path).use.size_bytes - 1
    answer = evict_unserved(path, Request(Limits(quota)))
    assert answer["devices"] == [DIGESTS[0].text], "the one used first"
    assert answer["image_count"] == 0
    answer = evict_unserved(path, Request(Limits(1)))
    assert (answer["device_count"], answer["image_count"]) == (2, 1)
    assert not files_left(path)


def test_a_dry_run_changes_nothing(tmp_path):
    path = tmp_path / "cache"
    fill(path, DIGESTS)
    before = files_left(path)
    answer = evict_unserved(path, Request(everything=True, dry_run=True))
    assert (answer["device_count"], answer["image_count"]) == (3, 1)
    assert answer["freed_bytes"] >= 3 * COUNT * CHUNK
    assert files_left(path) == before


# --- limits -----------------------------------------------------------------------------------------------------------


@needs_mounts
@pytest.mark.mount
def test_the_floor_is_left_to_others_and_eviction_makes_room_below_it(mounts):
    disk = mounts("-t", "tmpfs", "-o", "size=4m", "tmpfs", name="small")
    floor = Limits(floor=Amount(bytes=2 << 20))
    with CacheDir.open(disk / "cache") as cache:
        cache.space.limits = floor
        asked: list[float] = []
        cache.space.on_short = lambda: asked.append(time.monotonic())
        old, new = open_device(cache, DIGESTS[0], 64), open_device(cache, DIGESTS[1], 64)
        stored = [index for index in range(64) if old.write(index, chunk(DIGESTS[0], index))]
        assert 10 < len(stored) < 40
        assert asked, "somebody wants to know"
        assert (2 << 20) <= Disk.of(disk).free_bytes < (2 << 20) + 2 * CHUNK
        assert not new.write(0, chunk(DIGESTS[1], 0)), "served without being kept"
        old.release()
        found = inventory.take(cache.path)
        plan = choose(*found.candidates(cache.in_use(), ()), wanted=1)
        assert evict.take_away(cache, plan) == (DIGESTS[0].hex,)
        evict.clean(cache.path)
        assert new.write(0, chunk(DIGESTS[1], 0))
        assert new.read(0, CHUNK) == chunk(DIGESTS[1], 0)
        new.release()


@needs_mounts
@pytest.mark.mount
def test_a_full_disk_asks_for_room_and_what_is_evicted_makes_it(mounts):
    disk = mounts("-o", "loop", ext4(mounts("-t", "tmpfs", "tmpfs", name="below") / "image", 8 << 20), name="disk")
    with CacheDir.open(disk / "cache") as cache:
        asked: list[int] = []
        cache.space.on_short = lambda: asked.append(1)
        old, new = open_device(cache, DIGESTS[0], 512), open_device(cache, DIGESTS[1], 512)
        for index in range(512):
            if not old.write(index, chunk(DIGESTS[0], index)):
                break
        assert asked
        assert not new.write(0, chunk(DIGESTS[1], 0))
        old.release()
        plan = choose(*inventory.take(cache.path).candidates(cache.in_use(), ()), wanted=1)
        assert evict.take_away(cache, plan) == (DIGESTS[0].hex,)    # needs no space itself
        evict.clean(cache.path)
        assert new.write(0, chunk(DIGESTS[1], 0))
        assert new.checkpoint()
        new.release()


@needs_mounts
@pytest.mark.mount
def test_a_disk_that_fails_is_one_clear_error_and_loses_nothing(mounts, tmp_path):
    image = ext4(tmp_path / "image", 16 << 20)
    disk = mounts("-o", "loop", image, name="disk")
    fill(disk / "cache", DIGESTS)
    with CacheDir.open(disk / "cache") as cache:
        plan = choose_all(*inventory.take(cache.path).candidates((), ()))
        cut_power(disk)    # from now on all is EIO
        with pytest.raises(CacheError, match="evict a device"):
            evict.take_away(cache, plan)
        with pytest.raises(CacheError, match="remove an image's files"):
            evict.take_away_images(cache.path, plan.images)
    umount(disk)
    wait_detached(image)
    run("mount", "-o", "loop", image, disk)
    assert whole_or_nothing(disk / "cache", LATER_BOOT) == [True] * 3


def test_the_estimate_of_what_is_used_follows_the_writes(tmp_path):
    with CacheDir.open(tmp_path / "cache") as cache:
        cached = open_device(cache, DIGESTS[0])
        cache.space.limits = Limits(2 * CHUNK)
        assert [cached.write(index, chunk(DIGESTS[0], index)) for index in range(4)] == [True, True, False, False]
        assert cache.space.used_bytes == 2 * CHUNK
        assert cached.counters.store_errors == 2
        cached.release()
