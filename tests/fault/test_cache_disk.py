"""
The chunk cache on disks that are full, that fail, and that lose what was not synced. Real file systems throughout.

Full: a small tmpfs. fsync that fails: ext4 on a loop file on a tmpfs too small for it. Power cut: ext4 on a loop file,
shut down by ioctl without flushing its log (as xfstests do), at every system call that the cache makes in turn.
"""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from lazyfs.cache import device as device_module
from lazyfs.cache import files
from lazyfs.cache.store import CachedDevice, CacheDir
from lazyfs.fetch.engine import Fetcher, FetchLimits
from lazyfs.image.codec import Codec
from lazyfs.image.digest import Digest
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
from tests.fetchkit import MemorySource, make_sample

if TYPE_CHECKING:
    from pathlib import Path

CHUNK = 64 * 1024
DIGEST = Digest.of(b"disk")
BOOT, LATER_BOOT = b"a" * 16, b"b" * 16



def chunk(index: int) -> bytes:
    return random.Random(index).randbytes(CHUNK)


def present(cached: CachedDevice) -> set[int]:
    """Which chunks are there; they must be right."""
    found = {index for index in range(cached.chunk_count) if cached.present(index, index)}
    for index in found:
        assert cached.read_if_present(index * CHUNK, CHUNK) == chunk(index)
    return found


# --- full -------------------------------------------------------------------------------------------------------------


@needs_mounts
@pytest.mark.mount
def test_a_full_disk_refuses_chunks_and_recovers(mounts):
    disk = mounts("-t", "tmpfs", "-o", "size=2m", "tmpfs", name="small")
    with CacheDir.open(disk / "cache") as cache:
        cached = cache.device(DIGEST, CHUNK, 64 * CHUNK)
        (disk / "filler").write_bytes(bytes(1024 * 1024))
        stored = {index for index in range(64) if cached.write(index, chunk(index))}
        assert 8 <= len(stored) < 20
        assert present(cached) == stored
        assert cached.counters.store_errors == 64 - len(stored)
        cached.checkpoint()    # may or may not find the space; must not raise
        (disk / "filler").unlink()
        assert cached.write(40, chunk(40))
        assert cached.checkpoint()
        assert present(cached) == stored | {40}
        cached.release()


@needs_mounts
@pytest.mark.mount
@pytest.mark.trio
async def test_reads_through_a_full_disk_are_right(mounts):
    disk = mounts("-t", "tmpfs", "-o", "size=1m", "tmpfs", name="small")
    sample = make_sample(64, seed=2, codec=Codec.NONE)
    source = MemorySource({sample.blob: sample.stored})
    with CacheDir.open(disk / "cache") as cache:
        device = sample.device(cache, source)
        async with Fetcher(FetchLimits()) as fetcher:
            for offset in range(0, len(sample.data), 96 * 1024):
                size = min(128 * 1024, len(sample.data) - offset)
                data = await fetcher.read(device, offset, size, deadline=time.monotonic() + 20)
                assert data == sample.data[offset : offset + size]
            await fetcher.prefetch([(device, index) for index in range(64)]).wait()
        assert fetcher.statistics.not_stored > 40
        assert fetcher.statistics.errors == 0
        device.cached.release()


@needs_mounts
@pytest.mark.mount
def test_a_failed_fsync_drops_the_data(mounts, tmp_path):
    """ext4 takes the writes, its disk does not; the pages are clean after the failed fsync and may vanish."""
    below = mounts("-t", "tmpfs", "-o", "size=12m", "tmpfs", name="below")
    disk = mounts("-o", "loop", ext4(below / "image", 64 * 1024 * 1024), name="disk")
    with CacheDir.open(disk / "cache", boot_id=BOOT) as cache:
        cached = cache.device(DIGEST, CHUNK, 512 * CHUNK)
        first_path = cached.data_path
        for index in range(400):
            cached.write(index, chunk(index))
        assert not cached.checkpoint()
        assert cached.counters.drops == 1
        assert present(cached) == set()
        assert cached.data_path != first_path or not cached.write(0, chunk(0))
        cached.release()
    with contextlib.suppress(Exception), CacheDir.open(disk / "cache", boot_id=BOOT) as cache:
        cached = cache.device(DIGEST, CHUNK, 512 * CHUNK)
        assert present(cached) <= {0}
        cached.release()


