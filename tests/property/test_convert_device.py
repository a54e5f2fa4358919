"""A layer device gives back every file, whatever its size and holes; equal content lies there once."""

from __future__ import annotations

import io
import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converter import device as device_module
from converter.device import DeviceWriter, plan_layout
from converter.pool import RUN_BYTES
from lazyfs import limits
from lazyfs.errors import FormatError
from lazyfs.image.entries import check_map
from lazyfs.image.table import ROW_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lazyfs.image.model import DataMap

CHUNK = limits.CHUNK_SIZE_MIN_BYTES
BLOCK = limits.BLOCK_SIZE_BYTES


class MemorySink:
    """Keeps the device; zero chunks are counted, not kept, beyond what fits."""

    def __init__(self) -> None:
        self.parts: list[bytes | int] = []

    def take_buffer(self) -> bytearray:
        return bytearray(b"\xee" * RUN_BYTES)     # what is in it must not matter

    def add_run(self, buffer: bytearray, size: int) -> None:
        self.parts.append(bytes(buffer[:size]))

    def add_zero_chunks(self, count: int) -> None:
        assert count > 0
        self.parts.append(count)

    def read_back(self, offset: int, size: int) -> Iterator[bytes]:
        yield self.read(offset, size)

    def read(self, offset: int, size: int) -> bytes:
        out, position = io.BytesIO(), 0
        for part in self.parts:
            length = part * CHUNK if isinstance(part, int) else len(part)
            low, high = max(offset, position), min(offset + size, position + length)
            if low < high:
                out.write(bytes(high - low) if isinstance(part, int) else part[low - position : high - position])
            position += length
        return out.getvalue()

    @property
    def size(self) -> int:
        return sum(part * CHUNK if isinstance(part, int) else len(part) for part in self.parts)


class FileData:
    """A sparse file's content: pseudo-random segments."""

    def __init__(self, size: int, segments: tuple[tuple[int, int], ...], seed: int) -> None:
        self.size, self.segments = size, segments
        generator = random.Random(seed)
        self.pieces = [generator.randbytes(length) for _, length in segments]
        self._stream = io.BytesIO(b"".join(self.pieces))

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        assert len(data) == size, "read beyond the member"
        return data

    def add_to(self, writer: DeviceWriter) -> DataMap:
        self._stream.seek(0)
        return writer.add_file(self.size, self.segments, self.read)

    def expect(self, offset: int, size: int) -> bytes:
        out = bytearray(size)
        for (start, length), piece in zip(self.segments, self.pieces, strict=True):
            low, high = max(start, offset), min(start + length, offset + size)
            if low < high:
                out[low - offset : high - offset] = piece[low - start : high - start]
        return bytes(out)


def read_file(sink: MemorySink, data_map: DataMap, offset: int, size: int) -> bytes:
    """What EROFS would read."""
    unit = 1 << data_map.unit_shift
    out = bytearray(size)
    for first, count, block in data_map.runs:
        low, high = max(first * unit, offset), min((first + count) * unit, offset + size)
        if low < high:
            out[low - offset : high - offset] = sink.read(block * BLOCK + low - first * unit, high - low)
    return bytes(out)


def assert_same(sink: MemorySink, file: FileData, data_map: DataMap) -> None:
    assert check_map(data_map, file.size, sink.size) == ""
    marks = {0, file.size, *(start for start, _ in file.segments), *(start + length for start, length in file.segments)}
    windows = {(max(0, mark - 5000), min(file.size, mark + 5000)) for mark in marks}
    for low, high in windows:
        assert read_file(sink, data_map, low, high - low) == file.expect(low, high - low)


lengths = st.one_of(st.integers(0, 3 * BLOCK), st.integers(0, 300_000), st.just(BLOCK), st.just(CHUNK))
gaps = st.one_of(st.integers(0, 9000), st.integers(0, 1 << 22), st.integers(0, 1 << 42))


@st.composite
def files(draw: st.DrawFn) -> FileData:
    seed = draw(st.integers(0, 2))
    if draw(st.booleans()):
        size = draw(lengths)
        return FileData(size, ((0, size),) if size else (), seed)
    position, segments = 0, []
    for gap, length in draw(st.lists(st.tuples(gaps, lengths), max_size=5)):
        segments.append((position + gap, length))
        position += gap + length
    return FileData(position + draw(gaps), tuple(segments), seed)


@given(st.lists(files(), max_size=8))
@settings(deadline=None, max_examples=60)
def test_every_file_comes_back(tmp_path_factory: pytest.TempPathFactory, chosen: list[FileData]) -> None:
    sink = MemorySink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_module, "SMALL_FILE_BYTES", 200_000)    # so that the way of large files is taken too
        writer = DeviceWriter(sink, CHUNK, tmp_path_factory.getbasetemp())
        maps = [file.add_to(writer) for file in chosen]
        size = writer.finish()
    assert size == sink.size
    assert size % BLOCK == 0
    for part in sink.parts[:-1]:
        assert isinstance(part, int) or len(part) % CHUNK == 0
    for file, data_map in zip(chosen, maps, strict=True):
        assert_same(sink, file, data_map)


