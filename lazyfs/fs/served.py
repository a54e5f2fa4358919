"""
What the FUSE session serves: layer devices, and images made of them. Bookkeeping only, no FUSE, no I/O.

Layer: fs. Who calls: node.worker adds and removes, fs.operations looks up. All on the trio thread. A slot or a device
index is used once; after `remove_*` its inodes answer ESTALE.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lazyfs.fs import inodes
from lazyfs.fs.readlog import ReadLog

if TYPE_CHECKING:
    from collections.abc import Awaitable

    import trio

    from lazyfs.image.erofs import ErofsImage


class DeviceReader(Protocol):
    """The bytes of a layer device, wherever they are."""

    @property
    def size(self) -> int:
        """In bytes."""
        ...

    @property
    def read_timeout_s(self) -> float:
        """How long a read of it may take."""
        ...

    @property
    def waiting(self) -> set[trio.CancelScope]:
        """Scopes of the reads that wait now: cancelling one ends that read with an errno."""
        ...

    def read_now(self, offset: int, size: int, pid: int = 0) -> bytes | None:
        """Exactly `size` bytes if that needs no waiting; else None: then `read` is the way. `pid`: who asks, or 0."""
        ...

    def read(self, offset: int, size: int, deadline: float) -> Awaitable[bytes | memoryview]:
        """
        Exactly `size` bytes, or an error by `deadline` (time.monotonic() seconds).

        Raises:
            LazyfsError: the bytes cannot be had, or are not the right ones.

        """
        ...


@dataclass(frozen=True, slots=True)
class ServedImage:
    """An image's tree. `devices` in the order in which the EROFS image numbers them (from 0)."""

    slot: int
    name: bytes
    tree: ErofsImage
    devices: tuple[DeviceReader, ...]


class Served:
    """All that is served now."""

    def __init__(self) -> None:
        self.devices: dict[int, DeviceReader] = {}
        self.images: dict[int, ServedImage] = {}
        self.image_slots: dict[bytes, int] = {}
        self.read_log = ReadLog()
        self._open_counts: Counter[int] = Counter()   # by inode
        self._use_counts: Counter[int] = Counter()    # by slot
        self._kept: set[int] = set()                  # slots whose files are read, never given
        self._next_device = 0
        self._next_slot = 1

    def add_device(self, reader: DeviceReader) -> int:
        """Serve a device as file dev/<index>; returns the index."""
        index = self._next_device
        self._next_device += 1
        self.devices[index] = reader
        return index

    def restore_device(self, index: int, reader: DeviceReader) -> None:
        """Serve a device under the number that a former worker gave it; the kernel's EROFS has it open."""
        self.devices[index] = reader
        self.count_open(inodes.device_inode(index), 1)

    def remove_device(self, index: int) -> None:
        self.devices.pop(index, None)

    def new_slot(self) -> int:
        """A number for a mount."""
        slot = self._next_slot
        self._next_slot += 1
        return slot

    @property
    def next_numbers(self) -> tuple[int, int]:
        """The next device index and slot. A worker that takes over must begin with these, or above."""
        return self._next_device, self._next_slot

    def begin_numbers(self, next_device: int, next_slot: int) -> None:
        """Give no number below these."""
        self._next_device = max(self._next_device, next_device)
        self._next_slot = max(self._next_slot, next_slot)

    def add_image(
        self, slot: int, tree: ErofsImage, devices: tuple[DeviceReader, ...], *, giving: bool = True
    ) -> ServedImage:
        """Serve a tree as directory tree/<slot>. `giving`: small files may be given to the kernel before it reads."""
        image = ServedImage(slot, str(slot).encode(), tree, devices)
        self.images[slot] = image
        self.image_slots[image.name] = slot
        if not giving:
            self._kept.add(slot)
        return image

    def remove_image(self, slot: int) -> None:
        del self.image_slots[self.images.pop(slot).name]
        self._kept.discard(slot)

    def restore_image(self, slot: int, tree: ErofsImage, devices: tuple[DeviceReader, ...]) -> None:
        """
        Serve a tree that a former worker served.

        Who has its files open is known to nobody now: one is counted who never closes, so that it is served to the end.
        """
        self.add_image(slot, tree, devices, giving=False)
        self._use_counts[slot] += 1

    def count_open(self, inode: int, change: int) -> None:
        """
        Note that a file was opened (1) or released (-1).

        A hint about who still uses a mount that was detached lazily; nothing that is served depends on it.
        """
        for counts, key in ((self._open_counts, inode), (self._use_counts, inodes.split(inode)[0])):
            counts[key] += change
            if counts[key] <= 0:
                del counts[key]

    def may_give(self, inode: int) -> bool:
        """Whether a file's content may be given to the kernel: nobody has it open, so nothing of it is being read."""
        return inode not in self._open_counts and inodes.split(inode)[0] not in self._kept

    def device_in_use(self, index: int) -> bool:
        """Whether the kernel has dev/<index> open: an EROFS mount does as long as it lives, attached or not."""
        return inodes.device_inode(index) in self._open_counts

    def image_in_use(self, slot: int) -> bool:
        """Whether a file or directory of tree/<slot> is open."""
        return slot in self._use_counts
