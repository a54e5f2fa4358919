"""
What is known of the disk below a cache directory: whether it takes writes now, and what was found damaged on it.

A disk that is full, read-only or broken must cost its readers nothing: when a write has failed, no other is tried for
a pause, then one, and so on with longer pauses, until one succeeds. The log says it once, at the beginning and at the
end; `describe()` says it as long as it lasts.

Layer: lazyfs.cache; thread-safe. State: one `Health` a CacheDir, shared by its devices. Who calls: cache.device around
its system calls, node.worker for `stats`.
"""

from __future__ import annotations

import errno
import logging
import random
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lazyfs.cache.space import Disk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
WRITE_PAUSE_FIRST_S, WRITE_PAUSE_MAX_S = 1.0, 30.0
# A failed fsync costs all that the device had, so a disk whose fsync fails is tried again much later.
SYNC_PAUSE_FIRST_S, SYNC_PAUSE_MAX_S = 30.0, 600.0
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class CacheStatistics:
    """Since the directory was opened, all devices. Approximate under races of threads; for people and metrics."""

    chunks_stored: int = 0
    chunks_not_stored: int = 0     # disk full, quota, floor of free space, I/O error, or a pause after one
    chunks_verified: int = 0       # read back and found right: by a scrub, or by a sampled read
    chunks_damaged: int = 0        # of these checks, those whose bytes were not the ones that had been stored
    chunks_unreadable: int = 0     # present, but the disk did not give them: I/O error, file cut short
    devices_dropped: int = 0       # fsync failed: all data of the device dropped
    checkpoints: int = 0
    checkpoint_errors: int = 0


@dataclass(slots=True)
class CacheCounters:
    """Of one device since it was opened. As approximate."""

    chunks_stored: int = 0
    store_errors: int = 0        # write() could not store: disk full, quota, floor of free space, I/O error
    chunks_forgotten: int = 0    # present, but could not be read back, or were damaged
    checkpoints: int = 0
    checkpoint_errors: int = 0
    drops: int = 0               # fsync failed: all data dropped


class Trouble:
    """One kind of operation, and how it has been failing. Without trouble `may_try` is one comparison."""

    def __init__(self, what: str, pause_first_s: float, pause_max_s: float,
                 clock: Callable[[], float] = time.monotonic) -> None:
        """`what`: for the log; pauses: the first one, and what it grows to by doubling."""
        self.what = what
        self._pause_first_s, self._pause_max_s = pause_first_s, pause_max_s
        self._clock = clock
        self._lock = threading.Lock()
        self._began: float | None = None
        self._began_at = 0.0             # since 1970
        self._why = ""
        self._until = self._pause_s = 0.0
        self._probing = False
        self._refused_count = 0
        self._free_bytes: int | None = None    # at the last failure for lack of space

    def may_try(self, fd: int = -1, size: int = 0) -> bool:
        """
        Whether to try; False: in a pause. True in trouble begins the next pause: the others wait for this one's end.

        Args:
            fd: on the file system. If it was full, more room ends the pause.
            size: how much is to be written, bytes.

        """
        if self._began is None:
            return True
        with self._lock:
            now = self._clock()
            if self._began is not None and now < self._until and not self._has_room_again(fd, size):
                self._refused_count += 1
                return False
            self._until = now + self._pause_s
            self._probing = True
            return True

    def failed(self, why: OSError) -> None:
        """It was tried in vain."""
        text = why.strerror or str(why)
        with self._lock:
            now = self._clock()
            begins = self._began is None
            if begins:
                self._began, self._began_at, self._pause_s = now, time.time(), self._pause_first_s
            elif self._probing:   # not for each of several threads that failed together
                self._pause_s = min(2 * self._pause_s, self._pause_max_s)
            self._probing = False
            self._why, self._until = text, now + self._pause_s
            self._free_bytes = None
        if begins:
            _log.warning("%s fails: %s; tried again from time to time", self.what, text)

    def failed_for_space(self, why: OSError, fd: int) -> None:
        """As `failed`; the pause ends early when the file system of `fd` has more room than now."""
        self.failed(why)
        try:
            free_bytes = Disk.of(fd).free_bytes
        except OSError:
            return
        with self._lock:
            self._free_bytes = free_bytes

    def worked(self) -> None:
        """It was tried, and succeeded."""
        with self._lock:
            if self._began is None:
                return
            took_s, refused, self._began = self._clock() - self._began, self._refused_count, None
            self._refused_count = 0
        _log.warning("%s works again after %.0f s; %d times it was not tried", self.what, took_s, refused)

    def describe(self) -> dict[str, Any] | None:
        """`what`, `why`, `since` (seconds since 1970), `refused` (count); None: there is no trouble."""
        with self._lock:
            if self._began is None:
                return None
            return {"what": self.what, "why": self._why, "since": self._began_at, "refused": self._refused_count}

    def _has_room_again(self, fd: int, size: int) -> bool:
        if self._free_bytes is None or fd < 0:
            return False
        try:
            return Disk.of(fd).free_bytes >= self._free_bytes + size
        except OSError:
            return False


@dataclass(slots=True)
class Health:
    """Of one cache directory."""

    writing: Trouble
    syncing: Trouble
    recording: Trouble
    statistics: CacheStatistics = field(default_factory=CacheStatistics)
    verify_every: int = 0            # one of so many first reads checks its chunk; 0: none
    _first_reads: int = 0

    @classmethod
    def of(cls, path: Path) -> Health:
        """In good health."""
        return cls(
            Trouble(f"cache {path}: storing", WRITE_PAUSE_FIRST_S, WRITE_PAUSE_MAX_S),
            Trouble(f"cache {path}: fsync", SYNC_PAUSE_FIRST_S, SYNC_PAUSE_MAX_S),
            Trouble(f"cache {path}: writing checkpoints", WRITE_PAUSE_FIRST_S, WRITE_PAUSE_MAX_S),
        )

    def is_sample(self) -> bool:
        """Whether this first read is one that checks its chunk. On one thread; which is the first one is random."""
        if not self.verify_every:
            return False
        if not self._first_reads:
            self._first_reads = random.randrange(self.verify_every)  # noqa: S311 - else a short start checks none
        self._first_reads += 1
        return self._first_reads % self.verify_every == 0

    def describe(self) -> dict[str, Any]:
        """For `stats`: the counters, and under `trouble` what fails now (Trouble.describe)."""
        found = [one.describe() for one in (self.writing, self.syncing, self.recording)]
        return {**asdict(self.statistics), "trouble": [one for one in found if one is not None]}
