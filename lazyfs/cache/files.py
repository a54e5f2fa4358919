"""
The files of one cached device, and the durable ways to make and replace them. Blocking.

    data.<16 hex>   uncompressed bytes, sparse, exactly device_size long
    live            cache.presence: which chunks, good for this boot
    checkpoint      cache.presence: which chunks, good for ever
    scrubbed        when it was last looked through (cache.scrub)
    *.tmp           being written; removed at the next open

Who calls: cache.device.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazyfs.cache import presence
from lazyfs.cache.presence import GENERATION_BYTES, Identity, Record

if TYPE_CHECKING:
    from array import array
    from pathlib import Path

_log = logging.getLogger(__name__)
_LIVE, _CHECKPOINT, _TEMPORARY = "live", "checkpoint", ".tmp"
RECORD_OF_SCRUB = "scrubbed"
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
# These say that the machine is short of something or does not let us, not that the cache is damaged.
_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)
_SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT)
_NOT_DAMAGE = _NO_RIGHT + _SHORTAGE
# Of a disk that serves what it has, but takes nothing.
NO_WRITES = (errno.EROFS, errno.EIO)


@dataclass(slots=True, eq=False)
class Generation:
    """One data file with its live record. A reader takes the object once and so never mixes two of them."""

    name: bytes
    data_path: Path
    data_fd: int
    live_fd: int
    present: bytearray    # one byte a chunk; the hot copy of the live record
    sums: array[int]      # of the chunks that are present

    def close(self) -> None:
        for fd in (self.data_fd, self.live_fd):
            if fd >= 0:
                os.close(fd)
        self.data_fd = self.live_fd = -1


def open_generation(directory: Path, identity: Identity, boot_id: bytes) -> tuple[Generation, Record | None]:
    """
    Open what the directory holds, or begin anew when that is in doubt.

    Returns:
        The generation, and what its checkpoint holds.

    Raises:
        OSError: this machine does not let us.

    """
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        found = _load(directory, identity, boot_id)
    except OSError as error:
        if error.errno in _NOT_DAMAGE:
            raise
        found = None
    if found is None:
        return create_generation(directory, identity, boot_id), None
    generation, saved = found
    with contextlib.suppress(OSError):   # what lies about besides does not matter
        _remove_others(directory, {generation.data_path.name, _LIVE, _CHECKPOINT, RECORD_OF_SCRUB})
    return generation, saved


def open_unkept(directory: Path, identity: Identity, boot_id: bytes) -> Generation:
    """
    What the directory holds, where nothing can be written: to be read only. What is not readable is not present.

    Raises:
        OSError: no memory, or no descriptor.

    """
    live_fd = os.memfd_create("lazyfs-live")
    try:
        with contextlib.suppress(OSError):
            saved = presence.decode_checkpoint(_read(directory / _CHECKPOINT, identity), identity)
            record = presence.decode_live(_read(directory / _LIVE, identity), identity, boot_id) or saved
            path = _data_path(directory, record.generation if record else b"")
            data_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            if record and os.fstat(data_fd).st_size == identity.device_size:
                return Generation(record.generation, path, data_fd, live_fd, record.present, record.sums)
            os.close(data_fd)
        empty = Record.empty(bytes(GENERATION_BYTES), identity.chunk_count)
        data_fd = os.memfd_create("lazyfs-nothing")
        return Generation(empty.generation, _data_path(directory, b""), data_fd, live_fd, empty.present, empty.sums)
    except BaseException:
        os.close(live_fd)
        raise


def create_generation(directory: Path, identity: Identity, boot_id: bytes) -> Generation:
    """Begin anew with an empty data file; whatever else the directory holds is removed. Raises OSError."""
    if directory.is_symlink() or not directory.is_dir():
        directory.unlink(missing_ok=True)
        directory.mkdir(mode=0o700)
    _remove_others(directory, set())
    name = os.urandom(GENERATION_BYTES)
    path = _data_path(directory, name)
    data_fd = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.ftruncate(data_fd, identity.device_size)
        record = Record.empty(name, identity.chunk_count)
        live_fd = _write_live(directory, identity, record, boot_id)
        return Generation(name, path, data_fd, live_fd, record.present, record.sums)
    except BaseException:
        os.close(data_fd)
        raise


def write_checkpoint(directory: Path, identity: Identity, record: Record) -> None:
    """Publish a checkpoint of data that fdatasync() has already made durable. Raises OSError."""
    temporary = directory / (_CHECKPOINT + _TEMPORARY)
    fd = os.open(temporary, _FLAGS | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        _write_all(fd, presence.encode_checkpoint(identity, record))
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.rename(directory / _CHECKPOINT)
    sync_directory(directory)


def is_in_place(generation: Generation) -> bool:
    """Whether its name still means its data file; if the disk does not say, it does."""
    try:
        there, ours = generation.data_path.lstat(), os.fstat(generation.data_fd)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def disown(directory: Path, bad: Generation) -> None:
    """The records on the disk still name data that is bad: without them, a restart begins anew. Best effort."""
    for name in (_LIVE, _CHECKPOINT):
        try:
            (directory / name).unlink(missing_ok=True)
        except OSError as error:
            _log.warning("%s: stale %s stays: %s", directory, name, error)
    try:
        os.ftruncate(bad.live_fd, 0)
    except OSError as error:
        _log.warning("%s: stale record stays: %s", directory, error)


def sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """All of it, however short the kernel writes. Raises OSError."""
    written = os.pwrite(fd, data, offset)
    while written < len(data):
        step = os.pwrite(fd, memoryview(data)[written:], offset + written)
        if step == 0:
            raise OSError(errno.EIO, "nothing written")
        written += step


def _load(directory: Path, identity: Identity, boot_id: bytes) -> tuple[Generation, Record | None] | None:
    checkpoint = presence.decode_checkpoint(_read(directory / _CHECKPOINT, identity), identity)
    live = presence.decode_live(_read(directory / _LIVE, identity), identity, boot_id)
    record = live or checkpoint
    if record is None:
        return None
    path = _data_path(directory, record.generation)
    data_fd = os.open(path, _FLAGS)
    try:
        status = os.fstat(data_fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size != identity.device_size:
            os.close(data_fd)
            return None
        # A live record of this boot goes on being written in place; any other is made anew from the checkpoint.
        live_fd = os.open(directory / _LIVE, _FLAGS) if live else _write_live(directory, identity, record, boot_id)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(data_fd)
        raise
    saved = checkpoint if checkpoint and checkpoint.generation == record.generation else None
    if saved is record:    # what is kept of it does not change with what is present
        saved = Record(saved.generation, saved.present[:], saved.sums[:])
    return Generation(record.generation, path, data_fd, live_fd, record.present, record.sums), saved


def _write_live(directory: Path, identity: Identity, record: Record, boot_id: bytes) -> int:
    # Not synced: after a crash of the machine its boot_id is an old one anyway.
    temporary = directory / (_LIVE + _TEMPORARY)
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        _write_all(fd, presence.encode_live(identity, record, boot_id))
        temporary.rename(directory / _LIVE)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _write_all(fd: int, data: bytes) -> None:
    pwrite_all(fd, data, 0)


def _read(path: Path, identity: Identity) -> bytes:
    """The bytes of a record, or b"" if it is not there, no plain file, or too long to be one."""
    limit = presence.record_bytes_max(identity)
    try:
        # O_NONBLOCK: a FIFO of that name must not hold us up.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _NOT_DAMAGE:
            raise
        return b""
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            return b""
        return os.pread(fd, limit, 0)    # short: no record, as any other damage
    finally:
        os.close(fd)


def _data_path(directory: Path, generation: bytes) -> Path:
    return directory / f"data.{generation.hex()}"


def _remove_others(directory: Path, kept: set[str]) -> None:
    for path in list(directory.iterdir()):
        if path.name in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
