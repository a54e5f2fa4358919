"""
What a cache directory holds, and what it takes on the disk: by layer device, by image, and what crashes have left.

    <path>/v1/<hex>/                  a layer device (cache.files); its last use is this directory's mtime
    <path>/bootstraps/<hex>.zst|.tar  an image's bootstrap, as it came | as it came unpacked
    <path>/images/<hex>.erofs         its EROFS image
    <path>/images/<hex>.plan          what to fetch ahead of it, by a list found beside it (node.listed)
    <path>/images/<hex>.json          its name and the devices it is made of: ImageRecord
    <path>/evicted/                   what is being removed (cache.evict)

Layer: lazyfs.cache. Who calls: cache.evict, node.housekeeping, cli.cache. Looking needs no lock: what changes or goes
meanwhile is seen as before or after. Files of names that are not ours are neither counted nor touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lazyfs import limits
from lazyfs.cache import presence
from lazyfs.cache.plan import Device, Image
from lazyfs.image.digest import Digest

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

# The number is of this layout. Records in it have versions of their own: what another one wrote counts as not there,
# and goes when the device is opened, or evicted.
DEVICES, BOOTSTRAPS, IMAGES, EVICTED = "v1", "bootstraps", "images", "evicted"
_HEX = re.compile(r"[0-9a-f]{64}")
_IMAGE_FILE = re.compile(r"([0-9a-f]{64})\.(zst|tar|erofs|json|plan)")
_TEMPORARY = re.compile(r"[0-9a-f]{64}\.(\d+)(?:-\d+)?\.tmp")
_BLOCK_BYTES = 512                                        # of st_blocks (stat(2)), whatever the file system's are
_NAME_CHARS_MAX = 4096
_RECORD_BYTES_MAX = 70 * (limits.DEVICE_COUNT_MAX + 1) + 8 * _NAME_CHARS_MAX
_PRESENCE_BYTES_MAX = 1024 + presence.ENTRY_BYTES * limits.CHUNK_COUNT_MAX       # of a live record


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """
    What the cache remembers of an image: how it was called when it was mounted last, and hex of its devices.

    `hot`: hex of its hot device's digest, or "": it has none, or all its layer devices were there to the last chunk.
    """

    image: str
    devices: tuple[str, ...]
    hot: str = ""

    @property
    def all_devices(self) -> tuple[str, ...]:
        """The hot device too: it is used when the image is, and goes as others do."""
        return (*self.devices, self.hot) if self.hot else self.devices

    def write(self, path: Path, digest: Digest) -> None:
        """Store atomically, and note the use; not synced: without it the image is fetched again. Raises OSError."""
        file = path / IMAGES / f"{digest.hex}.json"
        data = json.dumps({"image": self.image[:_NAME_CHARS_MAX], "devices": self.devices, "hot": self.hot}).encode()
        with contextlib.suppress(OSError):
            if file.read_bytes() == data:
                os.utime(file)
                return
        file.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
        temporary.write_bytes(data)
        temporary.replace(file)

    @classmethod
    def read(cls, path: Path, name: str) -> Self:
        """Of image `name`. Anything that is no record: an image of no name without devices."""
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
            with (path / IMAGES / f"{name}.json").open("rb") as file:
                data = json.loads(file.read(_RECORD_BYTES_MAX))
            image, devices, hot = data["image"], data["devices"], data.get("hot", "")
            names = [*devices, hot] if hot else devices
            if isinstance(image, str) and all(isinstance(one, str) and _HEX.fullmatch(one) for one in names):
                return cls(image, tuple(devices), hot)
        return cls("", ())


@dataclass(frozen=True, slots=True)
class Use:
    """Disk use: allocated bytes (sparse files take what was written), and inodes."""

    size_bytes: int = 0
    inodes: int = 0

    def __add__(self, other: Use) -> Use:
        return Use(self.size_bytes + other.size_bytes, self.inodes + other.inodes)


@dataclass(frozen=True, slots=True)
class FoundDevice:
    """`name`: hex of the device's digest."""

    name: str
    use: Use
    last_use_ns: int


@dataclass(slots=True)
class FoundImage:
    """`name`: hex of the bootstrap's digest. Its last use is the latest mtime of its files: mounted or unmounted."""

    name: str
    record: ImageRecord
    use: Use = Use()
    last_use_ns: int = 0


@dataclass(slots=True)
class Inventory:
    """`leftovers`: of crashes; nobody needs them."""

    devices: dict[str, FoundDevice] = field(default_factory=dict)
    images: dict[str, FoundImage] = field(default_factory=dict)
    leftovers: list[Path] = field(default_factory=list)
    leftover_use: Use = Use()

    @property
    def use(self) -> Use:
        """All of it together."""
        total = self.leftover_use
        for device in self.devices.values():
            total += device.use
        for image in self.images.values():
            total += image.use
        return total

    def devices_of(self, name: str) -> list[FoundDevice]:
        """An image's devices that are here, each once, with its hot device."""
        wanted = set(self.images[name].record.all_devices) if name in self.images else set()
        return [self.devices[device] for device in sorted(wanted) if device in self.devices]

    def named_devices(self, name: str) -> list[str] | None:
        """Devices (hex) of the images that were mounted by `name`, or have that digest; or the device that has it."""
        digest = name.removeprefix("sha256:")
        images = [one.name for one in self.images.values() if digest == one.name or name == one.record.image]
        if not images:
            return [digest] if digest in self.devices else None
        return sorted({device.name for image in images for device in self.devices_of(image)})

    def image_use(self, name: str) -> Use:
        """Of an image's own files and its devices."""
        total = self.images[name].use if name in self.images else Use()
        for device in self.devices_of(name):
            total += device.use
        return total

    def candidates(self, devices_in_use: Collection[str], images_in_use: Collection[str],
                   ) -> tuple[list[Device], list[Image]]:
        """For cache.plan."""
        devices = [Device(one.name, one.use.size_bytes, one.last_use_ns, one.name in devices_in_use)
                   for one in self.devices.values()]
        images = [Image(one.name, one.use.size_bytes, frozenset(one.record.all_devices), one.name in images_in_use)
                  for one in self.images.values()]
        return devices, images


