"""
A cache on a disk that takes nothing: read-only, or shut down. What is there is served from there, what is not from
memory; when the disk takes writes again, they are made. (Full disks: test_cache_disk.py; EDQUOT, which root does not
get: tests/unit/test_cache_health.py.)
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import pytest

from lazyfs.cache import health
from lazyfs.cache.store import CacheDir
from lazyfs.fetch.engine import Fetcher, FetchLimits
from lazyfs.image.codec import Codec
from tests.diskkit import cut_power, ext4, needs_mounts, run, umount, wait_detached
from tests.fetchkit import CHUNK, MemorySource, make_sample

if TYPE_CHECKING:
    from pathlib import Path

    from lazyfs.fetch.device import FetchDevice
    from tests.diskkit import Mounts
    from tests.fetchkit import Sample

pytestmark = [needs_mounts, pytest.mark.mount]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each recovery takes seconds."""
    monkeypatch.setattr(health, "WRITE_PAUSE_FIRST_S", 0.05)
    monkeypatch.setattr(health, "WRITE_PAUSE_MAX_S", 0.1)


def remount(disk: Path, how: str) -> None:
    run("mount", "-o", f"remount,{how}", disk)


async def read_all(fetcher: Fetcher, device: FetchDevice, sample: Sample) -> None:
    for offset in range(0, len(sample.data), 40 * 1024):
        size = min(40 * 1024, len(sample.data) - offset)
        data = await fetcher.read(device, offset, size, deadline=time.monotonic() + 30)
        assert data == sample.data[offset : offset + size]


async def read_until_complete(device: FetchDevice, sample: Sample) -> None:
    """By another fetcher each time: what one has in memory it need not store."""
    deadline = time.monotonic() + 30
    while not device.cached.complete:
        assert time.monotonic() < deadline
        async with Fetcher(FetchLimits()) as fetcher:
            await read_all(fetcher, device, sample)


@pytest.mark.trio
async def test_opened_on_a_read_only_disk_what_is_there_is_read_and_the_rest_is_served_from_memory(mounts, tmp_path):
    disk = mounts("-o", "loop", ext4(tmp_path / "image", 64 << 20), name="disk")
    kept, fresh = make_sample(16, seed=1, codec=Codec.NONE), make_sample(16, seed=2, codec=Codec.NONE)
    source = MemorySource({kept.blob: kept.stored, fresh.blob: fresh.stored})
    with CacheDir.open(disk / "cache") as cache:
        device = kept.device(cache, source)
        for index in range(8):
            assert device.cached.write(index, kept.chunk(index))
        device.cached.release()
    remount(disk, "ro")
    with CacheDir.open(disk / "cache") as cache:    # as a worker that takes over
        devices = [sample.device(cache, source) for sample in (kept, fresh)]
        assert devices[0].cached.present_count == 8
        async with Fetcher(FetchLimits()) as fetcher:
            for device, sample in zip(devices, (kept, fresh), strict=True):
                await read_all(fetcher, device, sample)
            assert [device.cached.present_count for device in devices] == [8, 0]
            assert not any(device.cached.make_durable() for device in devices)
            (trouble,) = cache.health.describe()["trouble"]
            assert trouble["why"] == "Read-only file system"
            assert fetcher.statistics.errors == 0
        remount(disk, "rw")
        for device, sample in zip(devices, (kept, fresh), strict=True):
            await read_until_complete(device, sample)
        assert all(device.cached.make_durable() for device in devices)
        assert cache.health.describe()["trouble"] == []
        for device in devices:
            device.cached.release()
    asked = len(source.requests)
    with CacheDir.open(disk / "cache") as cache:
        devices = [sample.device(cache, source) for sample in (kept, fresh)]
        async with Fetcher(FetchLimits()) as fetcher:
            for device, sample in zip(devices, (kept, fresh), strict=True):
                await read_all(fetcher, device, sample)
        for device in devices:
            device.cached.release()
    assert len(source.requests) == asked, "all of it was kept"


@pytest.mark.trio
async def test_a_disk_that_dies_under_the_cache_ends_no_read(mounts: Mounts, tmp_path: Path) -> None:
    """ext4 shut down: each call of the cache is EIO from then on, also its reads."""
    image = ext4(tmp_path / "image", 64 << 20)
    disk = mounts("-o", "loop", image, name="disk")
    sample = make_sample(24, seed=3, codec=Codec.NONE)
    source = MemorySource({sample.blob: sample.stored})
    with CacheDir.open(disk / "cache") as cache:
        device = sample.device(cache, source)
        async with Fetcher(FetchLimits()) as fetcher:
            for index in range(8):
                await fetcher.read(device, index * CHUNK, CHUNK, deadline=time.monotonic() + 30)
            cut_power(disk)
            for _ in range(2):
                await read_all(fetcher, device, sample)
            cache.checkpoint()
            assert fetcher.statistics.errors == 0
            assert cache.health.describe()["trouble"], "it is said why"
        device.cached.release()
    umount(disk)
    wait_detached(image)
    run("mount", "-o", "loop", image, disk)
    with contextlib.ExitStack() as stack:
        stack.callback(umount, disk)
        cache = stack.enter_context(CacheDir.open(disk / "cache"))
        device = sample.device(cache, source)
        stack.callback(device.cached.release)
        await read_until_complete(device, sample)
