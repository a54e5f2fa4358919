"""
The full copy in the background: which mounted image is copied when, and how gently. So that an outage harms nobody.

An image that is read is copied as a whole, some time after its first read: one image at a time, the one with the
smallest rest first, for so the most images soonest need no network. The copy ends with the mount, or with the last
container (Prefetching.rest), and goes on where it was with the next one, or the next worker: what has landed is there.
It never makes room for itself: where the cache is at its limits it waits.

Layer: node. Who calls: node.serving and node.daemonworker run it beside everything else, node.worker asks for its
state. On the trio loop. State: a Progress an image (by its bootstrap), of those that are mounted.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from lazyfs import config
from lazyfs.cache.space import Disk
from lazyfs.fetch.engine import CopyTerms
from lazyfs.limits import MIB
from lazyfs.node.copyplan import Share
from lazyfs.node.copyrun import SAVING, CopyRun
from lazyfs.node.housekeeping import configured_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lazyfs.cache.store import CacheDir
    from lazyfs.fetch.device import FetchDevice
    from lazyfs.fetch.engine import Fetcher
    from lazyfs.node.mounted import MountedImage

TICK_S = 1.0                     # how soon a first read, an end, a limit is noticed
GENTLY = CopyTerms()
IDLE_QUIET_S = 5.0               # policy idle: so long nobody read anything
ROOM_BYTES = 64 * MIB            # uncompressed; kept free of copies, for reads: at most a part of a small quota
_ROOM_SHARE = 0.1
_RETRY_FIRST_S, _RETRY_MAX_S = 15.0, 600.0    # after a copy that failed; doubles
ROOM, READS = "the cache is full", "reads"    # reasons to hold
NO_CONTAINER = "no container uses it"         # a reason to wait
_log = logging.getLogger("lazyfs.node")


@dataclass(slots=True)
class CopyStatistics:
    """Since the worker's start. Bytes and chunks of copies are in fetch.statistics."""

    started: int = 0
    completed: int = 0
    failed: int = 0               # ended without all chunks; tried again
    held_for_room: int = 0        # times that a copy, or its beginning, waited for room in the cache


@dataclass(slots=True)
class Progress:
    """
    Of one image's copy.

    :state: off | waiting | copying | paused | failed | complete; `reason`: why, where that is not plain; `since`:
        seconds since 1970.
    :due: time.monotonic() seconds, from when it may be copied; None: nobody has read from the image.
    """

    state: str = "waiting"
    reason: str = ""
    since: float = field(default_factory=time.time)
    due: float | None = None
    failure_count: int = 0

    def become(self, state: str, reason: str = "") -> None:
        if (state, reason) != (self.state, self.reason):
            self.state, self.reason, self.since = state, reason, time.time()


