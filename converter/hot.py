"""
The hot blob: the blocks that a start touches, out of the layers' chunks, as chunks of a device of their own.

Each stored chunk that holds hot blocks is read, checked and decoded once, in the order of the blobs, and its blocks are
put to their places in a temporary file; then that file is cut and compressed as a layer's device is. Memory: what is
read at a time, the pool's window, and some 50 bytes for each hot block, of which there are at most two million.

Who calls: converter.image. Layer: converter. Format: docs/format.md, image.hot, image.blob.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from converter.encode import Encoding
from converter.parallel import Parallel
from converter.pool import RUN_BYTES, BlobWriter, CompressionPool
from converter.ranges import read_range
from lazyfs import limits
from lazyfs.errors import BugError, IntegrityError
from lazyfs.image.blob import pack_hot_tail
from lazyfs.image.bootstrap import BlobRef
from lazyfs.image.codec import Codec, decompress
from lazyfs.image.digest import chunk_digest
from lazyfs.image.hot import Extents, HotPart, hot_starts
from lazyfs.image.table import ChunkTable, Rows
from lazyfs.registry.staging import os_errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from converter.reuse import LayerContent
    from lazyfs.image.digest import Digest
    from lazyfs.registry.place import ImageSource

# Of 1 MiB, 512 KiB, 256 KiB: start of tensorflow 52.7, 54.5, 56.3 MB stored, of numpy 4.22, 4.28, 4.28; map 27,521,
# 28,849, 30,313 extents. The larger unit costs a start some 2 ms of waiting for its first chunk at 1 Gbit/s.
HOT_CHUNK_BYTES = limits.CHUNK_SIZE_MAX_BYTES
# What every start moves is worth more work, once, than the rest of an image: zstd 6 makes it 6 to 8 % smaller than 3,
# at a third of the speed (57 MB/s a core), and is decoded no slower; 9 saves another 1 % for half as much again.
ZSTD_LEVEL_MIN = 6
# A small one is worth still more: 19 makes that of numpy another 9 % smaller, 35 ms at 100 Mbit/s, and is decoded no
# slower; it takes half a second of CPU a megabyte, of these at most.
ZSTD_SMALL_LEVEL_MIN = 19
SMALL_BYTES_MAX = 16 * limits.MIB
READ_BYTES_MAX = 8 * limits.MIB   # in memory, READS_AT_ONCE times
READS_AT_ONCE = 8                 # of a registry, scattered chunks cost a round trip each
_BLOCK = limits.BLOCK_SIZE_BYTES


class BlobReader(Protocol):
    """Reads stored bytes of blobs that are at the destination."""

    def __call__(self, digest: Digest, offset: int, size: int) -> bytes: ...


class StoredBlobs:
    """Blobs just made, by the files they were written to (still open); others from the destination."""

    def __init__(self, reader: ImageSource) -> None:
        self._reader = reader
        self._files: dict[Digest, int] = {}

    def keep(self, digest: Digest, path: Path) -> None:
        """Hold on to a blob's file before it is handed to the destination. From any thread."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if self._files.setdefault(digest, descriptor) != descriptor:    # two layers may give one blob at a time
            os.close(descriptor)

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __call__(self, digest: Digest, offset: int, size: int) -> bytes:
        if digest in self._files:
            return os.pread(self._files[digest], size, offset)
        return read_range(self._reader, digest, offset, size)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A stored chunk of a layer. `first`, `end`: the extents, in the order of their places, that have blocks in it."""

    device: int
    index: int
    offset: int      # in the layer's blob
    size: int
    first: int
    end: int


def write_hot_blob(
    extents: Extents, layers: Sequence[LayerContent], encoding: Encoding, jobs: int, *, hot_index: int,
    read: BlobReader, path: Path,
) -> tuple[BlobRef, HotPart]:
    """
    Make a hot device of these blocks and store it at `path`.

    Args:
        extents: the blocks, in order, each once; at least one.
        layers: where they are, by device index.
        encoding: of the image's layers.
        jobs: threads that compress.
        hot_index: the hot blob's index in the bootstrap's list of blobs.
        read: gives stored bytes.
        path: the file to write; its directory is also used for a temporary file.

    Raises:
        IntegrityError: a stored chunk is damaged.
        DiskFullError, TargetError: something could not be written.

    """
    size = int(extents["count"].sum(dtype=np.int64)) * _BLOCK
    own = hot_encoding(encoding, size)
    with os_errors(str(path.parent)), tempfile.TemporaryFile(dir=path.parent, buffering=0) as device:
        _gather(extents, layers, read, device.fileno())
        with path.open("x+b") as file, CompressionPool(jobs, 1) as pool:
            writer = BlobWriter(pool, file, own)
            try:
                rows = _store(device.fileno(), size, writer)
            finally:
                writer.abandon()
            rows["blob_index"] = hot_index
            rows.setflags(write=False)
            table = ChunkTable(own.chunk_size, size, rows)
            writer.write(pack_hot_tail(table, writer.blob_size))
            blob = BlobRef(writer.digest(), writer.blob_size, hot=True)
    return blob, HotPart(table.device_digest(), table, extents)


def hot_encoding(encoding: Encoding, size: int) -> Encoding:
    """How a hot device of so many bytes is stored whose image's layers are stored as `encoding` says."""
    least = ZSTD_SMALL_LEVEL_MIN if size <= SMALL_BYTES_MAX else ZSTD_LEVEL_MIN
    level = max(encoding.level, least) if encoding.codec is Codec.ZSTD else encoding.level
    return Encoding(encoding.codec, level, HOT_CHUNK_BYTES)


