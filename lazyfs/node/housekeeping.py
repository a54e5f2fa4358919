"""
Keeping the cache within its limits: when to look, what is in use, what to evict; and how much an image takes.

Layer: node. Who calls: node.worker has one Housekeeper and runs it beside everything else, node.control passes on
USAGE and EVICT; cli.cache does the same to a directory that nobody serves (`evict_unserved`). Decisions are made in
cache.plan, removing in cache.evict. On the trio loop, but for what blocks. Invariant: an image's files go only in a
step of the loop in which no mount is being made and that image is not mounted; devices guard themselves.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import trio

from lazyfs import config
from lazyfs.cache import evict, inventory, pins, plan
from lazyfs.cache.space import Disk, Limits
from lazyfs.cache.store import CacheDir
from lazyfs.config.kinds import Amount, Size
from lazyfs.errors import BusyError, DiskFullError, LazyfsError, NotFoundError, UsageError
from lazyfs.fs import mountapi
from lazyfs.image.digest import Digest
from lazyfs.node.pinning import set_pin
from lazyfs.node.restore import State, state_of
from lazyfs.node.rundir import all_worker_dirs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from collections.abc import Set as AbstractSet
    from pathlib import Path

    from lazyfs.cache.inventory import Inventory
    from lazyfs.cache.plan import Plan

    Mounts = Mapping[str, list[str]]   # hex of an image's digest: where it is mounted

T = TypeVar("T")
ROOM_BYTES = 64 << 20            # made at once when a chunk could not be stored: some windows of prefetch
_PAUSE_S = 2.0                   # between two looks, however often room is asked for
_NAMES_MAX = 1000                # of one answer
_log = logging.getLogger("lazyfs.node")


class Serving(Protocol):
    """The worker, as seen from here."""

    @property
    def mounting(self) -> bool:
        """Whether a mount is being made (or unmade) now."""
        ...

    def images_in_use(self) -> dict[str, list[str]]:
        """Hex of the bootstrap's digest, and the targets, of all images that are mounted, detached or broken."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """
    What is asked for.

    Attributes:
        limits: keep to these; None: to the configured ones.
        everything: evict all that is not in use.
        remove: only this image or device: the name it was mounted by, or a digest.
        room_bytes: see plan.wanted_bytes.
        dry_run: only say what would go.

    """

    limits: Limits | None = None
    everything: bool = False
    remove: str | None = None
    room_bytes: int = 0
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        limits = self.limits and {"quota": self.limits.quota_bytes, "floor": str(self.limits.floor)}
        return {"limits": limits, "everything": self.everything, "remove": self.remove, "dry_run": self.dry_run}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises UsageError: no such request."""
        try:
            limits, remove = data.get("limits"), data.get("remove")
            if limits is not None:
                quota, floor = limits["quota"], Size(share=True).from_text(str(limits["floor"]))
                assert isinstance(floor, Amount)
                limits = Limits(int(quota), floor)
            text = None if remove is None else str(remove)
            return cls(limits, bool(data.get("everything")), text, 0, bool(data.get("dry_run")))
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise UsageError(f"malformed request to evict: {error}") from error


@dataclass(slots=True)
class Settings:
    """How often to look, and what to keep to."""

    limits: Limits = field(default_factory=Limits)
    interval_s: float = 30.0

    @classmethod
    def configured(cls) -> Self:
        """Of this machine. Blocking."""
        return cls.of(configured_cache())

    @classmethod
    def of(cls, found: config.Cache) -> Self:
        """Of a configuration."""
        return cls(Limits(found.quota_bytes, found.free_floor_bytes), found.evict_interval_s)


def configured_cache() -> config.Cache:
    """Of this machine. Blocking. A configuration that cannot be read is no reason not to serve: defaults then."""
    try:
        return config.load().cache
    except LazyfsError as error:
        _log.error("cache limits are the defaults: %s", error)
        return config.Cache()


