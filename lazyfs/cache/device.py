"""
One layer device in the cache.

Invariants: a chunk's present byte is set only after all its bytes are in the data file; it is durable (in the
checkpoint) only after they are. Bytes given to write() were checked by the caller. Everything is thread-safe:
`present`, `missing` and reads take no lock; writes of different chunks need none; checkpoint and drop take one.

Who calls: lazyfs.fetch (read, write), lazyfs.node (checkpoint, complete), through lazyfs.cache.store.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from lazyfs.cache import files
from lazyfs.cache.health import NO_SPACE, CacheCounters
from lazyfs.cache.presence import Identity, Record, checksum, checksum_of_zeros, encode_entry, entry_offset
from lazyfs.errors import CacheError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from lazyfs.cache.health import Health
    from lazyfs.cache.space import Space
    from lazyfs.image.digest import Digest

_log = logging.getLogger(__name__)
_USE_NOTED_EVERY_S = 600.0       # of a device in use; eviction asks who was used last, not when exactly
Reader = Callable[[int, int, int], bytes | memoryview]    # as os.pread; raises OSError


class CachedDevice:
    """Reference-counted; made by CacheDir.device() only. `retain` before use in a thread, `release` after it."""

    def __init__(
        self, directory: Path, identity: Identity, boot_id: bytes, space: Space, health: Health,
        *, on_unused: Callable[[CachedDevice], None],
    ) -> None:
        """Raises OSError: the files cannot be made."""
        self.used = False    # by more than a scrub: its end is a use of the device too
        self.digest: Digest = identity.digest
        self.chunk_size = identity.chunk_size
        self.device_size = identity.device_size
        self.chunk_count = identity.chunk_count
        self.counters = CacheCounters()
        self._identity = identity
        self._directory = directory
        self._boot_id = boot_id
        self._space = space
        self._health = health
        self._on_unused = on_unused
        self._use_noted_s = 0.0
        self._shift = identity.chunk_size.bit_length() - 1
        self._change = object()              # another one after each change of what is present
        self._saved: object | None = None    # the change that the checkpoint has
        self._durable = b""                  # the map that the checkpoint has
        self._storing = True
        self._kept = True                    # False: the disk takes no files, and this one is not to be written to
        try:
            self._generation = self._take_up()
        except OSError as error:
            if error.errno not in files.NO_WRITES:
                raise
            self._health.writing.failed(error)
            self._generation = files.open_unkept(directory, identity, boot_id)
            self._storing = self._kept = False
        self._inherited = bytes(self._generation.present)    # what was there when the device was opened
        self._dropped: list[files.Generation] = []
        self._reference_count = 1
        self._reference_lock = threading.Lock()
        self._checkpoint_lock = threading.Lock()

    def _take_up(self) -> files.Generation:
        generation, saved = files.open_generation(self._directory, self._identity, self._boot_id)
        self._durable = bytes(saved.present) if saved else b""
        self._saved = None
        if saved and (saved.present, saved.sums) == (generation.present, generation.sums):
            self._saved = self._change
        return generation

    @property
    def data_path(self) -> Path:
        """The file of uncompressed bytes; another one after a drop."""
        return self._generation.data_path

    @property
    def fd(self) -> int:
        """Open on data_path."""
        return self._generation.data_fd

    def presence(self) -> bytes:
        """A byte a chunk: 1 if it can be read. A copy, as of now."""
        return bytes(self._generation.present)

    @property
    def present_count(self) -> int:
        return self._generation.present.count(1)

    @property
    def complete(self) -> bool:
        """All chunks are in the data file (durable or not: see make_durable)."""
        return self._generation.present.find(0) < 0

    def present(self, first: int, last: int) -> bool:
        """Whether all chunks from `first` to `last`, inclusive, can be read."""
        return self._generation.present.find(0, first, last + 1) < 0

    def descriptor(self, index: int) -> int | None:
        """Of the file that chunk `index` lies in, at its offset; None: it is not present. For who holds a reference."""
        generation = self._generation
        return generation.data_fd if generation.present[index] else None

    def inherited(self, index: int) -> bool:
        """Whether it was there when the device was opened: what was stored since is in the page cache."""
        return bool(self._inherited[index])

    def missing(self, first: int, last: int) -> list[int]:
        """The chunks from `first` to `last`, inclusive, that are not present; ascending."""
        present = self._generation.present
        found: list[int] = []
        index = present.find(0, first, last + 1)
        while index >= 0:
            found.append(index)
            index = present.find(0, index + 1, last + 1)
        return found

    def read_if_present(self, offset: int, size: int) -> bytes | None:
        """Exactly `size` bytes (> 0, within the device), or None: some chunk is not there, or cannot be read back."""
        generation = self._generation
        first, last = offset >> self._shift, (offset + size - 1) >> self._shift
        if generation.present.find(0, first, last + 1) >= 0:
            return None
        try:
            data = os.pread(generation.data_fd, size, offset)
        except OSError as error:
            self._health.writing.failed(error)    # so that it is served from memory, and not stored there again at once
            self._unreadable(generation, first, last, str(error))
            return None
        if len(data) != size:
            self._unreadable(generation, first, last, f"file ends at {offset + len(data)}")
            return None
        return data

    def read(self, offset: int, size: int) -> bytes:
        """
        Exactly `size` bytes of present chunks.

        Raises:
            CacheError: not present (any more).

        """
        data = self.read_if_present(offset, size) if size else b""
        if data is None:
            raise CacheError(f"cached device {self.digest.short}: bytes {offset} + {size} are not there")
        return data

    def write(self, index: int, data: bytes | memoryview) -> bool:
        """
        Store chunk `index`: exactly its bytes, already checked.

        Returns:
            False if it could not be stored (disk full, quota, I/O error): the chunk is then not present.

        """
        generation = self._generation
        expected = min(self.chunk_size, self.device_size - index * self.chunk_size)
        assert len(data) == expected, "a chunk is stored whole or not at all"
        health = self._health
        if not (health.syncing.may_try() and health.writing.may_try(generation.data_fd, expected)
                and (self._storing or self._store_again())):
            self._not_stored()
            return False
        if not self._space.admit(generation.data_fd, expected):
            if self.counters.store_errors == 0:
                _log.warning("cached device %s: not stored, served from memory: the cache is at its limits",
                             self.digest.short)
            self._not_stored()
            return False
        try:
            files.pwrite_all(generation.data_fd, data, index << self._shift)
        except OSError as error:
            self._space.give_back(expected)
            self._store_failed(error, generation.data_fd)
            return False
        health.writing.worked()
        self._set_present(generation, index, checksum(data))
        self.counters.chunks_stored += 1
        health.statistics.chunks_stored += 1
        return True

    def mark_zeros(self, indexes: Iterable[int]) -> None:
        """Chunks that are all zeros: present without storing, for the data file has a hole there."""
        generation = self._generation
        for index in indexes:
            if not generation.present[index]:
                self._set_present(generation, index, checksum_of_zeros(self._chunk_bytes(index)))

    def verify(self, index: int, read: Reader | None = None) -> bool | None:
        """
        Whether chunk `index` still has the bytes that were stored. If not, it is not present any more. Blocking.

        Args:
            index: of the chunk.
            read: how to read the data file; None: pread(2), that is what readers get.

        Returns:
            None: it is not there, or has just been written anew.

        """
        generation = self._generation
        size, reason = self._chunk_bytes(index), "other bytes than were stored"
        for _ in range(2):    # a chunk that is being written anew may be read in halves, but hardly twice
            expected = generation.sums[index]
            if not generation.present[index]:
                return None
            try:
                data = (read or os.pread)(generation.data_fd, size, index << self._shift)
            except OSError as error:
                data, reason = b"", str(error)
            if len(data) == size and checksum(data) == expected:
                self._health.statistics.chunks_verified += 1
                return True
        if not generation.present[index] or generation.sums[index] != expected:
            return None
        self._health.statistics.chunks_damaged += 1
        _log.error("cached device %s: chunk %d is damaged on the disk, and is fetched again: %s",
                   self.digest.short, index, reason)
        self._forget(generation, index, index)
        return False

    def sample(self, indexes: Iterable[int]) -> list[int]:
        """
        Of chunks that are read for the first time, those to verify before: one of so many that were there already.

        On the loop only. A chunk that was stored since then is in the page cache, where nothing rots.
        """
        return [index for index in indexes
                if self._inherited[index] and self._generation.present[index] and self._health.is_sample()]

    def checkpoint(self) -> bool:
        """
        Make durable what is present now. Blocking (fdatasync); nothing to do is quick.

        Returns:
            False if it could not be done. When syncing the data failed, all of it has been dropped: after a failed
            fsync the kernel calls the pages clean, and a second fsync would succeed without them (fsync(2)).

        """
        with self._checkpoint_lock:
            change, generation = self._change, self._generation
            # before the sync: the data of these chunks was written before it
            record = Record(generation.name, bytearray(generation.present), generation.sums[:])
            if change is self._saved or not (self._durable or record.present.count(1)):
                return True
            try:
                os.fdatasync(generation.data_fd)
            except OSError as error:
                self._drop(error)
                return False
            health = self._health
            health.syncing.worked()
            try:
                files.write_checkpoint(self._directory, self._identity, record)
                if not self._durable:
                    files.sync_directory(self._directory.parent)    # the first one: the directory itself is new
            except OSError as error:
                self.counters.checkpoint_errors += 1
                health.statistics.checkpoint_errors += 1
                health.recording.failed(error)
                return False
            health.recording.worked()
            self._durable, self._saved = bytes(record.present), change
            self.counters.checkpoints += 1
            health.statistics.checkpoints += 1
            return True

    def make_durable(self) -> bool:
        """Checkpoint; whether the data file now holds the whole device, durably."""
        return self.complete and self.checkpoint() and self._durable.count(1) == self.chunk_count

    def retain(self) -> None:
        with self._reference_lock:
            assert self._reference_count > 0, "retained after its last release"
            self._reference_count += 1

    def release(self) -> None:
        """Give one reference back; the last one closes the files."""
        with self._reference_lock:
            self._reference_count -= 1
            last = self._reference_count == 0
        if last:
            self._on_unused(self)

    def try_retain(self) -> bool:
        """Retain, unless the last reference is already gone."""
        with self._reference_lock:
            if self._reference_count == 0:
                return False
            self._reference_count += 1
            return True

    def renew_if_gone(self) -> bool:
        """
        Take up what is in the directory now if the data file is not in it any more. Blocking.

        Returns:
            True if so. Reads under way, and the kernel's mounts, go on with the old file.

        """
        with self._checkpoint_lock:
            old = self._generation
            if not self._kept or files.is_in_place(old):
                return False
            try:
                new = self._take_up()
            except OSError as error:
                self._health.writing.failed(error)
                return False
            self._dropped.append(old)
            self._generation, self._storing = new, True
            return True

    def note_use(self, *, at_once: bool = True) -> None:
        """The device is used: noted on the disk (the mtime of its directory); rarely, unless `at_once`."""
        self.used = True
        now = time.monotonic()
        if at_once or now - self._use_noted_s >= _USE_NOTED_EVERY_S:
            self._use_noted_s = now
            try:
                os.utime(self._directory)
            except OSError as error:
                _log.info("cached device %s: time of use not noted: %s", self.digest.short, error)

    def close_files(self) -> None:
        """For CacheDir: after the last release."""
        for generation in (*self._dropped, self._generation):
            generation.close()

    def _chunk_bytes(self, index: int) -> int:
        return min(self.chunk_size, self.device_size - (index << self._shift))

    def _set_present(self, generation: files.Generation, index: int, chunk_sum: int) -> None:
        generation.sums[index] = chunk_sum
        generation.present[index] = 1
        self._change = object()
        try:
            os.pwrite(generation.live_fd, encode_entry(chunk_sum, 1), entry_offset(index))
        except OSError:
            self.counters.store_errors += 1    # costs one fetch after a restart, nothing now

    def _unreadable(self, generation: files.Generation, first: int, last: int, reason: str) -> None:
        _log.warning("cached device %s: chunks %d to %d unreadable: %s", self.digest.short, first, last, reason)
        self._health.statistics.chunks_unreadable += last - first + 1
        self._forget(generation, first, last)

    def _forget(self, generation: files.Generation, first: int, last: int) -> None:
        self.counters.chunks_forgotten += last - first + 1
        for index in range(first, last + 1):
            generation.present[index] = 0
        self._change = object()
        try:
            os.pwrite(generation.live_fd, encode_entry(0, 0) * (last - first + 1), entry_offset(first))
        except OSError:
            self.counters.store_errors += 1

    def _not_stored(self) -> None:
        self.counters.store_errors += 1
        self._health.statistics.chunks_not_stored += 1

    def _store_failed(self, error: OSError, fd: int) -> None:
        if error.errno in NO_SPACE:
            self._health.writing.failed_for_space(error, fd)
            self._space.short()
        else:
            self._health.writing.failed(error)
        self._not_stored()

    def _drop(self, error: OSError) -> None:
        """Forget everything and begin a new data file. The old one stays open for reads that have begun."""
        _log.error("cached device %s: data dropped, fsync failed: %s", self.digest.short, error)
        self.counters.drops += 1
        self._health.statistics.devices_dropped += 1
        self._health.syncing.failed(error)
        old = self._generation
        old.present[:] = bytes(len(old.present))
        self._durable, self._saved = b"", None
        self._storing = False
        if not self._begin_anew():
            files.disown(self._directory, old)

    def _begin_anew(self) -> bool:
        try:
            if self._kept:
                new = files.create_generation(self._directory, self._identity, self._boot_id)
            else:
                new = self._take_up()
        except OSError as error:
            _log.info("cached device %s: no new data file: %s", self.digest.short, error)
            self._health.writing.failed(error)
            return False
        self._dropped.append(self._generation)
        self._generation = new
        self._storing = self._kept = True
        return True

    def _store_again(self) -> bool:
        """After a new data file could not be made; the next chunk then goes there."""
        if self._checkpoint_lock.acquire(blocking=False):
            try:
                if not self._storing:
                    self._begin_anew()
            finally:
                self._checkpoint_lock.release()
        return False
