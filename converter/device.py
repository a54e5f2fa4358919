"""
Lays the files of one layer out in its device: in archive order, at 4096-byte boundaries, equal content once.

Archive order keeps small files that belong together in one chunk. Content is found again by BLAKE3: of files up to
SMALL_FILE_BYTES always, as they are in memory anyway; of larger ones when size and head were seen before, then by
way of a temporary file, so that memory stays bounded, and the earlier one is read back to be compared (rare; hashing
each large file beforehand took 3 % of a conversion). Nothing here depends on threads or time: same layer, same device.

Who calls: converter.layer. Layer: converter. A sparse file's cost: see choose_unit_shift().
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from blake3 import blake3

from converter.pool import RUN_BYTES
from lazyfs import limits
from lazyfs.errors import FormatError
from lazyfs.image.model import EMPTY_MAP, DataMap
from lazyfs.image.table import ROW_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy.typing as npt

BLOCK = limits.BLOCK_SIZE_BYTES
SMALL_FILE_BYTES = 2 * limits.MIB     # held in memory whole
HEAD_BYTES = 128 * limits.KIB         # tells most different large files of one size apart
PIECE_BYTES = 256 * limits.KIB         # how much of a large file is in memory at a time: stays in the CPU's cache
UNIT_SHIFT_MIN, UNIT_SHIFT_MAX = 12, 43   # EROFS: chunk bits 0..31 above the block's
_INDEX_BYTES = 8                      # EROFS chunk index entry of one unit
_ZEROS = bytes(2 * limits.CHUNK_SIZE_MAX_BYTES)
Segments = tuple[tuple[int, int], ...]


class Sink(Protocol):
    """Where a device's bytes go (converter.pool.BlobWriter)."""

    def take_buffer(self) -> bytearray: ...

    def add_run(self, buffer: bytearray, size: int) -> None: ...

    def add_zero_chunks(self, count: int) -> None: ...

    def read_back(self, offset: int, size: int) -> Iterator[bytes | memoryview]:
        """Bytes of the device that were added before."""
        ...


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a file's segments go, relative to its place in the device."""

    unit_shift: int
    unit_runs: tuple[tuple[int, int], ...]   # (first unit, unit count), sorted
    device_bytes: int                        # multiple of BLOCK


@dataclass(slots=True)
class _Large:
    """A large file that was laid out. `start`: where in the device (one without holes); `digest`: if it is known."""

    start: int
    data_map: DataMap
    digest: bytes | None


