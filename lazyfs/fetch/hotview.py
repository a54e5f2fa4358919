"""
A layer device's blocks in its image's hot device: where a read may be answered from before the layer's chunk is there.

Layer: fetch. Who calls: node.mounted makes one HotDevice a mounted image and one HotView a layer device; fetch.engine
and node.mounted read through them. Everything here runs on the loop, and decides; fetching is the engine's. Invariant:
a part of a read names bytes that are the same as the layer's, by the bootstrap's extents; nothing else is ever read.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lazyfs import limits
from lazyfs.image.hot import HotMap, hot_starts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from lazyfs.errors import LazyfsError
    from lazyfs.fetch.device import FetchDevice
    from lazyfs.image.hot import Extents

    Part = tuple["FetchDevice", int, int]    # which device, offset, bytes

# After a failure of the hot blob its chunks are not asked for by reads; the layers' are there. A blob that is gone
# then costs a round trip every so often, one that hangs the HOT_DEADLINE_SHARE of one read's time.
HOT_PAUSE_S = 30.0
HOT_DEADLINE_SHARE = 0.5         # of a read's time may go into the hot blob; the rest is for the layer's chunk
_BLOCK_BYTES = limits.BLOCK_SIZE_BYTES
_BLOCK_SHIFT = _BLOCK_BYTES.bit_length() - 1
_log = logging.getLogger(__name__)


class HotDevice:
    """
    The hot device of one mounted image.

    State: when it may be asked again after a failure, and whether that was said.

    :read_count: reads of the layer devices, but for those of thread `warmer_id` (node.warming).
    """

    def __init__(self, device: FetchDevice, extents: Extents, clock: Callable[[], float] = time.monotonic) -> None:
        self.device = device
        self.extents = extents
        self.map = HotMap(extents)
        self._clock = clock
        self._asked_again_at = 0.0
        self._said = False
        self.read_count = 0
        self.warmer_id = 0

    def count_read(self, pid: int) -> None:
        """A read of a layer device, by a thread; 0: one that was counted already."""
        if pid and pid != self.warmer_id:
            self.read_count += 1

    @property
    def failing(self) -> bool:
        """Whether its blob failed lately, so that the layers' chunks are fetched instead."""
        return self._clock() < self._asked_again_at

    def failed(self, error: LazyfsError) -> None:
        """A read of it ended with `error`."""
        self._asked_again_at = self._clock() + HOT_PAUSE_S
        if not self._said:
            self._said = True
            _log.warning("the hot part cannot be had (%s); the layers' own blobs are read instead", error)

    def present(self, offset: int, size: int) -> bool:
        """Whether all chunks of this range are in the cache."""
        shift = self.device.shift
        return self.device.cached.present(offset >> shift, (offset + size - 1) >> shift)

    def wanted_chunks(self, devices: Sequence[FetchDevice]) -> list[int]:
        """
        Its chunks in order, without those whose blocks are all in chunks of `devices` (the layers') that are present.

        A second image with the same base, a second mount: what a start wants is there, in another place.
        """
        count = self.device.table.chunk_count
        if not count:
            return []
        starts = hot_starts(self.extents)
        change = np.zeros(count + 1, dtype=np.int64)    # how many absent runs begin in a chunk, or ended before it
        shift = self.device.shift - _BLOCK_SHIFT
        for number, device in enumerate(devices):
            mine = self.extents["device"] == number
            absent = _absent(self.extents[mine], device)
            begin = starts[mine][absent.extent] + absent.begin
            np.add.at(change, begin >> shift, 1)
            np.add.at(change, ((begin + absent.length - 1) >> shift) + 1, -1)
        return [int(index) for index in np.flatnonzero(np.cumsum(change)[:-1] > 0)]


class _Runs(NamedTuple):
    """Runs of blocks of extents: number of the extent, first block within it, how many."""

    extent: NDArray[np.int64]
    begin: NDArray[np.int64]
    length: NDArray[np.int64]


def _absent(extents: Extents, device: FetchDevice) -> _Runs:
    """What of these extents of `device` is in chunks that are not present; a run a chunk."""
    shift = device.shift - _BLOCK_SHIFT
    present = np.frombuffer(device.cached.presence(), dtype=np.uint8)
    first = extents["first"].astype(np.int64)
    end = first + extents["count"]
    spans = ((end - 1) >> shift) - (first >> shift) + 1      # chunks that an extent touches
    extent = np.repeat(np.arange(len(extents)), spans)
    chunk = (first >> shift)[extent] + np.arange(len(extent)) - np.repeat(np.cumsum(spans) - spans, spans)
    is_absent = present[chunk] == 0
    extent, chunk = extent[is_absent], chunk[is_absent]
    begin = np.maximum(chunk << shift, first[extent])
    return _Runs(extent, begin - first[extent], np.minimum((chunk + 1) << shift, end[extent]) - begin)


class HotView:
    """Layer device `number` as its image's hot device sees it."""

    __slots__ = ("_number", "hot")

    def __init__(self, hot: HotDevice, number: int) -> None:
        self.hot = hot
        self._number = number

    def find(self, offset: int, size: int) -> list[tuple[int, int]] | None:
        """
        Where these bytes (> 0) of the layer device are in the hot device: (offset, bytes), in order.

        Returns None if one of them is not there.
        """
        first = offset >> _BLOCK_SHIFT
        blocks = self.hot.map.find(self._number, first, ((offset + size - 1) >> _BLOCK_SHIFT) - first + 1)
        if blocks is None:
            return None
        skipped = offset & (_BLOCK_BYTES - 1)
        found: list[tuple[int, int]] = []
        for block, count in blocks:
            length = min((count << _BLOCK_SHIFT) - skipped, size)
            found.append(((block << _BLOCK_SHIFT) + skipped, length))
            size -= length
            skipped = 0
        return found

    def read_now(self, offset: int, size: int) -> bytes | None:
        """These bytes out of the hot device's chunks, if all are there and have been counted as touched; else None."""
        places = self.find(offset, size)
        if places is None:
            return None
        device = self.hot.device
        parts: list[bytes] = []
        for start, length in places:
            if device.touched.find(0, start >> device.shift, ((start + length - 1) >> device.shift) + 1) >= 0:
                return None
            data = device.cached.read_if_present(start, length)
            if data is None:
                return None
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def parts(self, device: FetchDevice, offset: int, size: int) -> list[Part] | None:
        """
        A read of the layer device `device` as reads of its chunks that are present, and of the hot device.

        Returns None if a byte is in neither: then the layer's chunk is needed.
        """
        found: list[Part] = []
        end = offset + size
        while offset < end:
            index = offset >> device.shift
            present = device.cached.present(index, index)
            upto = min(end, (index + 1) << device.shift)
            while upto < end and device.cached.present(index + 1, index + 1) == present:
                index += 1
                upto = min(end, (index + 1) << device.shift)
            if present:
                found.append((device, offset, upto - offset))
            else:
                places = self.find(offset, upto - offset)
                if places is None:
                    return None
                found += [(self.hot.device, start, length) for start, length in places]
            offset = upto
        return found
