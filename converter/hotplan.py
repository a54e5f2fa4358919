"""
What a hot device is made of: from the byte ranges that a start wants to hot extents.

A range is rounded out to blocks; each block counts once, where it is first wanted; blocks of a chunk of zeros need no
place, for they are served without any data. So many blocks as a hot chunk holds are put in the order of their places:
the chunk comes as a whole anyway, and long extents make a small map and few calls that read ahead.

Layer: converter, pure. Who calls: converter.hot.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lazyfs import limits
from lazyfs.errors import UsageError
from lazyfs.image.codec import Codec
from lazyfs.image.hot import EXTENT, Extents

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lazyfs.image.table import ChunkTable

_BLOCK = limits.BLOCK_SIZE_BYTES
_BLOCKS_MAX = limits.HOT_BYTES_MAX // _BLOCK
_WINDOW_BLOCKS = 1 << 16     # looked at in one go: 256 MiB of a device in 64 KiB
_DEVICE_SHIFT = 32           # a key: device, block
Keys = npt.NDArray[np.int64]


def plan_hot(extents: Iterable[tuple[int, int, int]], tables: Sequence[ChunkTable], chunk_size: int) -> Extents:
    """
    Put blocks into the order of a hot device.

    Args:
        extents: (device index, offset, length) in bytes, in the order in which they are wanted; may overlap.
        tables: the chunk table of each layer device.
        chunk_size: of the hot device, bytes.

    Raises:
        UsageError: more than a hot device may hold.

    """
    fresh = _Fresh(tables)
    found = bytearray()      # of int64: a list may name each block in a range of its own
    for device, offset, length in extents:
        for keys in fresh.take(device, offset // _BLOCK, -(-(offset + length) // _BLOCK)):
            found += keys.tobytes()
            if len(found) > _BLOCKS_MAX * keys.itemsize:
                raise UsageError(f"the prefetch list names more than {limits.HOT_BYTES_MAX} bytes of this image",
                                 hint="name what a start reads only, by ranges of large files")
    return _lay_out(np.frombuffer(found, np.int64), chunk_size // _BLOCK)


class _Fresh:
    """Which blocks were not wanted before: a byte a block of the devices that are asked for, zero pages till set."""

    def __init__(self, tables: Sequence[ChunkTable]) -> None:
        self._tables = tables
        self._taken: dict[int, mmap.mmap] = {}

    def take(self, device: int, first: int, end: int) -> Iterator[Keys]:
        """Keys of blocks [first, end) that are wanted for the first time and hold something."""
        table = self._tables[device]
        if device not in self._taken:
            self._taken[device] = mmap.mmap(-1, table.device_size // _BLOCK)
        taken = self._taken[device]
        first = taken.find(b"\0", first, end)       # a list may name the same a million times: that must be cheap
        if first < 0:
            return
        blocks_a_chunk = table.chunk_size // _BLOCK
        marks = np.frombuffer(taken, np.uint8)
        for start in range(first, end, _WINDOW_BLOCKS):
            stop = min(start + _WINDOW_BLOCKS, end)
            blocks = np.flatnonzero(marks[start:stop] == 0) + start
            taken[start:stop] = b"\1" * (stop - start)
            blocks = blocks[table.rows["codec"][blocks // blocks_a_chunk] != Codec.ZERO]
            if len(blocks):
                yield blocks + (device << _DEVICE_SHIFT)


def _lay_out(keys: Keys, blocks_a_chunk: int) -> Extents:
    """Sort within each hot chunk, and merge neighbours; an extent lies in one hot chunk."""
    chunks = np.arange(len(keys)) // blocks_a_chunk
    keys = keys[np.lexsort((keys, chunks))]
    starts = np.flatnonzero(np.concatenate(([True], (np.diff(keys) != 1) | (np.diff(chunks) != 0))) [: len(keys)])
    extents = np.empty(len(starts), dtype=EXTENT)
    extents["first"] = keys[starts] & ((1 << _DEVICE_SHIFT) - 1)
    extents["device"] = keys[starts] >> _DEVICE_SHIFT
    extents["count"] = np.diff(np.append(starts, len(keys)))
    return extents