# --- power cut --------------------------------------------------------------------------------------------------------


def work(cache_path: Path, durable: set[int]) -> None:
    """Some chunks, a checkpoint, more chunks, a checkpoint, more chunks. `durable`: what must survive."""
    cache = CacheDir.open(cache_path, boot_id=BOOT)
    cached = None
    try:
        cached = cache.device(DIGEST, CHUNK, 16 * CHUNK)
        for begin in (0, 4, 8):
            for index in range(begin, begin + 4):
                cached.write(index, chunk(index))
            if begin < 8 and cached.checkpoint():
                durable.update(range(begin + 4))
    finally:
        if cached is not None:
            cached.release()
        cache.close()


@needs_mounts
@pytest.mark.mount
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_power_cut_at_any_call_leaves_right_chunks_and_every_durable_one(mounts, tmp_path, monkeypatch, kind):
    finished = False
    template = ext4(tmp_path / "template", 16 * 1024 * 1024) if kind == "ext4" else xfs(tmp_path / "template")
    options = "loop" if kind == "ext4" else "loop,nouuid"    # copies of one file system
    for calls in range(80):
        image = tmp_path / f"image{calls}"
        run("cp", "--sparse=always", template, image)
        disk = mounts("-o", options, image, name=f"disk{calls}")
        durable: set[int] = set()
        cutting = CuttingOs(calls)
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", cutting)
            patch.setattr(device_module, "os", cutting)
            try:
                work(disk / "cache", durable)
                finished = True
            except PowerCutError:
                pass
        cut_power(disk)
        umount(disk)
        wait_detached(image)
        run("mount", "-o", options, image, disk)
        with contextlib.ExitStack() as stack:
            stack.callback(umount, disk)
            cache = stack.enter_context(CacheDir.open(disk / "cache", boot_id=LATER_BOOT))
            cached = cache.device(DIGEST, CHUNK, 16 * CHUNK)
            stack.callback(cached.release)
            found = present(cached)
            assert durable <= found <= set(range(8)), (calls, durable, found)
            assert cached.write(15, chunk(15))
            assert cached.checkpoint()
        if finished:
            assert durable == set(range(8))
            return
        image.unlink()
    raise AssertionError("the work made more calls than expected")


# --- kill -------------------------------------------------------------------------------------------------------------

WRITER = """
import pathlib, random, sys
from lazyfs.cache.store import CacheDir
from lazyfs.image.digest import Digest
cache = CacheDir.open(pathlib.Path(sys.argv[1]))
cached = cache.device(Digest.of(b"disk"), 65536, 2000 * 65536)
order = list(range(2000))
random.Random(int(sys.argv[2])).shuffle(order)
for number, index in enumerate(order):
    if not cached.present(index, index):
        assert cached.write(index, random.Random(index).randbytes(65536))
    print(index, flush=True)
    if number % 50 == 49:
        cached.checkpoint()
"""


def test_a_killed_worker_loses_nothing_that_it_wrote(tmp_path):
    written: set[int] = set()
    for attempt in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path / "cache", str(attempt)], stdout=subprocess.PIPE, text=True
        )
        with child:
            assert child.stdout is not None
            for count, line in enumerate(child.stdout):
                written.add(int(line))
                if count == 60 + attempt * 37:
                    child.send_signal(signal.SIGKILL)
                    break
            written |= {int(line) for line in child.stdout if line.endswith("\n")}
        with CacheDir.open(tmp_path / "cache") as cache:
            cached = cache.device(DIGEST, CHUNK, 2000 * CHUNK)
            found = present(cached)
            assert written <= found
            assert len(found) <= len(written) + 1    # written, and killed before it could say so
            cached.release()
        written = found
