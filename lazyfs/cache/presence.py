"""
The two records of which chunks a device's data file holds, and of their checksums.

*Live* (file `live`): nine bytes a chunk, its sum and then 0 or 1, written by one pwrite(2) right after the chunk's
data. All then is in the page cache, so that a killed worker loses nothing (a write that a kill cuts short has a
beginning, so the last byte, which counts, is never there without the others); but nothing orders them on the disk, so
it is good for the boot it names only. Bytes, not bits: setting one needs no lock; pwrite, not mmap: a full or
truncated disk gives an error instead of SIGBUS.

*Checkpoint* (file `checkpoint`): one bit a chunk, then the sums, written only after fdatasync(2) of the data; good for
ever.

A sum is XXH3 (64 bits) over the chunk as it lies in the data file: it tells bits that rot on the disk (cache.verify).
It is no identity: what came over a network is checked by its BLAKE3 digest, before it gets here.

Both begin with the same header (little-endian), and name the data file by a random *generation*: a record is never
taken for another data file than the one it was made for, whatever order a crash leaves directory entries in.

    offset size field
         0    8 magic          "lzfsLIVE" or "lzfsCKPT"
         8    4 version        2; of the records, not of the directory's layout: another one is no record
        12    4 chunk_size     bytes
        16    8 device_size    bytes
        24   32 device_digest
        56   16 boot_id        /proc/sys/kernel/random/boot_id; zeros in a checkpoint
        72    8 generation     of the data file, `data.<16 hex>`
        80    4 crc32          of bytes 0..79

A checkpoint ends with the BLAKE3 digest of all before it. Anything in doubt is no record. Who calls: cache.device.
"""

from __future__ import annotations

import os
import struct
import uuid
import zlib
from array import array
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import xxhash

from lazyfs.image.digest import CHUNK_DIGEST_BYTES, chunk_digest
from lazyfs.image.table import chunk_count
from lazyfs.limits import CHUNK_SIZE_MAX_BYTES, CHUNK_SIZE_MIN_BYTES, DEVICE_BYTES_MAX

if TYPE_CHECKING:
    from lazyfs.image.digest import Digest

VERSION = 2
GENERATION_BYTES = 8
SUM_BYTES = 8
_HEADER = struct.Struct("<8sIIQ32s16s8s")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CRC.size
_ENTRY = struct.Struct("<QB")
_ENTRIES = np.dtype([("sum", "<u8"), ("present", "u1")])
ENTRY_BYTES = _ENTRY.size
_LIVE_MAGIC, _CHECKPOINT_MAGIC = b"lzfsLIVE", b"lzfsCKPT"
_NO_BOOT = bytes(16)
_BOOT_ID_PATH = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Identity:
    """What a data file must be: the device's digest, and the sizes in bytes."""

    digest: Digest
    chunk_size: int
    device_size: int

    @property
    def chunk_count(self) -> int:
        return chunk_count(self.device_size, self.chunk_size)


@dataclass(frozen=True, slots=True)
class Record:
    """A record: whose data file it describes, one byte (0 or 1) a chunk, and its sum where that is 1."""

    generation: bytes
    present: bytearray
    sums: array[int]

    @classmethod
    def empty(cls, generation: bytes, count: int) -> Self:
        """Of `count` chunks, none of which is there."""
        return cls(generation, bytearray(count), array("Q", bytes(SUM_BYTES * count)))


def checksum(data: bytes | memoryview) -> int:
    """XXH3-64 of a chunk's bytes."""
    return xxhash.xxh3_64_intdigest(data)


@lru_cache(maxsize=64)    # chunk sizes, and sizes of last chunks
def checksum_of_zeros(size: int) -> int:
    """Of so many bytes that are all zero."""
    return checksum(bytes(size))


def encode_entry(checksum: int, present: int) -> bytes:
    """One chunk's bytes in a live record."""
    return _ENTRY.pack(checksum, present)


def entry_offset(index: int) -> int:
    """Where chunk `index` is in a live record."""
    return HEADER_BYTES + index * ENTRY_BYTES


def read_boot_id() -> bytes:
    """16 bytes that change with every boot. Without /proc: random, so that only checkpoints count."""
    try:
        return uuid.UUID(_BOOT_ID_PATH.read_text().strip()).bytes
    except (OSError, ValueError):
        return os.urandom(16)