class Housekeeper:
    """Of one worker."""

    def __init__(self, cache: CacheDir, serving: Serving) -> None:
        self._cache = cache
        self._serving = serving
        self._settings = Settings()
        self._one_at_a_time = trio.Lock()
        self._short = trio.Event()
        self.evicted = {"devices": 0, "bytes": 0}    # since the worker's start, for metrics

    async def run(self, configured: config.Cache | None = None) -> None:
        """Look now and then, and when room is short, for ever. `configured`: None reads it."""
        if configured is None:
            configured = await trio.to_thread.run_sync(configured_cache)
        self._settings = Settings.of(configured)
        self._cache.health.verify_every = configured.verify_reads
        space = self._cache.space
        space.limits = self._settings.limits
        token = trio.lowlevel.current_trio_token()

        def on_short() -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(self._room_is_short)

        space.on_short = on_short
        room_bytes = 0
        while True:
            try:
                await self.evict(Request(room_bytes=room_bytes))
            except (LazyfsError, OSError) as error:   # a disk that does not even say how large it is
                _log.warning("cache not tidied up: %s", error)
            await trio.sleep(_PAUSE_S)
            with trio.move_on_after(max(0.0, self._settings.interval_s - _PAUSE_S)):
                await self._short.wait()
            room_bytes = ROOM_BYTES if self._short.is_set() else 0
            self._short = trio.Event()

    def _room_is_short(self) -> None:
        self._short.set()

    async def evict(self, request: Request) -> dict[str, Any]:
        """
        Evict what the request and the limits ask for, and what crashes have left.

        Returns:
            See `_answer`.

        Raises:
            BusyError, NotFoundError: it cannot be removed. CacheError: the disk does not let us.

        """
        async with self._one_at_a_time:
            await trio.to_thread.run_sync(self._cache.tend)    # before anything of it is removed: is it still ours?
            counted_bytes = self._cache.space.used_bytes
            found = await trio.to_thread.run_sync(inventory.take, self._cache.path)
            self._cache.space.correct(found.use.size_bytes - counted_bytes)
            mounts, limits = self._serving.images_in_use(), request.limits or self._settings.limits
            wanted = _wanted(request, limits, found, self._cache.path)
            chosen = decide(request, wanted, found, self._cache.in_use(), mounts,
                            pinned=pins.pinned(self._cache.path))
            if request.dry_run:
                return _answer(found, chosen.devices, chosen.images, chosen, mounts)
            devices = await trio.to_thread.run_sync(evict.take_away, self._cache, chosen)
            images = self._take_images(chosen.images)
            if devices or images or found.leftovers:
                await trio.to_thread.run_sync(evict.clean, self._cache.path)
            answer = _answer(found, devices, images, chosen, self._serving.images_in_use())
            self._cache.space.correct(-answer["freed_bytes"])
            self.evicted["devices"] += len(devices)
            self.evicted["bytes"] += answer["freed_bytes"]
            if devices:
                _log.info("evicted %d devices, %d bytes", len(devices), answer["freed_bytes"])
            return answer

    async def with_room(self, function: Callable[..., T], *arguments: Any, abandon_on_cancel: bool = False) -> T:
        """Call a blocking function in a thread; once more if the disk was full and something could go."""
        def call() -> T:
            return function(*arguments)

        try:
            return await trio.to_thread.run_sync(call, abandon_on_cancel=abandon_on_cancel)
        except DiskFullError:
            if (await self.evict(Request(room_bytes=ROOM_BYTES)))["freed_bytes"] == 0:
                raise
        return await trio.to_thread.run_sync(call, abandon_on_cancel=abandon_on_cancel)

    async def pin(self, name: str, *, pinned: bool) -> dict[str, Any]:
        """See pinning.set_pin: while nothing is evicted."""
        async with self._one_at_a_time:
            return await trio.to_thread.run_sync(partial(set_pin, self._cache.path, name, pinned=pinned))

    async def usage(self, bootstrap: str | None) -> dict[str, Any]:
        """
        What the image with this bootstrap digest takes in the cache, or everything does (None).

        Returns:
            bytes (allocated), inodes, devices (how many), complete (whether all of these are there to the last chunk).

        Raises:
            FormatError: that is no digest.


        """
        return await trio.to_thread.run_sync(_usage, self._cache, bootstrap)

    def _take_images(self, names: Iterable[str]) -> tuple[str, ...]:
        """Not while a mount is being made: it may be of that very image. Then the next round does it."""
        if self._serving.mounting:
            return ()
        mounts = self._serving.images_in_use()
        return evict.take_away_images(self._cache.path, [name for name in names if name not in mounts])


def evict_unserved(path: Path, request: Request) -> dict[str, Any]:
    """
    As Housekeeper.evict, in a cache directory that no worker serves. Blocking.

    Raises:
        CacheOwnedError: one does: ask it. Others as there.

    """
    with CacheDir.open(path) as cache:
        found, mounts = inventory.take(cache.path), mounts_of(cache.path)
        limits = request.limits or Settings.configured().limits
        wanted = _wanted(request, limits, found, cache.path)
        chosen = decide(request, wanted, found, set(), mounts, pinned=pins.pinned(path))
        if request.dry_run:
            return _answer(found, chosen.devices, chosen.images, chosen, mounts)
        devices = evict.take_away(cache, chosen)
        images = evict.take_away_images(cache.path, chosen.images)
        evict.clean(cache.path)
        return _answer(found, devices, images, chosen, mounts)


def mounts_of(path: Path) -> dict[str, list[str]]:
    """Which images of a cache directory are mounted where, by the records of workers, live or dead."""
    found: dict[str, list[str]] = {}
    entries = mountapi.mounts()
    for directory in all_worker_dirs():
        for record in directory.records():
            if record.cache_dir == str(path) and state_of(record, directory, entries) is not State.GONE:
                found.setdefault(record.bootstrap.rpartition(":")[2], []).append(record.target)
    return found


