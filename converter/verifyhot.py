"""
Are the blocks of the hot device those of the layers? Told from digests of blocks, so that neither need be kept.

The hot blob's chunks come first and leave a digest of each block; the layers' chunks, as they are decoded, are compared
with them. What could not be decoded is a difference already, and nothing is said about it here. Memory: 17 bytes for
each hot block (at most two million), and 50 for each extent.

Layer: converter, no I/O. Who calls: converter.verify. Threads: take() and compare() of different chunks may run side by
side, but all of take() before any of compare().
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blake3 import blake3

from lazyfs import limits
from lazyfs.image.codec import Codec
from lazyfs.image.hot import hot_starts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lazyfs.image.hot import HotPart
    from lazyfs.image.table import ChunkTable

_BLOCK = limits.BLOCK_SIZE_BYTES
_SUM_BYTES = 16
_Piece = tuple[int, int, int]    # first block in the chunk, first block in the hot device, count


class HotSums:
    """Digests of the hot device's blocks, and which chunks of the layers hold the same blocks."""

    def __init__(self, part: HotPart, tables: Sequence[ChunkTable]) -> None:
        count = part.table.device_size // _BLOCK
        self._sums = bytearray(count * _SUM_BYTES)
        self._known = bytearray(count)
        self._blocks_a_chunk = part.table.chunk_size // _BLOCK
        self._hot_chunks: dict[bytes, list[int]] = {}
        for index, row in enumerate(part.table.rows):
            if row["codec"] == Codec.ZERO:
                self._take_at(index, bytes(part.table.chunk_bytes(index)))
            self._hot_chunks.setdefault(bytes(row["digest"]), []).append(index)
        # By digest of the chunk: that is what it holds, wherever it is stored and in however many devices.
        self._pieces: dict[bytes, list[_Piece]] = {}
        self._zeros: list[_Piece] = []
        for device, chunk, piece in _pieces(part, tables):
            row = tables[device].rows[chunk]
            zero = row["codec"] == Codec.ZERO
            (self._zeros if zero else self._pieces.setdefault(bytes(row["digest"]), [])).append(piece)

    def take(self, digest: bytes, data: bytes | memoryview) -> None:
        """A chunk of the hot device, decoded and checked."""
        for index in self._hot_chunks.get(digest, ()):
            self._take_at(index, data)

    def compare(self, digest: bytes, data: bytes | memoryview) -> int:
        """How many hot blocks are not those of this chunk of a layer, decoded and checked. Equal chunks count once."""
        return self._compare(self._pieces.pop(digest, ()), data)

    def compare_zeros(self) -> int:
        """How many hot blocks are not zero though their layer's chunk is (which is stored nowhere)."""
        zeros = bytes(limits.CHUNK_SIZE_MAX_BYTES)
        return self._compare(self._zeros, zeros)

    def _take_at(self, index: int, data: bytes | memoryview) -> None:
        first = index * self._blocks_a_chunk
        for number in range(len(data) // _BLOCK):
            at = (first + number) * _SUM_BYTES
            self._sums[at : at + _SUM_BYTES] = _sum(data, number)
            self._known[first + number] = 1

    def _compare(self, pieces: Sequence[_Piece], data: bytes | memoryview) -> int:
        wrong = 0
        for first, hot, count in pieces:
            for number in range(count):
                at = (hot + number) * _SUM_BYTES
                same = self._sums[at : at + _SUM_BYTES] == _sum(data, first + number)
                wrong += self._known[hot + number] and not same
        return wrong


def _sum(data: bytes | memoryview, block: int) -> bytes:
    return blake3(memoryview(data)[block * _BLOCK : (block + 1) * _BLOCK]).digest(_SUM_BYTES)


def _pieces(part: HotPart, tables: Sequence[ChunkTable]) -> Iterator[tuple[int, int, _Piece]]:
    """(device, chunk, piece) of all hot extents, cut where chunks of the layers end."""
    starts = hot_starts(part.extents)
    for at in range(len(part.extents)):
        first, device, count = part.extents[at].tolist()
        hot, blocks_a_chunk = int(starts[at]), tables[device].chunk_size // _BLOCK
        while count:
            chunk, within = divmod(first, blocks_a_chunk)
            length = min(count, blocks_a_chunk - within)
            yield device, chunk, (within, hot, length)
            first, hot, count = first + length, hot + length, count - length
