"""
A power cut in the middle of a full copy: how much has to be fetched again.

    landed, lost = lost_by_power_cut(tmp_path)

The copy is the worker's own (node.copyrun) over a cache directory on a file system in a file, whose shutdown ioctl
throws away what is not on the disk, as a machine does that loses power. The next boot is another boot id.
"""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING

import numpy as np
import trio

from lazyfs.cache.store import CacheDir
from lazyfs.fetch.engine import CopyTerms, Fetcher, FetchLimits
from lazyfs.image.codec import Codec
from lazyfs.image.digest import Digest, chunk_digest
from lazyfs.image.table import ROW, parse_table
from lazyfs.node.copyplan import Share
from lazyfs.node.copyrun import CopyRun
from tests.diskkit import cut_power, ext4, mounted_disks, umount, wait_detached
from tests.fetchkit import BOOT, MemorySource, Sample

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
CHUNK_COUNT = 192                # of 1 MiB, stored as they are
CUT_BYTES = 120 * MIB
NEXT_BOOT = bytes(16)
_COPY_S = 120.0
_DISK_BYTES = 400 * MIB


def sample_to_copy() -> Sample:
    """Random bytes: made in no time."""
    data = random.Random(6).randbytes(CHUNK_COUNT * MIB)
    rows = np.zeros(CHUNK_COUNT, dtype=ROW)
    for index in range(CHUNK_COUNT):
        rows[index] = (index * MIB, MIB, 0, Codec.NONE, 0, chunk_digest(data[index * MIB : (index + 1) * MIB]))
    return Sample(data, data, Digest.of(data), parse_table(rows.tobytes(), MIB, len(data), [len(data)]))


def lost_by_power_cut(folder: Path) -> tuple[int, int]:
    """Stored bytes that had landed when power was cut, and of these: that are not there at the next boot."""
    sample, image = sample_to_copy(), ext4(folder / "disk", _DISK_BYTES)
    with mounted_disks(folder) as mount:
        disk = mount("-o", "loop", image, name="mnt")
        landed = trio.run(_copy_until_cut, sample, disk)
        umount(disk)
        wait_detached(image)
        return landed, landed - _present_bytes(sample, mount("-o", "loop", image, name="mnt"))


def _present_bytes(sample: Sample, disk: Path) -> int:
    """Stored bytes that the cache has at the next boot, and has right."""
    with CacheDir.open(disk / "cache", boot_id=NEXT_BOOT) as cache:
        device = sample.device(cache, MemorySource({}))
        present = Share.of([device]).present_bytes
        for index in (index for index in range(CHUNK_COUNT) if device.cached.present(index, index)):
            assert device.cached.read(index * MIB, MIB) == sample.chunk(index), f"chunk {index} is wrong"
        device.cached.release()
    return present


async def _copy_until_cut(sample: Sample, disk: Path) -> int:
    source = MemorySource({sample.blob: sample.stored})
    landed = 0
    with CacheDir.open(disk / "cache", boot_id=BOOT) as cache:
        async with Fetcher(FetchLimits(readahead=False)) as fetcher:
            device = sample.device(cache, source)
            run = CopyRun(fetcher, [device], CopyTerms(quiet_s=0.0))
            with trio.fail_after(_COPY_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(run.run)
                    while landed < CUT_BYTES:
                        await trio.sleep(0.002)
                        landed = Share.of([device]).present_bytes
                    cut_power(disk)
                    landed = max(landed, Share.of([device]).present_bytes)
                    nursery.cancel_scope.cancel()
        with contextlib.suppress(OSError):
            device.cached.release()
    return landed