def take(path: Path) -> Inventory:
    """Look at the cache directory `path`. What cannot be looked at is not counted. Blocking."""
    found = Inventory()
    for name in device_names(path):
        _take_device(found, path / DEVICES / name)
    for folder in (BOOTSTRAPS, IMAGES):
        for entry in _entries(path / folder):
            _take_image_file(found, path, Path(entry.path))
    found.leftovers = leftovers(path)
    for leftover in found.leftovers:
        found.leftover_use += _tree_use(leftover)
    return found


def device_names(path: Path) -> list[str]:
    """Hex of the digests of all devices that have a directory."""
    return [entry.name for entry in _entries(path / DEVICES) if _HEX.fullmatch(entry.name)]


def take_image(path: Path, name: str) -> Inventory:
    """As `take`, of one image (hex of its bootstrap's digest) and its devices only."""
    found = Inventory()
    for folder, ending in ((BOOTSTRAPS, "zst"), (BOOTSTRAPS, "tar"), (IMAGES, "erofs"), (IMAGES, "json"),
                           (IMAGES, "plan")):
        _take_image_file(found, path, path / folder / f"{name}.{ending}")
    if name in found.images:
        for device in found.images[name].record.all_devices:
            _take_device(found, path / DEVICES / device)
    return found


def leftovers(path: Path) -> list[Path]:
    """What was evicted and not deleted yet, and half-written files of other processes."""
    found = [Path(entry.path) for entry in _entries(path / EVICTED)]
    for folder in (BOOTSTRAPS, IMAGES):
        for entry in _entries(path / folder):
            match = _TEMPORARY.fullmatch(entry.name)
            if match is not None and int(match[1]) != os.getpid():    # ours may be being written right now
                found.append(Path(entry.path))
    return found


def present_share(path: Path, name: str, boot_id: bytes) -> float | None:
    """How much of device `name` is present, 0 to 1, by number of chunks; None: its records do not say."""
    found = _record_of(path, name, boot_id)
    if found is None:
        return None
    present = found[1].present
    return present.count(1) / len(present) if present else 1.0


def identity_of(path: Path, name: str, boot_id: bytes) -> presence.Identity | None:
    """Digest and sizes of device `name` as its records say; None: they do not, or nothing of it is present."""
    found = _record_of(path, name, boot_id)
    return found[0] if found is not None and found[1].present.count(1) else None


def _record_of(path: Path, name: str, boot_id: bytes) -> tuple[presence.Identity, presence.Record] | None:
    directory, digest = path / DEVICES / name, Digest(f"sha256:{name}")
    for file, boot in (("live", boot_id), ("checkpoint", None)):
        data = b""
        with contextlib.suppress(OSError), (directory / file).open("rb") as stream:
            data = stream.read(_PRESENCE_BYTES_MAX)
        record = presence.decode_any(data, digest, boot)
        identity = presence.identity_in(data, digest)
        if record is not None and identity is not None:
            return identity, record
    return None


def file_use(status: os.stat_result) -> Use:
    """Of one file."""
    return Use(status.st_blocks * _BLOCK_BYTES, 1)


def _take_device(found: Inventory, directory: Path) -> None:
    with contextlib.suppress(OSError):
        status = directory.lstat()
        if stat.S_ISDIR(status.st_mode):
            found.devices[directory.name] = FoundDevice(directory.name, _tree_use(directory), status.st_mtime_ns)


def _take_image_file(found: Inventory, path: Path, file: Path) -> None:
    match = _IMAGE_FILE.fullmatch(file.name)
    if match is None:
        return
    with contextlib.suppress(OSError):
        status = file.lstat()
        if match[1] not in found.images:
            found.images[match[1]] = FoundImage(match[1], ImageRecord.read(path, match[1]))
        image = found.images[match[1]]
        image.use += file_use(status)
        image.last_use_ns = max(image.last_use_ns, status.st_mtime_ns)


def _tree_use(path: Path) -> Use:
    """Of a file, or a directory and the files directly and further below it."""
    total = Use()
    pending = [path]
    while pending:
        one = pending.pop()
        with contextlib.suppress(OSError):
            status = one.lstat()
            total += file_use(status)
            if stat.S_ISDIR(status.st_mode):
                pending += [Path(entry.path) for entry in _entries(one)]
    return total


def _entries(directory: Path) -> Iterator[os.DirEntry[str]]:
    """In no order; nothing if there is no such directory."""
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        yield from entries