def _store(device: int, size: int, writer: BlobWriter) -> Rows:
    """Compress the file `device`; returns the rows, writable."""
    for start in range(0, size, RUN_BYTES):
        buffer, length = writer.take_buffer(), min(RUN_BYTES, size - start)
        if os.preadv(device, [memoryview(buffer)[:length]], start) != length:
            raise BugError(f"the hot device lacks bytes from {start} on, which were written")
        writer.add_run(buffer, length)
    return writer.finish().copy()


def _gather(extents: Extents, layers: Sequence[LayerContent], read: BlobReader, device: int) -> None:
    """Write the blocks to their places in the file `device`."""
    places = _Places(extents)

    def take(run: list[_Chunk]) -> None:
        work.check()
        blob, size = layers[run[0].device].blob, sum(chunk.size for chunk in run)
        stored = memoryview(read(blob.digest, run[0].offset, size))
        if len(stored) != size:
            raise IntegrityError(f"blob {blob.digest.short} gave {len(stored)} bytes, not {size}")
        for chunk in run:
            data = _decode(stored[chunk.offset - run[0].offset :][: chunk.size], layers[chunk.device], chunk)
            work.check()     # a read that hung while everything was given up must not write: the file is closed
            for start, end, place in places.pieces(chunk, layers[chunk.device].table.chunk_size):
                _pwrite(device, data[start:end], place)

    work: Parallel[None] = Parallel()
    work.run([partial(take, run) for run in _runs(places.chunks(layers))], READS_AT_ONCE)


class _Places:
    """Extents in the order of their places in the layers; bytes. As memoryviews: items are int, 40 bytes an extent."""

    def __init__(self, extents: Extents) -> None:
        order = np.lexsort((extents["first"], extents["device"]))
        starts = extents["first"][order].astype(np.int64) * _BLOCK
        self._devices = extents["device"][order].astype(np.int64).data
        self._starts = starts.data
        self._ends = (starts + extents["count"][order].astype(np.int64) * _BLOCK).data
        self._hot = (hot_starts(extents)[order] * _BLOCK).data

    def chunks(self, layers: Sequence[LayerContent]) -> Iterator[_Chunk]:
        """The stored chunks that hold them, each once, in the order of the devices."""
        found: _Chunk | None = None
        for at in range(len(self._starts)):
            device = self._devices[at]
            table = layers[device].table
            for index in range(self._starts[at] // table.chunk_size, (self._ends[at] - 1) // table.chunk_size + 1):
                if found is not None and (found.device, found.index) == (device, index):
                    found = replace(found, end=at + 1)
                    continue
                if found is not None:
                    yield found
                row = table.rows[index]
                found = _Chunk(device, index, int(row["blob_offset"]), int(row["stored_size"]), at, at + 1)
        if found is not None:
            yield found

    def pieces(self, chunk: _Chunk, chunk_size: int) -> Iterator[tuple[int, int, int]]:
        """(first byte, end in the chunk, byte in the hot device) of what a chunk holds."""
        base = chunk.index * chunk_size
        for at in range(chunk.first, chunk.end):
            start, end = max(self._starts[at], base), min(self._ends[at], base + chunk_size)
            yield start - base, end - base, self._hot[at] + start - self._starts[at]


def _runs(chunks: Iterator[_Chunk]) -> Iterator[list[_Chunk]]:
    """Chunks that lie one behind the other in their blob, at most READ_BYTES_MAX: one read."""
    run: list[_Chunk] = []
    end = size = 0
    for chunk in chunks:
        if run and (chunk.device, chunk.offset) == (run[0].device, end) and size + chunk.size <= READ_BYTES_MAX:
            run.append(chunk)
            size += chunk.size
        else:
            if run:
                yield run
            run, size = [chunk], chunk.size
        end = chunk.offset + chunk.size
    if run:
        yield run


def _decode(stored: memoryview, layer: LayerContent, chunk: _Chunk) -> bytes | memoryview:
    row = layer.table.rows[chunk.index]
    data = decompress(stored, Codec(int(row["codec"])), layer.table.chunk_bytes(chunk.index))
    if chunk_digest(data) != bytes(row["digest"]):
        raise IntegrityError(f"chunk {chunk.index} of blob {layer.blob.digest.short} is damaged",
                             hint="convert with --no-reuse")
    return data


def _pwrite(device: int, data: bytes | memoryview, place: int) -> None:
    """All of it: a full disk may take a part first."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(device, rest, place)
        rest, place = rest[written:], place + written