def encode_live(identity: Identity, record: Record, boot_id: bytes) -> bytes:
    entries = np.empty(len(record.present), dtype=_ENTRIES)
    entries["sum"], entries["present"] = record.sums, record.present
    return _header(_LIVE_MAGIC, identity, boot_id, record.generation) + entries.tobytes()


def encode_checkpoint(identity: Identity, record: Record) -> bytes:
    packed = np.packbits(np.frombuffer(record.present, dtype=np.uint8)).tobytes()
    sums = np.array(record.sums, dtype="<u8").tobytes()
    body = _header(_CHECKPOINT_MAGIC, identity, _NO_BOOT, record.generation) + packed + sums
    return body + chunk_digest(body)


def decode_live(data: bytes, identity: Identity, boot_id: bytes) -> Record | None:
    """The record, or None: of another boot, another device, another version, or damaged."""
    generation = _generation(data, _header(_LIVE_MAGIC, identity, boot_id, bytes(GENERATION_BYTES)))
    if generation is None or len(data) != HEADER_BYTES + identity.chunk_count * ENTRY_BYTES:
        return None
    entries = np.frombuffer(data, dtype=_ENTRIES, offset=HEADER_BYTES)
    present = bytearray(entries["present"].tobytes())
    if present.translate(None, b"\0\1"):
        return None
    return Record(generation, present, _sums(entries["sum"]))


def decode_checkpoint(data: bytes, identity: Identity) -> Record | None:
    """The record, or None: of another device, another version, or damaged."""
    generation = _generation(data, _header(_CHECKPOINT_MAGIC, identity, _NO_BOOT, bytes(GENERATION_BYTES)))
    count = identity.chunk_count
    sums_at = HEADER_BYTES + -(-count // 8)
    body_bytes = sums_at + count * SUM_BYTES
    if generation is None or len(data) != body_bytes + CHUNK_DIGEST_BYTES:
        return None
    if chunk_digest(data[:body_bytes]) != data[body_bytes:]:
        return None
    packed = np.frombuffer(data, dtype=np.uint8, count=sums_at - HEADER_BYTES, offset=HEADER_BYTES)
    sums = np.frombuffer(data, dtype="<u8", count=count, offset=sums_at)
    return Record(generation, bytearray(np.unpackbits(packed, count=count).tobytes()), _sums(sums))


def decode_any(data: bytes, digest: Digest, boot_id: bytes | None) -> Record | None:
    """As decode_live, or without a `boot_id` decode_checkpoint, of a device whose sizes only the record tells."""
    identity = identity_in(data, digest)
    if identity is None:
        return None
    return decode_checkpoint(data, identity) if boot_id is None else decode_live(data, identity, boot_id)


def identity_in(data: bytes, digest: Digest) -> Identity | None:
    """The sizes that a record of this device says, not checked any further; None: it is no record."""
    if len(data) < HEADER_BYTES:
        return None
    _, _, chunk_size, device_size, _, _, _ = _HEADER.unpack_from(data)
    if not CHUNK_SIZE_MIN_BYTES <= chunk_size <= CHUNK_SIZE_MAX_BYTES or device_size > DEVICE_BYTES_MAX:
        return None
    return Identity(digest, chunk_size, device_size)


def record_bytes_max(identity: Identity) -> int:
    """No record of this device is longer; what is, is damaged, and is not read into memory."""
    return HEADER_BYTES + identity.chunk_count * ENTRY_BYTES + CHUNK_DIGEST_BYTES


def _sums(stored: np.typing.NDArray[np.uint64]) -> array[int]:
    return array("Q", stored.astype("=u8").tobytes())


def _header(magic: bytes, identity: Identity, boot_id: bytes, generation: bytes) -> bytes:
    digest = bytes.fromhex(identity.digest.hex)
    head = _HEADER.pack(magic, VERSION, identity.chunk_size, identity.device_size, digest, boot_id, generation)
    return head + _CRC.pack(zlib.crc32(head))


def _generation(data: bytes, expected: bytes) -> bytes | None:
    """The generation that a record names, if its header is else as expected."""
    fixed_bytes = _HEADER.size - GENERATION_BYTES
    if len(data) < HEADER_BYTES or data[:fixed_bytes] != expected[:fixed_bytes]:
        return None
    if _CRC.unpack_from(data, _HEADER.size)[0] != zlib.crc32(data[: _HEADER.size]):
        return None
    return data[fixed_bytes : _HEADER.size]


assert HEADER_BYTES == 84
assert ENTRY_BYTES == _ENTRIES.itemsize == 9