def decide(request: Request, wanted: int, found: Inventory, devices_in_use: set[str], mounts: Mounts,
           *, pinned: AbstractSet[str] = frozenset()) -> Plan:
    """
    What should go: `wanted` bytes, if the request names nothing else. Pure. `pinned`: hex of bootstraps' digests.

    Raises:
        BusyError: what was named is in use, or pinned. NotFoundError: nothing here is called so.

    """
    devices, images = found.candidates(devices_in_use, {*mounts, *pinned})
    if request.remove is not None:
        return _decide_removal(request.remove, found, devices, images, mounts)
    if request.everything:
        return plan.choose_all(devices, images)
    return plan.choose(devices, images, wanted)


def _wanted(request: Request, limits: Limits, found: Inventory, path: Path) -> int:
    return plan.wanted_bytes(found.use.size_bytes, Disk.of(path), limits, room_bytes=request.room_bytes)


def _decide_removal(
    name: str, found: Inventory, devices: list[plan.Device], images: list[plan.Image], mounts: Mounts
) -> Plan:
    hexadecimal = name.removeprefix("sha256:")
    named = [one.name for one in found.images.values() if hexadecimal == one.name or name == one.record.image]
    if not named:
        return _decide_device_removal(hexadecimal, name, devices, images, mounts)
    for one in named:
        if one in mounts:
            raise BusyError(f"{name} is mounted on {', '.join(mounts[one])}",
                            hint="unmount it first: lazyfs umount; what containerd uses goes with its containers and "
                                 "images: ctr images rm")
    kept = {image.name for image in images if image.in_use}
    for one in named:
        if one in kept:
            raise BusyError(f"{name} is pinned", hint=f"unpin it first: lazyfs cache unpin {name}")
    gone: list[plan.Plan] = []
    for one in named:    # a tag that has moved is the name of several
        gone.append(plan.choose_image(devices, images, one))
        devices = [device for device in devices if device.name not in gone[-1].devices]
        images = [image for image in images if image.name != one]
    freed = sum(one.freed_bytes for one in gone)
    return plan.Plan(tuple(device for one in gone for device in one.devices),
                     tuple(image for one in gone for image in one.images), freed, freed)


def _decide_device_removal(
    hexadecimal: str, name: str, devices: list[plan.Device], images: list[plan.Image], mounts: Mounts
) -> Plan:
    device = next((one for one in devices if one.name == hexadecimal), None)
    if device is None:
        raise NotFoundError(f"{name} is not in the cache", hint="lazyfs cache ls shows what is")
    holders = [image.name for image in images if image.in_use and device.name in image.devices]
    users = [target for image in holders for target in mounts.get(image, ())]
    if holders and not users:
        raise BusyError(f"{name} is part of a pinned image", hint=f"lazyfs cache unpin sha256:{holders[0]}")
    if users or device.in_use:
        where = f"mounted on {', '.join(users)}" if users else "being read"
        raise BusyError(f"{name} is {where}", hint="unmount what uses it first: lazyfs umount")
    return plan.Plan((device.name,), (), device.size_bytes, device.size_bytes)


def _answer(
    found: Inventory, devices: Iterable[str], images: Iterable[str], chosen: Plan, mounts: Mounts
) -> dict[str, Any]:
    """For people and programs: what went (the first _NAMES_MAX of each), and sizes in bytes."""
    devices, images = list(devices), list(images)
    freed = sum(found.devices[name].use.size_bytes for name in devices)
    freed += sum(found.images[name].use.size_bytes for name in images) + found.leftover_use.size_bytes
    return {
        "devices": [f"sha256:{name}" for name in devices[:_NAMES_MAX]],
        "images": [{"bootstrap": f"sha256:{name}", "image": found.images[name].record.image}
                   for name in images[:_NAMES_MAX]],
        "device_count": len(devices),
        "image_count": len(images),
        "freed_bytes": freed,
        "used_bytes": found.use.size_bytes - freed,
        "wanted_bytes": chosen.wanted_bytes,
        "images_in_use": len(mounts),
    }


def _usage(cache: CacheDir, bootstrap: str | None) -> dict[str, Any]:
    if bootstrap is None:
        found = inventory.take(cache.path)
        use, devices = found.use, list(found.devices.values())
        known = all(name in found.devices for image in found.images.values() for name in image.record.devices)
    else:
        name = Digest(bootstrap).hex
        found = inventory.take_image(cache.path, name)
        use, devices = found.image_use(name), found.devices_of(name)
        known = name in found.images and set(found.images[name].record.devices) <= set(found.devices)
    hot = {image.record.hot for image in found.images.values()}   # what is in them is in the layers' devices too
    shares = [inventory.present_share(cache.path, one.name, cache.boot_id) for one in devices if one.name not in hot]
    complete = known and bool(found.images) and all(share == 1.0 for share in shares)
    return {"bytes": use.size_bytes, "inodes": use.inodes, "devices": len(devices), "complete": complete}
