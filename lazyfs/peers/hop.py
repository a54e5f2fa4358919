"""
Whether a piece is compressed for the hop, and the compressing: LZ4, when the time that it saves is more than it costs.

Layer: peers. Who calls: peers.server. State: what is known of each resource (how well its pieces compress), of this
machine (how quickly it does) and of this process (how busy it is). The costs are compared for each piece:

    raw:        size / rate of the connection
    compressed: size / rate of compressing + what is left of it / rate of the connection + the receiver's part

What does not compress is tried again now and then, on a sample, for a device has parts of several kinds.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

import lz4.block
import trio

from lazyfs import limits
from lazyfs.peers.wire import Encoding

if TYPE_CHECKING:
    from lazyfs.peers.model import FileRange

_RATIO_WORTH = 0.9               # above it is as good as incompressible
_GAIN_WORTH = 0.9                # compressed must take less than this part of the raw time
_SAMPLE_BYTES = 64 * limits.KIB
_SAMPLE_EVERY = 16               # pieces of a resource that did not compress
_KEPT = 256                      # resources
_DECOMPRESS_BYTES_S = 1.5e9      # the receiver's part: what a core of 2020 does
_COMPRESS_BYTES_S = 4e8          # until it was measured here
_BUSY_SHARE = 0.7                # of one core: with more, this process has better things to do
_LOOK_S = 0.5                    # between two looks at the process' time
_NEW_WEIGHT = 0.25               # of the newest in a mean


class _Known:
    """Of one resource. `ratio` of its pieces of late, 0.0: none was tried."""

    __slots__ = ("ratio", "skipped")

    def __init__(self) -> None:
        self.ratio = 0.0
        self.skipped = 0


class Hop:
    """
    Decides, and compresses in a thread.

    :busy_share: of one core, of this process: above it nothing is compressed; 0 turns compression off.
    """

    def __init__(self, busy_share: float = _BUSY_SHARE) -> None:
        self._busy_share = busy_share
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._compress_bytes_s = _COMPRESS_BYTES_S
        self._looked: tuple[float, float] | None = None
        self._share = 0.0

    async def encode(self, key: str, data: bytes | memoryview | FileRange, size: int,
                     rate: float) -> tuple[Encoding, bytes | memoryview | FileRange, int]:
        """
        How a piece goes: encoding, bytes, their number.

        Args:
            key: of its resource.
            data: of the piece.
            size: of it, bytes.
            rate: what its connection takes, bytes/s; 0: nobody knows yet.

        """
        if not self._busy_share or not rate or not self._pays_at_best(size, rate) or self._is_busy():
            return Encoding.RAW, data, size
        known = self._of(key)
        if known.ratio > _RATIO_WORTH:
            known.skipped += 1
            if known.skipped % _SAMPLE_EVERY:
                return Encoding.RAW, data, size
            known.ratio = await trio.to_thread.run_sync(_sampled_ratio, data, size)
        if known.ratio and not self._pays(size, rate, known.ratio):
            return Encoding.RAW, data, size
        if not known.ratio:
            known.ratio = await trio.to_thread.run_sync(_sampled_ratio, data, size)
            if not self._pays(size, rate, known.ratio):
                return Encoding.RAW, data, size
        packed, took_s = await trio.to_thread.run_sync(_compress, data, size)
        if took_s > 0:
            self._compress_bytes_s += _NEW_WEIGHT * (size / took_s - self._compress_bytes_s)
        known.ratio += _NEW_WEIGHT * (len(packed) / size - known.ratio)
        if not 0 < len(packed) < size * _RATIO_WORTH:
            return Encoding.RAW, data, size
        return Encoding.LZ4, packed, len(packed)

    def _of(self, key: str) -> _Known:
        known = self._known.setdefault(key, _Known())
        self._known.move_to_end(key)
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return known

    def _pays_at_best(self, size: int, rate: float) -> bool:
        return self._pays(size, rate, 0.1)

    def _pays(self, size: int, rate: float, ratio: float) -> bool:
        raw_s = size / rate
        packed_s = size / self._compress_bytes_s + ratio * raw_s + size / _DECOMPRESS_BYTES_S
        return ratio <= _RATIO_WORTH and packed_s < raw_s * _GAIN_WORTH

    def _is_busy(self) -> bool:
        """Whether this process has used more than its share of a core of late."""
        now, used = time.monotonic(), time.process_time()
        if self._looked is None:
            self._looked = now, used
        elif now - self._looked[0] >= _LOOK_S:
            self._share = (used - self._looked[1]) / (now - self._looked[0])
            self._looked = now, used
        return self._share > self._busy_share


def _bytes_of(data: bytes | memoryview | FileRange, start: int, size: int) -> bytes | memoryview:
    if isinstance(data, (bytes, memoryview)):
        return memoryview(data)[start:start + size]
    return os.pread(data.file, size, data.offset + start)


def _sampled_ratio(data: bytes | memoryview | FileRange, size: int) -> float:
    """Of a part in the middle; 1.0: it cannot be read, which whoever sends it finds out."""
    sample = min(size, _SAMPLE_BYTES)
    try:
        part = _bytes_of(data, (size - sample) // 2, sample)
    except OSError:
        return 1.0
    return min(len(lz4.block.compress(part, store_size=False)) / max(len(part), 1), 1.0)


def _compress(data: bytes | memoryview | FileRange, size: int) -> tuple[bytes, float]:
    """The piece compressed, and the CPU seconds it took; empty: it cannot be read."""
    try:
        part = _bytes_of(data, 0, size)
    except OSError:
        return b"", 0.0
    if len(part) != size:
        return b"", 0.0
    began = time.thread_time()
    return lz4.block.compress(part, store_size=False), time.thread_time() - began
