"""
The cache directory of a node: owned by one process, one CachedDevice object a layer device.

    <path>/lock                           flock, holder's pid
    <path>/v1/<device digest, 64 hex>/    cache.files
    <path>/evicted/                       on its way out: cache.evict

The version is in the path: another version finds nothing and touches nothing. Layer: lazyfs.cache. Who calls:
lazyfs.node (open, device, checkpoint, close), lazyfs.fetch (CachedDevice).
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Self

from lazyfs.cache import evict, inventory
from lazyfs.cache.device import CachedDevice
from lazyfs.cache.health import CacheCounters, Health
from lazyfs.cache.ownership import DirectoryLock, prepare_directory, raise_cache_error
from lazyfs.cache.presence import Identity, read_boot_id
from lazyfs.cache.space import Space
from lazyfs.errors import BugError, CacheError, LazyfsError

if TYPE_CHECKING:
    from pathlib import Path

    from lazyfs.image.digest import Digest

__all__ = ["CacheCounters", "CacheDir", "CachedDevice"]
_log = logging.getLogger(__name__)


def make_layout(path: Path) -> None:
    """The directories that must be there. Raises CacheError, DiskFullError."""
    try:
        for folder in (inventory.DEVICES, inventory.EVICTED):   # the latter now, not on a disk that is full
            (path / folder).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise_cache_error(path, "create its layout", error)


class CacheDir:
    """All cached devices of one directory. Thread-safe."""

    def __init__(self, path: Path, lock: DirectoryLock, boot_id: bytes) -> None:
        self.path = path
        self.space = Space()
        self.health = Health.of(path)
        self._root = path / inventory.DEVICES
        self._lock = lock
        self._boot_id = boot_id
        self._devices: dict[Digest, CachedDevice] = {}
        self._devices_lock = threading.Lock()
        self._lost: LazyfsError | None = None    # why the directory is not ours any more

    @classmethod
    def open(cls, path: Path, *, boot_id: bytes | None = None) -> CacheDir:
        """
        Create the directory (mode 0700) if needed and take ownership of it.

        Args:
            path: of the directory; missing parents are made too.
            boot_id: 16 bytes that name this boot of the machine; None asks the kernel (others: for tests).

        Raises:
            CacheOwnedError: another process has it. CacheError, DiskFullError: it cannot be used.

        """
        path = prepare_directory(path)
        lock = DirectoryLock(path)
        try:
            make_layout(path)
        except CacheError:
            lock.close()
            raise
        return cls(path, lock, boot_id or read_boot_id())

    def device(self, digest: Digest, chunk_size: int, device_size: int, *, using: bool = True) -> CachedDevice:
        """
        The one object of a layer device, with a reference that the caller releases. Blocking (small files).

        Args:
            digest: of the device.
            chunk_size: bytes.
            device_size: bytes.
            using: False: the caller only looks after it, which is no use of it (for eviction).

        Raises:
            CacheError, DiskFullError: its files cannot be made. What is damaged is dropped without an error.

        """
        with self._devices_lock:
            if self._lost is not None:
                raise CacheError(f"cache {self.path}: was taken away, and is not ours any more: {self._lost}",
                                 hint="stop who uses the directory now, or restart the daemon")
            known = self._devices.get(digest)
            if known is not None and known.try_retain():
                if (known.chunk_size, known.device_size) != (chunk_size, device_size):
                    known.release()
                    raise BugError(f"device {digest.short} opened with other sizes than before")
                device = known
            else:
                device = self._open(Identity(digest, chunk_size, device_size))
            if using and not device.used:
                device.note_use()
            return device

    def existing_device(self, name: str) -> CachedDevice | None:
        """
        As `device`, to look after it, of hex `name`, with the sizes that its records say; None: nothing is in it.

        Raises:
            CacheError, DiskFullError: as there.

        """
        identity = inventory.identity_of(self.path, name, self._boot_id)
        if identity is None:
            return None
        return self.device(identity.digest, identity.chunk_size, identity.device_size, using=False)

    def _open(self, identity: Identity) -> CachedDevice:
        directory = self._root / identity.digest.hex
        try:
            device = CachedDevice(directory, identity, self._boot_id, self.space, self.health,
                                  on_unused=self._unused)
        except OSError as error:
            raise_cache_error(self.path, f"open device {identity.digest.short}", error)
        self._devices[identity.digest] = device
        return device

    def checkpoint(self) -> None:
        """Make everything present in all open devices durable. Blocking; run it in a thread, now and then."""
        for device in self._retained():
            try:
                device.checkpoint()
                if device.used:
                    device.note_use(at_once=False)
            finally:
                device.release()

    def tend(self) -> None:
        """
        Notice, now and then, that the directory or something in it was taken away below us. Blocking.

        The directory is made again, and owned again, if nobody else owns it meanwhile; a device whose files are gone
        begins anew with what is there.

        Raises:
            CacheError: the directory is gone, and cannot be made again, or is somebody else's now. Nobody opens a
            device then; those that are open go on with their files. The next call tries again.

        """
        try:
            if not self._lock.is_in_place():
                lock = DirectoryLock(prepare_directory(self.path))
                self._lock.close()
                self._lock = lock
                _log.error("cache %s: the directory was taken away or replaced; begun anew", self.path)
            make_layout(self.path)
        except LazyfsError as error:
            self._lost = error
            raise
        self._lost = None
        for device in self._retained():
            if device.renew_if_gone():
                _log.error("cache %s: the files of device %s were taken away; begun anew",
                           self.path, device.digest.short)
            device.release()

    def _retained(self) -> list[CachedDevice]:
        with self._devices_lock:
            return [device for device in self._devices.values() if device.try_retain()]

    @property
    def boot_id(self) -> bytes:
        """Of this boot: 16 bytes."""
        return self._boot_id

    def in_use(self) -> set[str]:
        """Hex of the digests of all devices that somebody has open: mounts, and downloads under way."""
        with self._devices_lock:
            return {digest.hex for digest in self._devices}

    def discard(self, name: str) -> bool:
        """
        Take a device (hex of its digest) out of the cache, unless it is in use. Its space is freed by evict.clean().

        Raises:
            OSError: not possible; it is still there.

        """
        with self._devices_lock:    # whoever opens it does so before, and it stays, or after, and it begins anew
            if any(digest.hex == name for digest in self._devices):
                return False
            try:
                evict.move_away(self.path, self._root / name)
            except FileNotFoundError:
                return False
            return True

    def close(self) -> None:
        """Give up ownership. Devices still referenced stay usable until released; nothing is synced here."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unused(self, device: CachedDevice) -> None:
        with self._devices_lock:
            if self._devices.get(device.digest) is device:
                if device.used:
                    device.note_use()    # while nobody can take it away
                del self._devices[device.digest]
        device.close_files()
