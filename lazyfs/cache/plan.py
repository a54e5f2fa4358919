"""
What to evict: a decision and nothing else. Pure; no I/O, no clock.

Layer: lazyfs.cache. Who calls: cache.evict. Invariants: nothing that is in use is chosen, nor a device of an image
that is; devices go in the order of their last use, and no more of them than are needed; an image's own files go when
none of its devices is left, and are never a reason to keep a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lazyfs.cache.space import Disk, Limits

# Once over a limit, go this share of it below: else every chunk stored would be a reason to look again.
SLACK_SHARE = 0.05
# Of a small quota, room that somebody asks for is at most this share: not everything goes for one chunk.
ROOM_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Device:
    """A layer device in the cache: hex of its digest, disk use, time of its last use."""

    name: str
    size_bytes: int
    last_use_ns: int
    in_use: bool


@dataclass(frozen=True, slots=True)
class Image:
    """An image's own files (bootstrap, EROFS image): hex of the bootstrap's digest, disk use, its devices."""

    name: str
    size_bytes: int
    devices: frozenset[str]
    in_use: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes, in that order; `freed_bytes` < `wanted_bytes`: what is in use does not leave more."""

    devices: tuple[str, ...]
    images: tuple[str, ...]
    freed_bytes: int
    wanted_bytes: int


def wanted_bytes(used_bytes: int, disk: Disk, limits: Limits, *, room_bytes: int = 0) -> int:
    """
    How much should go.

    Args:
        used_bytes: what the cache directory uses.
        disk: its file system.
        limits: of the cache.
        room_bytes: so much should be free above the floor, whatever else (somebody found no room).

    """
    floor = limits.floor.of(disk.size_bytes)
    wanted = 0
    if limits.quota_bytes and used_bytes > limits.quota_bytes:
        wanted = used_bytes - int(limits.quota_bytes * (1 - SLACK_SHARE))
    if disk.free_bytes < floor:
        wanted = max(wanted, int(floor * (1 + SLACK_SHARE)) - disk.free_bytes)
    if room_bytes:
        wanted = max(wanted, floor + room_bytes - disk.free_bytes)
        if limits.quota_bytes:
            room = min(room_bytes, int(limits.quota_bytes * ROOM_SHARE))
            wanted = max(wanted, used_bytes + room - limits.quota_bytes)
    return min(wanted, used_bytes)


def choose(devices: Iterable[Device], images: Iterable[Image], wanted: int) -> Plan:
    """Choose at least `wanted` bytes, if there are so many that nobody uses. Images without devices always go."""
    devices, images = list(devices), list(images)
    kept = {device.name for device in devices}
    protected = {device.name for device in devices if device.in_use}
    for image in images:
        if image.in_use:
            protected |= image.devices
    left = {image.name: len(image.devices & kept) for image in images if not image.in_use}
    by_device: dict[str, list[Image]] = {}
    for image in images:
        if not image.in_use:
            for name in image.devices & kept:
                by_device.setdefault(name, []).append(image)
    gone = [image for image in images if left.get(image.name) == 0]
    freed = sum(image.size_bytes for image in gone)
    chosen: list[str] = []
    for device in sorted(devices, key=lambda one: (one.last_use_ns, one.name)):
        if freed >= wanted:
            break
        if device.name in protected:
            continue
        chosen.append(device.name)
        freed += device.size_bytes
        for image in by_device.get(device.name, ()):
            left[image.name] -= 1
            if left[image.name] == 0:
                gone.append(image)
                freed += image.size_bytes
    return Plan(tuple(chosen), tuple(image.name for image in gone), freed, max(0, wanted))


def choose_all(devices: Iterable[Device], images: Iterable[Image]) -> Plan:
    """All that nobody uses; also the own files of images whose devices stay, because others use them."""
    devices, images = list(devices), list(images)
    total = sum(one.size_bytes for one in devices) + sum(one.size_bytes for one in images)
    found = choose(devices, images, total + 1)    # + 1: also what takes no space
    more = [one for one in images if not one.in_use and one.name not in found.images]
    freed = found.freed_bytes + sum(one.size_bytes for one in more)
    return Plan(found.devices, found.images + tuple(one.name for one in more), freed, total)


def choose_image(devices: Iterable[Device], images: Iterable[Image], name: str) -> Plan:
    """An image's own files, and those of its devices that no other image here has. Nothing that is in use."""
    images = list(images)
    target = next((image for image in images if image.name == name and not image.in_use), None)
    if target is None:
        return Plan((), (), 0, 0)
    others: set[str] = set()
    for image in images:
        if image is not target:
            others |= image.devices
    chosen = [one for one in devices if one.name in target.devices - others and not one.in_use]
    freed = target.size_bytes + sum(one.size_bytes for one in chosen)
    return Plan(tuple(one.name for one in chosen), (target.name,), freed, freed)
