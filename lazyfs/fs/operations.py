"""
What the file system says: one session, all images.

    /dev/<index>     one read-only file a layer device, for the kernel's EROFS
    /tree/<slot>/    the whole tree of an image, for driver `fuse`

Layer: fs. Who calls: fs.server. Invariants: only `read` may wait for the network, everything else answers out of
memory at once (one hung LOOKUP would stop a directory for ever, faults.md section 2); a read gives exactly the bytes
asked for (less only at the end of the file) or an error; a file handle is the inode number, so there is no state in
open files. An errno that is an answer is raised as guard.ErrnoError; every other exception is an error of ours, and
fs.server makes an errno of it. The mount is read-only, so the kernel refuses writers itself.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

import trio

from lazyfs import limits
from lazyfs.errors import BugError
from lazyfs.fetch.readtrace import CURRENT
from lazyfs.fs import inodes, wire
from lazyfs.fs.guard import ErrnoError
from lazyfs.fs.wire import Status
from lazyfs.image.model import FileType

if TYPE_CHECKING:
    from lazyfs.fs.served import DeviceReader, Served, ServedImage

_TIMEOUT_S = 1 << 30             # what an image says about an inode never changes
_LISTINGS_MAX = 32               # directories whose listing is kept between two READDIRs
GIVEN_BYTES_MAX = 128 * 1024     # of a file: one READ
_GIVEN_COUNT_MAX = 1 << 14       # files remembered, so that one that is opened again and again is given once
_GRACE_S = 2.0                   # the fetcher keeps the deadline itself; this is for when it does not
_FORMAT_BITS = {
    FileType.REGULAR: stat.S_IFREG,
    FileType.DIRECTORY: stat.S_IFDIR,
    FileType.CHARACTER: stat.S_IFCHR,
    FileType.BLOCK: stat.S_IFBLK,
    FileType.FIFO: stat.S_IFIFO,
    FileType.SOCKET: stat.S_IFSOCK,
    FileType.SYMLINK: stat.S_IFLNK,
}
_DEVICES = {FileType.CHARACTER, FileType.BLOCK}
Listing = list[tuple[bytes, int]]   # name, inode
Data = bytes | memoryview


class LazyOperations:
    """
    Answers questions about inodes. All on the trio thread.

    `patient`: a read whose source fails is to be tried again (fs.server does it), instead of ending with an error.
    """

    def __init__(self, served: Served, *, patient: bool = False) -> None:
        self.patient = patient
        self.read_log = served.read_log
        self._served = served
        self._listings: OrderedDict[int, Listing] = OrderedDict()
        self._given: set[int] = set()   # files whose content the kernel was given when they were opened

    # --- metadata: never waits ---------------------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> Status | None:
        """What `name` in a directory is. None: it does not exist, and never will."""
        if name == b".":
            return self.status(parent)
        if name == b"..":
            return self.status(self._parent(parent))
        child = self._child(parent, name)
        return None if child is None else self.status(child)

    def readlink(self, inode: int) -> bytes:
        image, nid = self._node(inode)
        return image.tree.readlink(nid)

    def xattrs(self, inode: int) -> tuple[tuple[bytes, bytes], ...]:
        """(name, value) pairs."""
        if inodes.split(inode)[0] == 0:
            return ()
        image, nid = self._node(inode)
        return image.tree.xattrs(nid)

    def readdir(self, inode: int, start: int, size: int, *, plus: bool) -> bytes:
        """As many names from offset `start` on as `size` bytes hold; with `plus` also what they are."""
        parts: list[bytes] = []
        for index, (name, child) in enumerate(self._listing(inode)[start:], start + 1):
            status = self.status(child)
            entry = None if not plus else b"" if index <= 2 else wire.pack_entry(status)   # the first are . and ..
            part = wire.pack_name(name, child, index, status.mode, entry)
            size -= len(part)
            if size < 0:
                break
            parts.append(part)
        return b"".join(parts)

    def block_count(self) -> int:
        """Of all that is served; overlayfs refuses a lower directory without statfs."""
        return sum(device.size for device in self._served.devices.values()) // limits.BLOCK_SIZE_BYTES

    def open(self, inode: int, flags: int) -> Data | None:
        """
        Count it; returns the content of a small file that will most likely be read next, if it is at hand.

        Only of a file that nobody has open: the kernel would wait for pages that are being read, and they for us.
        """
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise ErrnoError(errno.EROFS)
        data = None
        if inode >= inodes.FIRST_TREE_INODE and inode not in self._given and self._served.may_give(inode):
            image, nid = self._node(inode)
            size = image.tree.size(nid)
            if 0 < size <= GIVEN_BYTES_MAX:
                data = self.read_now(inode, 0, size)
        if data is not None:
            if len(self._given) >= _GIVEN_COUNT_MAX:
                self._given.clear()
            self._given.add(inode)
        self._served.count_open(inode, 1)
        return data

    def opendir(self, inode: int) -> bool:
        """Whether the kernel may keep the listing."""
        self._served.count_open(inode, 1)
        return inodes.split(inode)[0] != 0

    def release(self, inode: int) -> None:
        self._served.count_open(inode, -1)

    # --- data --------------------------------------------------------------------------------------------------------

    def read_now(self, inode: int, offset: int, size: int, pid: int = 0) -> Data | None:
        """The bytes, fewer only at the end of the file; None: `read` is the way, for it has to wait."""
        self._given.discard(inode)   # the kernel has it no longer
        parts: list[Data] = []
        for device, place, length in self._places(inode, offset, size):
            data = bytes(length) if device is None else device.read_now(place, length, pid)
            if data is None:
                return None
            _check_size(data, place, length)
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def read(self, inode: int, offset: int, size: int) -> Data:
        """
        The same, with waiting. One deadline for the whole, however many devices it is on. Checkpoint: perhaps.

        Raises:
            ErrnoError: ETIMEDOUT, ended from outside (DeviceReader.waiting); what read_now() raises.
            LazyfsError: of a device. trio.TooSlowError: a device did not keep its deadline.

        """
        places = self._places(inode, offset, size)
        timeout_s = _timeout_s(places)
        deadline = time.monotonic() + timeout_s
        parts: list[Data] = []
        with trio.CancelScope(deadline=trio.current_time() + timeout_s + _GRACE_S) as scope:
            for device, place, length in places:
                parts.append(bytes(length) if device is None
                             else await _read_device(device, place, length, deadline, scope))
        if scope.cancelled_caught:
            if trio.current_time() < scope.deadline:
                raise ErrnoError(errno.ETIMEDOUT)   # its mount is being taken away
            raise trio.TooSlowError
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_timeout_s(self, inode: int) -> float:
        """How long a read of a file may take. 0: of none of ours, which takes no time."""
        slot, number = inodes.split(inode)
        device = self._served.devices.get(number - inodes.FIRST_DEVICE_INODE) if slot == 0 else None
        image = self._served.images.get(slot)
        devices = image.devices if image is not None else () if device is None else (device,)
        return max((one.read_timeout_s for one in devices), default=0.0)

    def _places(self, inode: int, offset: int, size: int) -> list[tuple[DeviceReader | None, int, int]]:
        """Where the bytes are: (device, offset, length), or None for zeros; up to the end of the file."""
        slot, number = inodes.split(inode)
        if slot == 0:
            device = self._served.devices.get(number - inodes.FIRST_DEVICE_INODE)
            if device is None:
                raise ErrnoError(errno.ESTALE)
            size = min(size, device.size - offset)
            return [(device, offset, size)] if size > 0 else []
        image, nid = self._node(inode)
        extents = image.tree.extents(nid, offset, size)
        return [(None if index < 0 else image.devices[index], place, length) for index, place, length in extents]

    # --- numbers to things -------------------------------------------------------------------------------------------

    def _node(self, inode: int) -> tuple[ServedImage, int]:
        slot, nid = inodes.split(inode)
        image = self._served.images.get(slot)
        if image is None:
            raise ErrnoError(errno.ESTALE if slot else errno.EINVAL)
        return image, nid

    def _child(self, parent: int, name: bytes) -> int | None:
        """The inode of a name; None: not in this image."""
        if len(name) > limits.NAME_BYTES_MAX:   # FUSE itself lets 1,024 pass
            raise ErrnoError(errno.ENAMETOOLONG)
        slot, _ = inodes.split(parent)
        if slot:
            image, nid = self._node(parent)
            child = image.tree.lookup(nid, name)
            return None if child is None else inodes.tree_inode(slot, child)
        found: int | None = None
        if parent == inodes.ROOT_INODE:
            found = {b"dev": inodes.DEVICES_INODE, b"tree": inodes.TREES_INODE}.get(name)
        elif parent == inodes.TREES_INODE:
            image_slot = self._served.image_slots.get(name)
            found = None if image_slot is None else self._root_of(self._served.images[image_slot])
        elif parent == inodes.DEVICES_INODE and name.isdigit() and len(name) < 12:
            found = inodes.device_inode(int(name)) if int(name) in self._served.devices else None
        if found is None:
            raise ErrnoError(errno.ENOENT)   # for now
        return found

    def _parent(self, inode: int) -> int:
        slot, nid = inodes.split(inode)
        if slot == 0:
            return inodes.DEVICES_INODE if nid >= inodes.FIRST_DEVICE_INODE else inodes.ROOT_INODE
        image, _ = self._node(inode)
        if nid == image.tree.root_nid:
            return inodes.TREES_INODE
        return inodes.tree_inode(slot, image.tree.parent(nid))

    def _root_of(self, image: ServedImage) -> int:
        return inodes.tree_inode(image.slot, image.tree.root_nid)

    def _listing(self, inode: int) -> Listing:
        """All names of a directory with "." and ".."; an offset of READDIR is an index into it, the same for ever."""
        slot, nid = inodes.split(inode)
        if slot == 0:
            return self._fixed_listing(inode)
        listing = self._listings.get(inode)
        if listing is None:
            image, _ = self._node(inode)
            children = image.tree.entries(nid)
            listing = [(b".", inode), (b"..", self._parent(inode))]
            listing += [(name, inodes.tree_inode(slot, child)) for name, child, _ in children]
            self._listings[inode] = listing
            if len(self._listings) > _LISTINGS_MAX:
                self._listings.popitem(last=False)
        else:
            self._listings.move_to_end(inode)
        return listing

    def _fixed_listing(self, inode: int) -> Listing:
        listing: Listing = [(b".", inode), (b"..", inodes.ROOT_INODE)]
        if inode == inodes.ROOT_INODE:
            return [*listing, (b"dev", inodes.DEVICES_INODE), (b"tree", inodes.TREES_INODE)]
        if inode == inodes.TREES_INODE:
            return [*listing, *((image.name, self._root_of(image)) for image in self._served.images.values())]
        if inode == inodes.DEVICES_INODE:
            return [*listing, *((str(index).encode(), inodes.device_inode(index)) for index in self._served.devices)]
        raise ErrnoError(errno.ENOTDIR)

    def status(self, inode: int) -> Status:
        """What GETATTR and LOOKUP say."""
        slot, number = inodes.split(inode)
        if slot == 0:
            return self._fixed_status(inode)
        image, nid = self._node(inode)
        found = image.tree.stat(nid)
        return Status(
            inode, _FORMAT_BITS[found.type] | found.mode, found.link_count, found.uid, found.gid, found.size,
            -(-found.size // limits.BLOCK_SIZE_BYTES) * 8,   # in 512 bytes, as the kernel's EROFS says
            os.makedev(*found.rdev) if found.type in _DEVICES else 0, found.mtime_s, found.mtime_ns,
            0 if number == image.tree.root_nid else _TIMEOUT_S,   # the name tree/<slot> goes away with the image
            _TIMEOUT_S,
        )  # fmt: skip

    def _fixed_status(self, inode: int) -> Status:
        if inode < inodes.FIRST_DEVICE_INODE:
            if inode not in {inodes.ROOT_INODE, inodes.DEVICES_INODE, inodes.TREES_INODE}:
                raise ErrnoError(errno.ESTALE)
            return Status(inode, stat.S_IFDIR | 0o755, 2)
        device = self._served.devices.get(inode - inodes.FIRST_DEVICE_INODE)
        if device is None:
            raise ErrnoError(errno.ESTALE)
        return Status(inode, stat.S_IFREG | 0o400, size=device.size, blocks=device.size // 512, valid_s=_TIMEOUT_S)


def _timeout_s(places: list[tuple[DeviceReader | None, int, int]]) -> float:
    return max((device.read_timeout_s for device, _, _ in places if device is not None), default=0.0)


async def _read_device(
    device: DeviceReader, offset: int, size: int, deadline: float, scope: trio.CancelScope
) -> Data:
    """Before `deadline` (time.monotonic() seconds). `scope`: of the whole read."""
    data: Data | None = device.read_now(offset, size)
    if data is None:
        trace = CURRENT.get()
        if trace is not None:
            trace.device, trace.place = device, offset
        device.waiting.add(scope)
        try:
            data = await device.read(offset, size, deadline)
        finally:
            device.waiting.discard(scope)
    _check_size(data, offset, size)
    return data


def _check_size(data: Data, offset: int, size: int) -> None:
    """A short answer would read as the end of the file, or as zeros."""
    if len(data) != size:
        raise BugError(f"read of {size} bytes at {offset} gave {len(data)}")
