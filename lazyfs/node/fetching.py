"""
`lazyfs cache fetch`: all of an image into the cache, mounted or not, because somebody asked for it.

Unlike the copy in the background (node.fullcopy) it begins at once, takes all of the link that reads and prefetch
leave, and has what nobody uses evicted when it needs room. A worker that takes over goes on with it: what was asked
for is in the run directory (`fetch-<hex>.json`, which may hold a password, and is for root only) until it is done.

Layer: node. Who calls: node.copying, in a worker; fetch_directly() for a cache directory that nobody serves. On the
trio loop; what blocks goes to threads.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import trio

from lazyfs.cache import pins
from lazyfs.cache.inventory import ImageRecord
from lazyfs.cache.store import CacheDir
from lazyfs.errors import BusyError, CacheError, LazyfsError, NotFoundError, SourceError
from lazyfs.fetch.device import FetchDevice
from lazyfs.fetch.engine import CopyTerms, Fetcher
from lazyfs.fs.isolate import error_to
from lazyfs.node import verifying
from lazyfs.node.copyplan import Share, missing_bytes
from lazyfs.node.copyrun import CopyRun
from lazyfs.node.housekeeping import Housekeeper, Request, mounts_of
from lazyfs.node.opening import open_image
from lazyfs.node.order import MountOrder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lazyfs.node.opening import OpenedImage
    from lazyfs.node.rundir import WorkerDir

QUIET_S, PATIENCE_S = 0.1, 1.0   # of a fetch: somebody waits for it, but readers wait more
COUNT_MAX = 64                   # at once; and so many that are over are remembered
_TRY_COUNT = 4                   # in a row without a byte; each is as patient as PREFETCH_FAILURE_COUNT_MAX attempts
_POLL_S = 0.2
OPENING, FETCHING, COMPLETE, FAILED = "opening", "fetching", "complete", "failed"
_log = logging.getLogger("lazyfs.node")


@dataclass(slots=True, eq=False)
class Fetch:
    """
    One image that was asked for.

    :state: opening | fetching | complete | failed; `error`: why it failed; `since`: seconds since 1970.
    :order: its target means nothing.
    """

    order: MountOrder
    rate_bytes_s: int
    pin: bool
    name: str = ""                                       # hex of its bootstrap's digest
    state: str = OPENING
    error: LazyfsError | None = None
    since: float = field(default_factory=time.time)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    run: CopyRun | None = None
    share: Share = field(default_factory=lambda: Share(0, 0))

    @property
    def over(self) -> bool:
        return self.state in {COMPLETE, FAILED}

    def become(self, state: str, error: LazyfsError | None = None) -> None:
        self.state, self.error, self.since = state, error, time.time()

    def describe(self) -> dict[str, Any]:
        """JSON."""
        share = self.share if self.run is None or self.over else self.run.share
        return {"image": self.order.image, "bootstrap": f"sha256:{self.name}" if self.name else "",
                "state": self.state, "reason": "" if self.error is None else str(self.error), "since": self.since,
                "error": None if self.error is None else error_to(self.error),
                "present_bytes": share.present_bytes, "total_bytes": share.total_bytes,
                "rate_bytes_s": 0 if self.run is None or self.over else round(self.run.rate_bytes_s)}


class Fetching:
    """Of one worker, or of the command itself."""

    def __init__(self, fetcher: Fetcher, cache: CacheDir, housekeeper: Housekeeper, directory: WorkerDir | None,
                 ended: Callable[[], None] = lambda: None) -> None:
        """`directory`: for who takes over; None: nobody does. `ended`: called after each."""
        self._fetcher = fetcher
        self._cache = cache
        self._housekeeper = housekeeper
        self._directory = directory
        self._ended = ended
        self._fetches: list[Fetch] = []
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be there for begin(), for ever; and go on with what a worker before this one was asked for."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for fetch in self._on_record():
                self._start(fetch)
            task_status.started()
            await trio.sleep_forever()

    def begin(self, order: MountOrder, rate_bytes_s: int, *, pin: bool) -> Fetch:
        """
        Begin to fetch an image; if that is under way already, it is that one. `rate_bytes_s` 0: no bound.

        Raises:
            BusyError: too many at once, or the worker is only starting.

        """
        for known in self._fetches:
            if known.order.image == order.image and known.order.platform == order.platform and not known.over:
                return known
        if self._nursery is None or sum(not one.over for one in self._fetches) >= COUNT_MAX:
            raise BusyError(f"{COUNT_MAX} images are being fetched already", hint="try again when some are there")
        self._fetches = [one for one in self._fetches if not one.over or one.order.image != order.image][-COUNT_MAX:]
        fetch = Fetch(order, rate_bytes_s, pin)
        self._start(fetch)
        return fetch

    def stop(self, image: str) -> bool:
        """Stop fetching an image; what has come stays. False: nobody does."""
        found = [one for one in self._fetches if one.order.image == image and not one.over]
        for one in found:
            one.scope.cancel()
        return bool(found)

    @property
    def busy(self) -> bool:
        return any(not one.over for one in self._fetches)

    def in_use(self) -> list[str]:
        """Hex of the bootstraps of the images that are being fetched."""
        return [one.name for one in self._fetches if one.name and not one.over]

    def describe(self) -> list[dict[str, Any]]:
        """Those under way, and those that ended last."""
        return [one.describe() for one in self._fetches]

    # --- one image ------------------------------------------------------------------------------------------------

    def _start(self, fetch: Fetch) -> None:
        assert self._nursery is not None
        self._fetches.append(fetch)
        self._nursery.start_soon(self._fetch, fetch)

    async def _fetch(self, fetch: Fetch) -> None:
        opened: OpenedImage | None = None
        devices: list[FetchDevice] = []
        try:
            with fetch.scope:
                admitted = await verifying.admit(fetch.order, self._cache.path)
                opened = await self._housekeeper.with_room(open_image, admitted, self._cache.path,
                                                           abandon_on_cancel=True)
                fetch.name = opened.layer.digest.hex
                self._note(fetch, opened)
                await trio.to_thread.run_sync(_keep, fetch, opened, self._cache.path)
                devices = await self._housekeeper.with_room(open_layers, opened, self._cache)
                self._fetcher.peering.use(devices, fetch.order)
                await self._all(fetch, devices)
                fetch.share = Share.of(devices)
                fetch.become(COMPLETE)
                _log.info("%s: fetched, %d MB", fetch.order.image, fetch.share.total_bytes // 1_000_000)
            if fetch.scope.cancelled_caught:
                fetch.become(FAILED, SourceError(f"{fetch.order.image}: stopped", transient=False))
        except (LazyfsError, OSError) as error:
            known = error if isinstance(error, LazyfsError) else CacheError(f"cache {self._cache.path}: {error}")
            fetch.become(FAILED, known)
            _log.warning("%s: not fetched: %s", fetch.order.image, known)
        finally:
            self._fetcher.peering.leave(devices)
            for device in devices:
                device.cached.release()
            if opened is not None:
                opened.close()
            if fetch.over and self._directory is not None and fetch.name:
                self._directory.remove_fetch(fetch.name)
            self._ended()

    async def _all(self, fetch: Fetch, devices: list[FetchDevice]) -> None:
        """Until all chunks are there. Raises LazyfsError: they are not to be had."""
        fetch.become(FETCHING)
        tries = 0
        while True:
            fetch.run = CopyRun(self._fetcher, devices, CopyTerms(fetch.rate_bytes_s, QUIET_S, PATIENCE_S))
            await fetch.run.run()
            if all(device.cached.complete for device in devices):
                return
            tries = 1 if fetch.run.handle.landed_bytes else tries + 1
            error = fetch.run.error
            if isinstance(error, CacheError):
                room = min(missing_bytes(devices), 1 << 40)
                if (await self._housekeeper.evict(Request(room_bytes=room)))["freed_bytes"]:
                    tries = 0
            if isinstance(error, NotFoundError) or tries >= _TRY_COUNT or (tries and isinstance(error, CacheError)):
                raise error or SourceError(f"{fetch.order.image}: chunks do not stay, or are damaged at the source",
                                           hint="lazyfs check IMAGE looks at the source")

    def _note(self, fetch: Fetch, opened: OpenedImage) -> None:
        """For the worker after this one. A run directory that is full ends nothing: then nobody goes on."""
        if self._directory is None:
            return
        layer = opened.layer
        order = replace(fetch.order, layer=(str(layer.digest), layer.size, layer.raw_size))
        with contextlib.suppress(OSError):
            self._directory.write_fetch(
                fetch.name, {"order": order.to_json(), "rate": fetch.rate_bytes_s, "pin": fetch.pin})

    def _on_record(self) -> Iterator[Fetch]:
        if self._directory is None:
            return
        for name, found in self._directory.fetches().items():
            try:
                yield Fetch(MountOrder.from_record(found["order"]), int(found["rate"]), bool(found["pin"]))
            except (LazyfsError, ValueError, LookupError, TypeError) as error:
                _log.warning("the fetch of sha256:%s is not gone on with: %s", name, error)
                self._directory.remove_fetch(name)


def open_layers(opened: OpenedImage, cache: CacheDir) -> list[FetchDevice]:
    """All layer devices of an image, open in the cache: all or none. Blocking. Raises CacheError, DiskFullError."""
    blobs = [(opened.source, blob.digest, blob.size) for blob in opened.blobs]
    found: list[FetchDevice] = []
    try:
        for digest, table in opened.devices:
            cached = cache.device(digest, table.chunk_size, table.device_size)
            try:
                found.append(FetchDevice(table, cached, blobs))
            except BaseException:
                cached.release()
                raise
    except BaseException:
        for device in found:
            device.cached.release()
        raise
    return found


def _keep(fetch: Fetch, opened: OpenedImage, path: Path) -> None:
    """What the cache remembers of the image, and its pin: before its data, so that they are never without a name."""
    known = ImageRecord.read(path, opened.layer.digest.hex)
    with contextlib.suppress(OSError):   # a full disk: then the image has no name until it is mounted
        ImageRecord(fetch.order.image, tuple(digest.hex for digest, _ in opened.devices), known.hot).write(
            path, opened.layer.digest)
    if fetch.pin:
        pins.pin(path, opened.layer.digest.hex)


@dataclass(frozen=True, slots=True)
class _Unserved:
    """What Housekeeper asks, of a directory without a worker: what dead ones have left mounted."""

    path: Path
    fetching: list[Fetching] = field(default_factory=list)

    @property
    def mounting(self) -> bool:
        return False

    def images_in_use(self) -> dict[str, list[str]]:
        found = mounts_of(self.path)
        for one in self.fetching:
            for name in one.in_use():
                found.setdefault(name, []).append("(being fetched)")
        return found


def fetch_directly(path: Path, order: MountOrder, rate_bytes_s: int, *, pin: bool,
                   progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """
    Fetch an image into a cache directory that no worker serves. Blocking, until it is there. Returns its description.

    Raises:
        CacheOwnedError: a worker does: ask it. LazyfsError: it is not to be had.

    """
    async def serve() -> Fetch:
        serving = _Unserved(cache.path)
        housekeeper = Housekeeper(cache, serving)
        async with Fetcher() as fetcher, trio.open_nursery() as nursery:
            fetching = Fetching(fetcher, cache, housekeeper, None)
            serving.fetching.append(fetching)
            nursery.start_soon(housekeeper.run)
            await nursery.start(fetching.run)
            fetch = fetching.begin(order, rate_bytes_s, pin=pin)
            while not fetch.over:
                await trio.sleep(_POLL_S)
                progress(fetch.describe())
            nursery.cancel_scope.cancel()
        return fetch

    with CacheDir.open(path) as cache:
        fetch = trio.run(serve)
    if fetch.error is not None:
        raise fetch.error
    return fetch.describe()
