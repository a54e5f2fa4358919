"""
One blob or file in pieces on disk: its data, which pieces are there, and their digests. Blocking.

    part/<name>.data      sparse, exactly `size` long
    part/<name>.record    which pieces, and their BLAKE3; written after the data, atomically
    whole/<name>          all of it, under this name only once its digest was checked and it is durable

A piece found after a restart counts only if its bytes still have the recorded digest: no write needs to be durable
before another. Layer: mirror. Who calls: mirror.piecedir (names, room), mirror.download (writes). State: descriptor and
flags; written by threads, a piece each, and read by the loop: a flag is set after its bytes are in the file.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING, Final

import msgspec

from lazyfs import shapes
from lazyfs.cache.files import pwrite_all, sync_directory
from lazyfs.errors import CacheError, FormatError
from lazyfs.image.digest import CHUNK_DIGEST_BYTES, Digest, chunk_digest
from lazyfs.limits import GIB, KIB, MIB
from lazyfs.peers.model import Kind, Resource

if TYPE_CHECKING:
    from pathlib import Path

PIECE_COUNT_MAX: Final = 1 << 20         # 4 TiB; a record of 33 MiB
_RECORD_VERSION: Final = 1
_FLAGS: Final = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


class _Record(msgspec.Struct):
    version: int
    key: str
    size: int
    piece_size: int
    present: bytes
    sums: bytes


def piece_size_for(size: int) -> int:
    """
    Bytes of a piece of something of `size` bytes: the same on every node, for it is part of what peers ask for.

    Few enough for a record, small enough that what comes in flows on soon.
    """
    return 256 * KIB if size <= 64 * MIB else MIB if size <= 4 * GIB else 4 * MIB


def resource_of(kind: Kind, digest: Digest, size: int) -> Resource:
    """
    A blob, or a file, as a resource.

    Raises:
        FormatError: it is empty, or larger than PIECE_COUNT_MAX pieces.

    """
    found = Resource(kind, digest, size, piece_size_for(size))
    if not 0 < found.piece_count <= PIECE_COUNT_MAX:
        raise FormatError(f"{found.key}: {size} bytes cannot be shared, expected 1 to {PIECE_COUNT_MAX * 4 * MIB}")
    return found


def file_name(resource: Resource) -> str:
    return f"{resource.kind}-{resource.digest.hex}"


def resource_named(name: str, size: int) -> Resource | None:
    """The resource of a file of `file_name`; None: it is none of ours."""
    kind, _, hexadecimal = name.partition("-")
    try:
        return resource_of(Kind(kind), Digest(f"sha256:{hexadecimal}"), size)
    except (ValueError, FormatError):
        return None


class PieceFile:
    """
    An open file of pieces. Referenced: made with one reference, closed with the last `release`.

    Attributes:
        present: a byte a piece.
        is_whole: it is in `whole/`, so all of it is there and checked.

    """

    def __init__(self, resource: Resource, file: int, *, is_whole: bool) -> None:
        self.resource = resource
        self.file = file
        self.is_whole = is_whole
        self.present = bytearray(resource.piece_count)
        self.sums = bytearray(CHUNK_DIGEST_BYTES * (0 if is_whole else resource.piece_count))
        self._references = 1
        if is_whole:
            self.present[:] = b"\1" * resource.piece_count

    @property
    def present_count(self) -> int:
        return self.present.count(1)

    def retain(self) -> None:
        """On the loop."""
        self._references += 1

    def release(self) -> None:
        """On the loop."""
        self._references -= 1
        if not self._references:
            os.close(self.file)
            self.file = -1

    def read(self, index: int) -> bytes:
        """
        A piece that is present.

        Raises:
            CacheError: the disk does not give it.

        """
        size = self.resource.piece_bytes(index)
        try:
            data = os.pread(self.file, size, index * self.resource.piece_size)
        except OSError as error:
            raise CacheError(f"{self.resource.key}: piece {index} cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise CacheError(f"{self.resource.key}: piece {index} has {len(data)} bytes on disk, expected {size}")
        return data

    def write(self, index: int, data: bytes | bytearray | memoryview) -> None:
        """Put a piece in its place; it is not `present` by that (`note`). Raises OSError."""
        pwrite_all(self.file, memoryview(data), index * self.resource.piece_size)
        start = index * CHUNK_DIGEST_BYTES
        self.sums[start:start + CHUNK_DIGEST_BYTES] = chunk_digest(data)

    def note(self, index: int) -> None:
        self.present[index] = 1

    def forget(self, index: int) -> None:
        self.present[index] = 0

    def sum_of(self, index: int) -> bytes:
        return bytes(self.sums[index * CHUNK_DIGEST_BYTES:(index + 1) * CHUNK_DIGEST_BYTES])


def open_whole(path: Path, resource: Resource) -> PieceFile | None:
    """What `whole/` has; None: it is not there, or not of that size."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_size != resource.size:
        os.close(file)
        return None
    return PieceFile(resource, file, is_whole=True)


def open_part(data: Path, record: Path, resource: Resource) -> PieceFile:
    """What `part/` has of it, each piece checked; or a new file. Raises OSError."""
    file = os.open(data, _FLAGS | os.O_CREAT, 0o600)
    try:
        found = PieceFile(resource, file, is_whole=False)
        if os.fstat(file).st_size == resource.size:
            _load(found, record)
        else:
            os.ftruncate(file, 0)
            os.ftruncate(file, resource.size)
    except BaseException:
        os.close(file)
        raise
    return found


def _load(found: PieceFile, record: Path) -> None:
    resource = found.resource
    try:
        saved = shapes.from_msgpack(record.read_bytes(), _Record)
    except (OSError, msgspec.MsgspecError):
        return
    count = resource.piece_count
    if (saved.version, saved.key, saved.size, saved.piece_size, len(saved.present), len(saved.sums)) != (
            _RECORD_VERSION, resource.key, resource.size, resource.piece_size, count, count * CHUNK_DIGEST_BYTES):
        return
    found.sums[:] = saved.sums
    for index in range(count):
        if saved.present[index] == 1:
            with contextlib.suppress(CacheError):
                if chunk_digest(found.read(index)) == found.sum_of(index):
                    found.note(index)


def write_record(found: PieceFile, record: Path) -> None:
    """What is present now, for the next start. Raises OSError."""
    resource = found.resource
    data = msgspec.msgpack.encode(_Record(_RECORD_VERSION, resource.key, resource.size, resource.piece_size,
                                          bytes(found.present), bytes(found.sums)))
    temporary = record.with_name(f"{record.name}.tmp")
    file = os.open(temporary, _FLAGS | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        pwrite_all(file, data, 0)
    finally:
        os.close(file)
    temporary.rename(record)


def make_whole(found: PieceFile, data: Path, record: Path, whole: Path) -> None:
    """All of it is there and checked: durable, then under its name in `whole/`. Raises OSError."""
    os.fdatasync(found.file)
    data.rename(whole)
    sync_directory(whole.parent)
    record.unlink(missing_ok=True)
    found.is_whole = True