class FullCopies:
    """See the module."""

    def __init__(self, fetcher: Fetcher, cache: CacheDir, mounts: Callable[[], Iterable[MountedImage]],
                 note: Callable[[MountedImage], None]) -> None:
        """`mounts`: those that are attached. `note`: writes a mount's record again."""
        self._fetcher = fetcher
        self._cache = cache
        self._mounts = mounts
        self._note = note
        self._settings = config.Cache()
        self._known: dict[str, Progress] = {}     # by hex of the bootstrap's digest
        self._run: CopyRun | None = None          # the one under way, and whose it is
        self._of: MountedImage | None = None
        self._read_count = 0                      # of the fetcher, at the last tick that saw it change
        self._read_at = -IDLE_QUIET_S
        self.statistics = CopyStatistics()

    async def run(self, configured: config.Cache | None = None) -> None:
        """Copy what is to be copied, for ever. `configured`: None reads it."""
        if configured is None:
            configured = await trio.to_thread.run_sync(configured_cache)
        self._settings = configured
        async with trio.open_nursery() as nursery:
            while True:
                self._tick(nursery)
                await trio.sleep(TICK_S)

    def describe(self, mounted: MountedImage) -> dict[str, Any]:
        """
        JSON: state, reason, since (see Progress); present_bytes, total_bytes (stored); rate_bytes_s.

        The state is that of the last tick.
        """
        devices = [one.device for one in mounted.devices]
        share = Share.of(devices)
        progress = self._known.get(_name(mounted), Progress())
        running = self._run if self._of is not None and _name(self._of) == _name(mounted) else None
        complete = mounted.complete()
        return {"state": "complete" if complete else progress.state, "reason": "" if complete else progress.reason,
                "since": progress.since, "present_bytes": share.present_bytes, "total_bytes": share.total_bytes,
                "rate_bytes_s": round(running.rate_bytes_s) if running is not None and not complete else 0}

    def counters(self) -> dict[str, int]:
        """See CopyStatistics."""
        return asdict(self.statistics)

    # --- one look -------------------------------------------------------------------------------------------------

    def _tick(self, nursery: trio.Nursery) -> None:
        images = {_name(mounted): mounted for mounted in self._mounts() if mounted.devices}
        for name in set(self._known) - set(images):
            del self._known[name]
        for name, mounted in images.items():
            self._look(self._known.setdefault(name, Progress()), mounted)
        self._look_at_reads()
        self._go_on()
        if self._run is None:
            self._begin(nursery, images)

    def _look(self, progress: Progress, mounted: MountedImage) -> None:
        """Whether it is to be copied, and since when."""
        if mounted.complete():
            progress.become("complete")
        elif self._policy(mounted) == "off":
            progress.become("off")
        elif mounted.resting:
            progress.become("waiting", NO_CONTAINER)
        elif progress.due is None:
            progress.become("waiting", "nobody has read from it")
            if mounted.was_read:
                # a worker that takes over goes on at once; the delay was another's
                progress.due = time.monotonic() + (0 if mounted.read_before else self._settings.full_copy_after_s)
                progress.become("waiting", "its start")
                if not mounted.read_before:
                    mounted.read_before = True
                    self._note(mounted)
        elif progress.state in {"complete", "off"}:
            progress.become("waiting", "chunks were lost")

    def _policy(self, mounted: MountedImage) -> str:
        if mounted.order.record:
            return "off"
        return mounted.order.full_copy or self._settings.full_copy

    def _look_at_reads(self) -> None:
        statistics = self._fetcher.statistics
        count = statistics.hits + statistics.misses
        if count != self._read_count:
            self._read_count, self._read_at = count, time.monotonic()

    def _go_on(self) -> None:
        """The one that is under way: hold it, let it go, or stop it."""
        run = self._run
        if run is None or self._of is None:
            return
        policy, progress = self._policy(self._of), self._known.get(_name(self._of))
        if progress is None or policy == "off" or self._of.resting or not self._of.devices:
            run.handle.cancel()
            return
        run.hold(READS, held=policy == "idle" and time.monotonic() - self._read_at < IDLE_QUIET_S)
        holds = run.holds - {SAVING}
        if run.handle.lacks_room:
            holds.add(ROOM)
            self.statistics.held_for_room += progress.reason != ROOM
        if holds:
            progress.become("paused", ", ".join(sorted(holds)))
        elif run.handle.last_error is not None:
            progress.become("paused", str(run.handle.last_error))
        elif run.handle.making_way:
            progress.become("paused", READS)
        else:
            progress.become("copying")

    def _begin(self, nursery: trio.Nursery, images: dict[str, MountedImage]) -> None:
        now = time.monotonic()
        due = [mounted for name, mounted in images.items()
               if not mounted.resting and self._known[name].state in {"waiting", "failed", "paused"}
               and (at := self._known[name].due) is not None and at <= now]
        if not due:
            return
        due.sort(key=lambda mounted: Share.of(_devices(mounted)).left_bytes)
        for mounted in due[1:]:
            if self._known[_name(mounted)].state != "failed":
                self._known[_name(mounted)].become("waiting", "another image is copied first")
        mounted = due[0]
        progress = self._known[_name(mounted)]
        idle = self._policy(mounted) == "idle"
        terms = CopyTerms(self._settings.full_copy_rate, IDLE_QUIET_S if idle else GENTLY.quiet_s,
                          float("inf") if idle else GENTLY.patience_s, partial(has_room, self._cache))
        self._run, self._of = CopyRun(self._fetcher, _devices(mounted), terms), mounted
        mounted.copy = self._run.handle
        progress.become("copying")
        self.statistics.started += 1
        share = Share.of(_devices(mounted))
        _log.info("%s: copying the rest of it, %d of %d MB", mounted.order.image, share.left_bytes // 1_000_000,
                  share.total_bytes // 1_000_000)
        nursery.start_soon(self._copy, self._run, mounted, progress)

    async def _copy(self, run: CopyRun, mounted: MountedImage, progress: Progress) -> None:
        await run.run()
        self._run = self._of = mounted.copy = None
        if not mounted.devices:
            return                 # unmounted
        if mounted.complete():
            progress.become("complete")
            self.statistics.completed += 1
            _log.info("%s: all of it is here; it needs no network any more", mounted.order.image)
        elif run.error is None and run.handle.cancelled:
            progress.become("waiting", NO_CONTAINER if mounted.resting else "")
        else:
            self._failed(run, mounted, progress)

    def _failed(self, run: CopyRun, mounted: MountedImage, progress: Progress) -> None:
        """Or no error, but not all is there: chunks that were damaged, or do not stay. Another try, later."""
        reason = str(run.error) if run.error is not None else "some of its chunks did not arrive, or do not stay"
        if run.handle.landed_bytes:
            progress.failure_count = 0
        progress.due = time.monotonic() + min(_RETRY_FIRST_S * 2**progress.failure_count, _RETRY_MAX_S)
        progress.failure_count = min(progress.failure_count + 1, 16)
        self.statistics.failed += 1
        if progress.state != "failed":
            _log.warning("%s: not copied: %s", mounted.order.image, reason)
        progress.become("failed", reason)


def has_room(cache: CacheDir, size_bytes: int) -> bool:
    """
    Whether a copy may store so many more bytes: nothing of others is evicted for it, and reads keep some room.

    It looks at the disk (statvfs: a microsecond). A disk that does not say how full it is has none.
    """
    limits, used_bytes = cache.space.limits, cache.space.used_bytes
    if limits.quota_bytes:
        spare = min(ROOM_BYTES, int(limits.quota_bytes * _ROOM_SHARE))
        if used_bytes + size_bytes + spare > limits.quota_bytes:
            return False
    try:
        disk = Disk.of(cache.path)
    except OSError:
        return False
    return disk.free_bytes - size_bytes - ROOM_BYTES >= limits.floor.of(disk.size_bytes)


def _name(mounted: MountedImage) -> str:
    return mounted.opened.layer.digest.hex


def _devices(mounted: MountedImage) -> list[FetchDevice]:
    return [one.device for one in mounted.devices]
