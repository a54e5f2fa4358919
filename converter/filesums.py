"""
Digests of a file's blocks, without its zeros: what two files with different holes but equal bytes have in common.

A file is cut into blocks of SUM_BLOCK_BYTES; a block with any byte but zero has a digest, others have none. So a 1 TiB
file with one byte in it costs one block, on either side.

Layer: converter. Who calls: converter.compare.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from converter.ranges import read_range
from lazyfs import limits
from lazyfs.errors import IntegrityError
from lazyfs.image.codec import Codec, decompress
from lazyfs.image.digest import chunk_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lazyfs.image.erofs import ErofsImage
    from lazyfs.registry.lazy import LazyImage
    from lazyfs.registry.place import ImageSource

SUM_BLOCK_BYTES = 64 * limits.KIB
_DIGEST_BYTES = 16               # of BLAKE3's 32: nobody chooses both sides here but the one who asks
_CACHE_BYTES = 64 * limits.MIB   # decoded chunks kept; files lie in the order of their archive, so few are needed
_RUN_BYTES = 4 * limits.MIB      # stored bytes fetched at once

Sums = dict[int, bytes]
"""By block number; blocks of zeros have no entry."""


def source_sums(segments: tuple[tuple[int, int], ...], read: Callable[[int], bytes]) -> Sums:
    """
    The sums of a file in an archive.

    Args:
        segments: (offset in the file, length) of what is stored, sorted, apart.
        read: gives up to so many of the stored bytes, in order; all of them are read.

    """
    sums: Sums = {}
    number, block = -1, bytearray()
    for offset, length in segments:
        position, end = offset, offset + length
        while position < end:
            if position // SUM_BLOCK_BYTES != number:
                _close_block(sums, number, block)
                number, block = position // SUM_BLOCK_BYTES, bytearray()
            block += bytes(position - number * SUM_BLOCK_BYTES - len(block))
            data = read(min((number + 1) * SUM_BLOCK_BYTES, end) - position)
            block += data
            position += len(data)
    _close_block(sums, number, block)
    return sums


class LazySums:
    """The sums of a lazy image's files, out of its stored chunks (each checked on its way)."""

    def __init__(self, image: LazyImage, source: ImageSource) -> None:
        self._tree: ErofsImage = image.tree
        self._chunks = ChunkReader(image, source)

    def of(self, nid: int, size: int) -> Sums:
        """Raises IntegrityError, FormatError, SourceError."""
        sums: Sums = {}
        number, block = -1, bytearray()
        file_offset = 0
        for device, offset, length in self._tree.extents(nid, 0, size):
            if device >= 0:
                position = file_offset
                for data in self._chunks.read(device, offset, length):
                    view = memoryview(data)
                    while view:
                        if position // SUM_BLOCK_BYTES != number:
                            _close_block(sums, number, block)
                            number, block = position // SUM_BLOCK_BYTES, bytearray()
                        block += bytes(position - number * SUM_BLOCK_BYTES - len(block))
                        part = view[: (number + 1) * SUM_BLOCK_BYTES - position]
                        block += part
                        position += len(part)
                        view = view[len(part) :]
            file_offset += length
        _close_block(sums, number, block)
        return sums


class ChunkReader:
    """Uncompressed bytes of layer devices. Keeps some chunks; neighbours in a blob come with one request."""

    def __init__(self, image: LazyImage, source: ImageSource) -> None:
        self._blobs = image.bootstrap.blobs
        self._tables = [device.table for device in image.bootstrap.devices]
        self._source = source
        self._cache: OrderedDict[tuple[int, int], bytes | memoryview] = OrderedDict()

    def read(self, device: int, offset: int, length: int) -> Iterator[memoryview]:
        """Bytes [offset, offset + length) of a device, in pieces."""
        chunk_size = self._tables[device].chunk_size
        end = offset + length
        while offset < end:
            index, start = divmod(offset, chunk_size)
            data = memoryview(self._chunk(device, index, (end - 1) // chunk_size))[start : start + end - offset]
            yield data
            offset += len(data)

    def _chunk(self, device: int, index: int, last: int) -> bytes | memoryview:
        key = (device, index)
        if key not in self._cache:
            self._fetch(device, index, last)
        self._cache.move_to_end(key)
        return self._cache[key]

    def _fetch(self, device: int, index: int, last: int) -> None:
        """Bring chunk `index`, and those up to `last` whose stored bytes follow it."""
        table = self._tables[device]
        rows = table.rows
        if rows[index]["codec"] == Codec.ZERO:
            self._keep(device, index, bytes(table.chunk_bytes(index)))
            return
        blob, offset, size = int(rows[index]["blob_index"]), int(rows[index]["blob_offset"]), 0
        end = index
        last = min(last, index + _CACHE_BYTES // table.chunk_size - 1)    # more would push the first ones out
        while end <= last and size < _RUN_BYTES:
            row = rows[end]
            if (int(row["blob_index"]), int(row["blob_offset"])) != (blob, offset + size) or row["codec"] == Codec.ZERO:
                break
            size += int(row["stored_size"])
            end += 1
        stored = memoryview(read_range(self._source, self._blobs[blob].digest, offset, size))
        for number in range(index, end):
            row = rows[number]
            start = int(row["blob_offset"]) - offset
            part = stored[start : start + int(row["stored_size"])]
            data = decompress(part, Codec(int(row["codec"])), table.chunk_bytes(number))
            if chunk_digest(data) != bytes(row["digest"]):
                raise IntegrityError(f"chunk {number} of device {device} has another digest")
            self._keep(device, number, data)

    def _keep(self, device: int, index: int, data: bytes | memoryview) -> None:
        self._cache[device, index] = data
        while len(self._cache) > _CACHE_BYTES // self._tables[device].chunk_size:
            self._cache.popitem(last=False)


def first_difference(ours: Sums, theirs: Sums) -> int | None:
    """Where, in bytes, the first block begins that differs; None: there is none."""
    blocks = [number for number in ours.keys() | theirs.keys() if ours.get(number) != theirs.get(number)]
    return min(blocks) * SUM_BLOCK_BYTES if blocks else None


def _close_block(sums: Sums, number: int, block: bytearray) -> None:
    data = bytes(block).rstrip(b"\0") if block and not block[-1] else bytes(block)
    if number >= 0 and data:
        sums[number] = chunk_digest(data)[:_DIGEST_BYTES]