class DeviceWriter:
    """One layer's device, written front to back."""

    def __init__(self, sink: Sink, chunk_size: int, spool_dir: Path) -> None:
        self._sink = sink
        self._chunk_size = chunk_size
        self._spool_dir = spool_dir
        self._buffer = sink.take_buffer()
        self._view = memoryview(self._buffer)
        self._fill = 0
        self._small: dict[tuple[int, bytes, bytes], DataMap] = {}
        self._large: dict[tuple[int, bytes, bytes], list[_Large]] = {}
        self.size = 0                # bytes laid out so far
        self.shared_bytes = 0        # bytes of files found again

    def add_file(self, size: int, segments: Segments, read: Callable[[int], bytes]) -> DataMap:
        """
        Lay out one regular file.

        Args:
            size: of the file, holes included.
            segments: (offset, length) of its data, sorted, not overlapping, within size.
            read: gives the segments' bytes in order; exactly as many as asked, or raises.

        Raises:
            FormatError: the device would grow beyond its limit.

        """
        if size == 0:
            return EMPTY_MAP
        is_dense = segments == ((0, size),)
        if not is_dense:
            segments = tuple(segment for segment in segments if segment[1])   # old GNU: ends with an empty one
        stored = size if is_dense else sum(length for _, length in segments)
        if stored > SMALL_FILE_BYTES:
            return self._add_large(size, stored, segments, read)
        data = read(stored) if stored else b""
        key = (size, b"" if is_dense else _holes_key(size, segments), blake3(data).digest())
        known = self._small.get(key)
        if known is None:
            known = self._lay_out_small(data) if is_dense else self._lay_out(size, segments, iter((data,)))
            self._small[key] = known
        else:
            self.shared_bytes += stored
        return known

    def finish(self) -> int:
        """Hand over what is left; returns the device's size."""
        self._flush()
        return self.size

    def _add_large(self, size: int, stored: int, segments: Segments, read: Callable[[int], bytes]) -> DataMap:
        head = read(HEAD_BYTES)
        known = self._large.setdefault((size, _holes_key(size, segments), blake3(head).digest()), [])
        if not known:
            return self._add_first(known, size, segments, _pieces(head, stored, read))
        with tempfile.TemporaryFile(dir=self._spool_dir) as spool:
            hasher = blake3()
            for piece in _pieces(head, stored, read):
                hasher.update(piece)
                spool.write(piece)
            digest = hasher.digest()
            for large in known:
                if self._digest_of(large, stored) == digest:
                    self.shared_bytes += stored
                    return large.data_map
            spool.seek(0)
            start = self.size
            data_map = self._lay_out(size, segments, iter(lambda: spool.read(PIECE_BYTES), b""))
        known.append(_Large(start, data_map, digest))
        return data_map

    def _add_first(self, known: list[_Large], size: int, segments: Segments, pieces: Iterator[bytes]) -> DataMap:
        """A file like no other so far: its digest is needed only if a similar one comes."""
        start, is_dense = self.size, segments == ((0, size),)
        hasher = blake3()
        data_map = self._lay_out(size, segments, pieces if is_dense else _hashed(hasher, pieces))
        known.append(_Large(start, data_map, None if is_dense else hasher.digest()))
        return data_map

    def _digest_of(self, large: _Large, size: int) -> bytes:
        if large.digest is None:
            hasher = blake3()
            handed_over = self.size - self._fill
            if large.start < handed_over:
                for piece in self._sink.read_back(large.start, min(size, handed_over - large.start)):
                    hasher.update(piece)
            first = max(large.start, handed_over)
            if first < large.start + size:
                hasher.update(self._view[first - handed_over : large.start + size - handed_over])
            large.digest = hasher.digest()
        return large.digest

    def _lay_out_small(self, data: bytes) -> DataMap:
        """What _lay_out() does for a file without holes that is in memory: nearly all files, so without detours."""
        size, start, fill = len(data), self.size, self._fill
        padded = -(-size // BLOCK) * BLOCK
        if fill + padded > RUN_BYTES or start + padded > limits.DEVICE_BYTES_MAX:
            return self._lay_out(size, ((0, size),), iter((data,)))
        self._view[fill : fill + size] = data
        self._view[fill + size : fill + padded] = _ZEROS[: padded - size]
        self._fill = fill + padded
        self.size = start + padded
        if self._fill == RUN_BYTES:
            self._flush()
        return DataMap(max((size - 1).bit_length(), UNIT_SHIFT_MIN), ((0, 1, start // BLOCK),))

    def _lay_out(self, size: int, segments: Segments, pieces: Iterator[bytes]) -> DataMap:
        layout = plan_layout(size, segments, self._chunk_size)
        start = self.size
        if start + layout.device_bytes > limits.DEVICE_BYTES_MAX:
            raise FormatError(f"the layer's files need more than {limits.DEVICE_BYTES_MAX} bytes")
        if segments == ((0, size),):
            for piece in pieces:
                self._write(piece)
        else:
            self._write_segments(layout, segments, pieces, start)
        self._write_zeros(start + layout.device_bytes - self.size)
        runs, block, unit_blocks = [], start // BLOCK, 1 << (layout.unit_shift - UNIT_SHIFT_MIN)
        for first, count in layout.unit_runs:
            runs.append((first, count, block))
            block += count * unit_blocks
        return DataMap(layout.unit_shift, tuple(runs))

    def _write_segments(self, layout: _Layout, segments: Segments, pieces: Iterator[bytes], start: int) -> None:
        """Put each segment at its place in its unit; the gaps between them inside a unit become zeros."""
        piece = b""
        for target, length in _targets(layout, segments):
            self._write_zeros(start + target - self.size)
            left = length
            while left:
                piece = piece or next(pieces)
                if len(piece) <= left:
                    self._write(piece)
                    left -= len(piece)
                    piece = b""
                else:
                    self._write(piece[:left])
                    piece = piece[left:]
                    left = 0

    def _write(self, data: bytes) -> None:
        done, size = 0, len(data)
        while done < size:
            part = min(RUN_BYTES - self._fill, size - done)
            if part == size:
                self._view[self._fill : self._fill + part] = data
            else:
                self._view[self._fill : self._fill + part] = memoryview(data)[done : done + part]
            self._fill += part
            done += part
            if self._fill == RUN_BYTES:
                self._flush()
        self.size += size

    def _write_zeros(self, count: int) -> None:
        to_boundary = -self.size % self._chunk_size
        if count >= to_boundary + self._chunk_size:     # whole chunks of zeros: no bytes need to be touched
            self._write(_ZEROS[:to_boundary])
            self._flush()
            chunks = (count - to_boundary) // self._chunk_size
            self._sink.add_zero_chunks(chunks)
            self.size += chunks * self._chunk_size
            count -= to_boundary + chunks * self._chunk_size
        if count:
            self._write(_ZEROS[:count])

    def _flush(self) -> None:
        if self._fill:
            self._view.release()
            self._sink.add_run(self._buffer, self._fill)
            self._buffer = self._sink.take_buffer()
            self._view = memoryview(self._buffer)
            self._fill = 0


def plan_layout(size: int, segments: Segments, chunk_size: int) -> _Layout:
    """Units and runs of a file of `size` > 0 bytes."""
    if segments == ((0, size),):
        shift = min(max((size - 1).bit_length(), UNIT_SHIFT_MIN), UNIT_SHIFT_MAX)
        return _Layout(shift, ((0, -(-size >> shift)),), _rounded(size))
    bounds = np.array(segments, dtype=np.int64).reshape(-1, 2)
    first, last = bounds[:, 0], bounds[:, 0] + bounds[:, 1] - 1
    shift = choose_unit_shift(size, first, last, chunk_size)
    runs = _merged_runs(first >> shift, last >> shift)
    return _Layout(shift, runs, _covered_bytes(size, shift, first, last))


def choose_unit_shift(size: int, first: npt.NDArray[np.int64], last: npt.NDArray[np.int64], chunk_size: int) -> int:
    """
    The unit for a file with holes that makes index bytes plus table rows of the space it takes smallest.

    A unit of a hole costs an index entry; one with data takes its whole size in the device, mostly zeros: those
    chunks are not stored, but each has a row. A 1 TiB file with two written ends: 64 KiB of index, 48 KiB of rows,
    both nearly all the same bytes and so next to nothing once compressed.

    Args:
        size: of the file.
        first: offset of the first byte of each segment.
        last: offset of the last byte of each segment.
        chunk_size: of the device's table.

    """
    best = (float("inf"), UNIT_SHIFT_MIN)
    for shift in range(UNIT_SHIFT_MIN, UNIT_SHIFT_MAX + 1):
        index = _INDEX_BYTES * -(-size >> shift)
        rows = _covered_bytes(size, shift, first, last) * ROW_BYTES / chunk_size
        best = min(best, (index + rows, shift))
        if 1 << shift >= size:
            break
    return best[1]


def _covered_bytes(size: int, shift: int, first: npt.NDArray[np.int64], last: npt.NDArray[np.int64]) -> int:
    """Device bytes of all units that a segment touches; the file's last unit ends with the file."""
    if not len(first):
        return 0
    first_unit, last_unit = first >> shift, last >> shift
    units = int((last_unit - first_unit + 1).sum()) - int((first_unit[1:] == last_unit[:-1]).sum())
    covered = units << shift
    if int(last_unit[-1]) == (size - 1) >> shift:
        covered -= (-size & ((1 << shift) - 1)) & -BLOCK
    return covered


def _merged_runs(first: npt.NDArray[np.int64], last: npt.NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """Unit ranges that touch or share a unit become one."""
    if not len(first):
        return ()
    starts = np.concatenate(([True], first[1:] > last[:-1] + 1))
    heads = first[starts]
    tails = np.append(last[:-1][starts[1:]], last[-1])
    return tuple(zip(heads.tolist(), (tails - heads + 1).tolist(), strict=True))


def _targets(layout: _Layout, segments: Segments) -> Iterator[tuple[int, int]]:
    """(place relative to the file's start in the device, length) of each segment, in order; none crosses runs."""
    runs = iter(layout.unit_runs)
    base = start = end = 0      # the current run: its place in the device, its bounds in the file
    for offset, length in segments:
        while offset >= end:
            base += end - start
            first, count = next(runs)
            start, end = first << layout.unit_shift, (first + count) << layout.unit_shift
        yield base + offset - start, length


def _rounded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _holes_key(size: int, segments: Segments) -> bytes:
    """Only files with the same holes share data."""
    return b"" if segments == ((0, size),) else blake3(np.array(segments, dtype="<i8").tobytes()).digest()


def _pieces(head: bytes, stored: int, read: Callable[[int], bytes]) -> Iterator[bytes]:
    yield head
    left = stored - len(head)
    while left:
        piece = read(min(left, PIECE_BYTES))
        left -= len(piece)
        yield piece


def _hashed(hasher: blake3, pieces: Iterator[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        hasher.update(piece)
        yield piece