@pytest.mark.parametrize("size", [1, BLOCK, 300_000, 5 * limits.MIB])
def test_equal_content_is_stored_once(tmp_path: Path, size: int) -> None:
    sink = MemorySink()
    writer = DeviceWriter(sink, CHUNK, tmp_path)
    first = FileData(size, ((0, size),), 1).add_to(writer)
    other = FileData(size, ((0, size),), 2).add_to(writer)
    once = writer.size
    assert FileData(size, ((0, size),), 1).add_to(writer) == first
    assert FileData(size, ((0, size),), 2).add_to(writer) == other
    assert first != other
    assert writer.size == once == 2 * -(-size // BLOCK) * BLOCK
    assert writer.shared_bytes == 2 * size
    assert not list(tmp_path.iterdir())


def test_large_files_that_differ_late_stay_apart(tmp_path: Path) -> None:
    base = random.Random(5).randbytes(3 * limits.MIB)
    sink = MemorySink()
    writer = DeviceWriter(sink, CHUNK, tmp_path)
    contents = [base, base[:-1] + bytes([base[-1] ^ 1]), base]
    maps = [writer.add_file(len(data), ((0, len(data)),), io.BytesIO(data).read) for data in contents]
    writer.finish()
    assert maps[0] == maps[2] != maps[1]
    for data, data_map in zip(contents, maps, strict=True):
        assert read_file(sink, data_map, 0, len(data)) == data


def test_same_bytes_with_other_holes_are_another_file(tmp_path: Path) -> None:
    sink = MemorySink()
    writer = DeviceWriter(sink, CHUNK, tmp_path)
    one, two = FileData(20_000, ((0, 5000),), 1), FileData(20_000, ((8192, 5000),), 1)
    maps = [file.add_to(writer) for file in (one, two)]
    writer.finish()
    for file, data_map in zip((one, two), maps, strict=True):
        assert_same(sink, file, data_map)


@pytest.mark.parametrize("size", [limits.TIB, 100 * limits.GIB, 5 * limits.TIB])
def test_a_huge_sparse_file_costs_little(size: int) -> None:
    segments = ((0, BLOCK), (size // 2, 100_000), (size - BLOCK, BLOCK))
    layout = plan_layout(size, segments, limits.CHUNK_SIZE_DEFAULT_BYTES)
    index = 8 * -(-size >> layout.unit_shift)
    rows = layout.device_bytes * ROW_BYTES // limits.CHUNK_SIZE_DEFAULT_BYTES
    assert index + rows < 600_000
    assert layout.device_bytes <= limits.DEVICE_BYTES_MAX // 100


def test_a_file_of_one_hole_needs_no_device_space(tmp_path: Path) -> None:
    sink = MemorySink()
    writer = DeviceWriter(sink, CHUNK, tmp_path)
    data_map = writer.add_file(limits.TIB, (), io.BytesIO().read)
    assert (writer.finish(), data_map.runs) == (0, ())
    assert limits.TIB >> data_map.unit_shift <= 1


def test_zeros_of_a_dense_file_may_be_large(tmp_path: Path) -> None:
    sink = MemorySink()
    writer = DeviceWriter(sink, CHUNK, tmp_path)
    writer.add_file(3, ((0, 3),), io.BytesIO(b"abc").read)
    segments = ((0, 1), (limits.GIB, 1))
    data_map = writer.add_file(limits.GIB + 1, segments, io.BytesIO(b"xy").read)
    writer.finish()
    assert read_file(sink, data_map, limits.GIB, 1) == b"y"
    assert sum(len(part) for part in sink.parts if isinstance(part, bytes)) < 8 * limits.MIB


@pytest.mark.parametrize("chunk_size", [limits.CHUNK_SIZE_MIN_BYTES, limits.CHUNK_SIZE_MAX_BYTES])
@pytest.mark.parametrize("gap", [0, 1, limits.MIB - 1, 2 * limits.MIB - 4097, 2 * limits.MIB, 3 * limits.MIB + 5])
def test_zeros_have_their_exact_length(tmp_path: Path, chunk_size: int, gap: int) -> None:
    sink = MemorySink()
    writer = DeviceWriter(sink, chunk_size, tmp_path)
    writer.add_file(3, ((0, 3),), io.BytesIO(b"abc").read)
    writer._write_zeros(gap)
    writer._write(b"end")
    size = writer.finish()
    device = b"".join(bytes(part * chunk_size) if isinstance(part, int) else part for part in sink.parts)
    assert size == len(device)
    assert device == b"abc" + bytes(BLOCK - 3 + gap) + b"end"


def test_a_device_has_a_limit(tmp_path: Path) -> None:
    writer = DeviceWriter(MemorySink(), CHUNK, tmp_path)
    writer.size = limits.DEVICE_BYTES_MAX - BLOCK
    writer.add_file(1, ((0, 1),), io.BytesIO(b"x").read)
    with pytest.raises(FormatError, match="need more than"):
        writer.add_file(2, ((0, 2),), io.BytesIO(b"xy").read)
