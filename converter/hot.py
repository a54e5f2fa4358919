"""
The hot blob: copies of the stored chunks that a start touches, in the order in which it touches them.

Copies, not new chunks: the same stored bytes, so the layers' blobs stay as they are and only the bootstrap's tables
point elsewhere. A chunk of zeros needs no copy; equal chunks of two layers need one.

Who calls: converter.image. Layer: converter. Format: docs/format.md, image.blob.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from converter.parallel import Parallel
from converter.pool import BlobFile
from converter.ranges import read_range
from lazyfs import limits
from lazyfs.errors import IntegrityError
from lazyfs.image.blob import pack_hot_tail
from lazyfs.image.bootstrap import BlobRef
from lazyfs.image.codec import Codec, decompress
from lazyfs.image.digest import chunk_digest
from lazyfs.image.table import ChunkTable, Rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from converter.reuse import LayerContent
    from lazyfs.image.digest import Digest
    from lazyfs.registry.place import ImageSource

Plan = list[tuple[int, int]]     # (device index, chunk index), in order of first use
READ_BYTES_MAX = limits.RANGE_REQUEST_BYTES_MAX
READS_AT_ONCE = 8                    # of a registry, scattered chunks cost a round trip each
GROUP_BYTES_MAX = 2 * READ_BYTES_MAX  # read and not yet written


@dataclass(frozen=True, slots=True)
class _Copy:
    device: int
    chunk: int
    offset: int      # in the layer's blob
    size: int


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


def write_hot_blob(
    plan: Plan, layers: Sequence[LayerContent], tables: list[ChunkTable], hot_index: int, *,
    read: BlobReader, path: Path,
) -> tuple[BlobRef, list[ChunkTable], int] | None:
    """
    Copy a plan's chunks into a hot blob at `path`.

    Args:
        plan: what to copy; a chunk named twice is copied once.
        layers: where the chunks are, by device index.
        tables: the bootstrap's tables so far.
        hot_index: the hot blob's index in the bootstrap's list of blobs.
        read: gives stored bytes.
        path: the file to write.

    Returns: the blob, the tables that point at the copies, and how many copies there are; None if there are none.

    Raises:
        IntegrityError: a stored chunk is damaged.

    """
    copies, chunk_size = _plan_copies(plan, layers), tables[0].chunk_size if tables else 0
    if not copies:
        return None
    rows = [table.rows.copy() for table in tables]
    places: dict[bytes, int] = {}
    with path.open("xb") as file:
        blob = BlobFile(file)
        for copy, stored in _read_copies(copies, layers, read):
            row = rows[copy.device][copy.chunk]
            # All but the offset: equal means the same content, codec and stored size.
            key = layers[copy.device].table.rows[copy.chunk].tobytes()[8:]
            if key not in places:
                _check_chunk(stored, layers[copy.device], copy)
                places[key] = blob.blob_size
                blob.write(stored)
            row["blob_index"], row["blob_offset"] = hot_index, places[key]
        blob.write(pack_hot_tail(chunk_size, len(places), blob.blob_size))
    moved = [_with_rows(table, new) for table, new in zip(tables, rows, strict=True)]
    return BlobRef(blob.digest(), blob.blob_size, hot=True), moved, len(places)


def _plan_copies(plan: Plan, layers: Sequence[LayerContent]) -> list[_Copy]:
    copies = []
    for device, chunk in dict.fromkeys(plan):
        row = layers[device].table.rows[chunk]
        if row["codec"] != Codec.ZERO:
            copies.append(_Copy(device, chunk, int(row["blob_offset"]), int(row["stored_size"])))
    return copies


def _read_copies(
    copies: list[_Copy], layers: Sequence[LayerContent], read: BlobReader
) -> Iterator[tuple[_Copy, memoryview]]:
    """Each copy with its stored bytes, in order; neighbours come with one read, several reads at a time."""

    def read_run(run: list[_Copy]) -> memoryview:
        blob, size = layers[run[0].device].blob, sum(copy.size for copy in run)
        data = read(blob.digest, run[0].offset, size)
        if len(data) != size:
            raise IntegrityError(f"blob {blob.digest.short} gave {len(data)} bytes, not {size}")
        return memoryview(data)

    for group in _groups(_runs(copies)):
        reads: Parallel[memoryview] = Parallel()
        for run, data in zip(group, reads.run([partial(read_run, run) for run in group], READS_AT_ONCE), strict=True):
            for copy in run:
                yield copy, data[copy.offset - run[0].offset :][: copy.size]


def _runs(copies: list[_Copy]) -> Iterator[list[_Copy]]:
    """Copies that lie one behind the other in their blob, at most READ_BYTES_MAX."""
    start = 0
    while start < len(copies):
        first = copies[start]
        end, size = start + 1, first.size
        while (end < len(copies) and copies[end].device == first.device and copies[end].offset == first.offset + size
               and size + copies[end].size <= READ_BYTES_MAX):
            size += copies[end].size
            end += 1
        yield copies[start:end]
        start = end


def _groups(runs: Iterable[list[_Copy]]) -> Iterator[list[list[_Copy]]]:
    """What is in memory at a time."""
    group: list[list[_Copy]] = []
    size = 0
    for run in runs:
        run_size = sum(copy.size for copy in run)
        if group and size + run_size > GROUP_BYTES_MAX:
            yield group
            group, size = [], 0
        group.append(run)
        size += run_size
    if group:
        yield group


def _check_chunk(stored: memoryview, layer: LayerContent, copy: _Copy) -> None:
    row = layer.table.rows[copy.chunk]
    data = decompress(stored, Codec(int(row["codec"])), layer.table.chunk_bytes(copy.chunk))
    if chunk_digest(data) != bytes(row["digest"]):
        raise IntegrityError(f"chunk {copy.chunk} of blob {layer.blob.digest.short} is damaged",
                             hint="convert with --no-reuse")


def _with_rows(table: ChunkTable, rows: Rows) -> ChunkTable:
    rows.setflags(write=False)
    return ChunkTable(table.chunk_size, table.device_size, rows)
