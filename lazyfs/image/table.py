"""
The chunk table of a layer device: one fixed-width row a chunk, mappable by numpy as it is.

Row (48 bytes, little-endian):

    offset size field
         0    8 blob_offset   where in the blob the stored bytes begin
         8    4 stored_size   how many they are (0 for codec ZERO)
        12    2 blob_index    which blob (in a blob's own table: 0, itself; in a bootstrap: index into its blob list)
        14    1 codec         image.codec.Codec
        15    1 reserved      0
        16   32 digest        BLAKE3 of the chunk's uncompressed bytes

Chunk *i* covers bytes [i * chunk_size, min((i + 1) * chunk_size, device_size)) of the device. The device's identity
is made of the chunk digests alone, so codec and place do not change it: caches and peers speak of it.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lazyfs import limits
from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.image.codec import Codec
from lazyfs.image.digest import CHUNK_DIGEST_BYTES, Digest

ROW = np.dtype(
    [
        ("blob_offset", "<u8"),
        ("stored_size", "<u4"),
        ("blob_index", "<u2"),
        ("codec", "u1"),
        ("reserved", "u1"),
        ("digest", "V32"),
    ]
)
ROW_BYTES = 48
assert ROW.itemsize == ROW_BYTES
Rows = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True, eq=False)
class ChunkTable:
    """A validated table. `rows` is a read-only or private array of dtype ROW."""

    chunk_size: int
    device_size: int
    rows: Rows

    @property
    def chunk_count(self) -> int:
        return len(self.rows)

    def chunk_bytes(self, index: int) -> int:
        """Uncompressed size of chunk `index`: chunk_size, or less for the last one."""
        return min(self.chunk_size, self.device_size - index * self.chunk_size)

    def device_digest(self) -> Digest:
        """The identity of the layer device: what it holds, however it is stored."""
        head = struct.pack("<16sIQ", b"lazyfs-device-1\0", self.chunk_size, self.device_size)
        digests = np.ascontiguousarray(self.rows["digest"]).tobytes()
        return Digest("sha256:" + hashlib.sha256(head + digests).hexdigest())


def chunk_count(device_size: int, chunk_size: int) -> int:
    return -(-device_size // chunk_size)


def check_chunk_size(chunk_size: int) -> None:
    """Raises UnsupportedError unless a power of two from 64 KiB to 1 MiB."""
    low, high = limits.CHUNK_SIZE_MIN_BYTES, limits.CHUNK_SIZE_MAX_BYTES
    if not low <= chunk_size <= high or chunk_size & (chunk_size - 1):
        raise UnsupportedError(f"chunk size {chunk_size}: expected a power of two from {low} to {high}")


def parse_table(data: bytes | memoryview, chunk_size: int, device_size: int, blob_sizes: list[int]) -> ChunkTable:
    """
    Validate a table's bytes against the device and the blobs (sizes in bytes, by blob_index).

    Raises:
        FormatError: a row is outside its blob, has an impossible size or codec, or the row count is off.

    """
    check_chunk_size(chunk_size)
    if not 0 <= device_size <= limits.DEVICE_BYTES_MAX or device_size % limits.BLOCK_SIZE_BYTES:
        raise FormatError(f"device size {device_size} is not a multiple of {limits.BLOCK_SIZE_BYTES} within limits")
    count = chunk_count(device_size, chunk_size)
    if len(data) != count * ROW_BYTES:
        raise FormatError(f"chunk table holds {len(data)} bytes, expected {count} rows of {ROW_BYTES}")
    table = ChunkTable(chunk_size, device_size, np.frombuffer(data, dtype=ROW))
    _check_rows(table, blob_sizes)
    return table


def _check_rows(table: ChunkTable, blob_sizes: list[int]) -> None:
    rows = table.rows
    if not len(rows):
        return
    if rows["reserved"].any():
        raise UnsupportedError("chunk table uses reserved bytes: written by a newer lazyfs?")
    if rows["codec"].max() > max(Codec):
        raise UnsupportedError(f"chunk table names unknown codec {rows['codec'].max()}")
    if rows["blob_index"].max() >= len(blob_sizes):
        raise FormatError(f"chunk table names blob {rows['blob_index'].max()} of {len(blob_sizes)}")
    sizes = np.full(len(rows), table.chunk_size, dtype=np.uint64)
    sizes[-1] = table.chunk_bytes(len(rows) - 1)
    stored = rows["stored_size"].astype(np.uint64)
    codec = rows["codec"]
    wrong = (
        ((codec == Codec.ZERO) & (stored != 0))
        | ((codec == Codec.NONE) & (stored != sizes))
        | ((codec >= Codec.LZ4) & ((stored == 0) | (stored >= sizes)))
    )
    limit = np.array(blob_sizes, dtype=np.uint64)[rows["blob_index"]]
    wrong |= (rows["blob_offset"] > limit) | (stored > limit - np.minimum(rows["blob_offset"], limit))
    if wrong.any():
        raise FormatError(f"chunk table row {int(wrong.argmax())} has an impossible offset, size or codec")


assert ROW["digest"].itemsize == CHUNK_DIGEST_BYTES
