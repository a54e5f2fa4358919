"""
The FUSE operations: one session, all images.

    /dev/<index>     one read-only file a layer device, for the kernel's EROFS
    /tree/<slot>/    the whole tree of an image, for driver `fuse`

Layer: fs. Who calls: pyfuse3 (fs.session). Invariants: only `read` may wait for the network, everything else answers
out of memory at once (one hung LOOKUP would stop a directory for ever, faults.md section 2); `read` gives exactly the
bytes asked for (less only at the end of the file) or an errno; a file handle is the inode number, so there is no state
in open files; every handler is guarded (fs.guard). The mount is read-only, so the kernel refuses writers itself with
EROFS; the answers here are for whoever comes another way.
"""

# ruff: noqa: ARG002 - pyfuse3 passes a context to every handler

from __future__ import annotations

import errno
import os
import stat
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, NoReturn

import pyfuse3
import trio

from lazyfs import limits
from lazyfs.errors import BugError
from lazyfs.fs import inodes
from lazyfs.fs.guard import guarded
from lazyfs.image.model import FileType

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lazyfs.fs.served import DeviceReader, Served, ServedImage

_TIMEOUT_S = 1 << 30             # what an image says about an inode never changes
_LISTINGS_MAX = 32               # directories whose listing is kept between two READDIRs
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
_NS = 1_000_000_000
Listing = list[tuple[bytes, int]]   # name, inode


class LazyOperations(pyfuse3.Operations):
    """Answers the kernel."""

    supports_dot_lookup = True       # an inode number is enough to find anything (open_by_handle_at)
    enable_writeback_cache = False   # with it a short read would be filled up with zeros
    enable_acl = True                # the kernel checks the ACLs that an image's xattrs hold

    def __init__(self, served: Served) -> None:
        super().__init__()
        self._served = served
        self.before_wait: Callable[[], None] = lambda: None   # fs.session sets it
        self.on_init: Callable[[], None] = lambda: None       # likewise
        self._listings: OrderedDict[int, Listing] = OrderedDict()
        self.read_count = 0
        self.read_bytes = 0

    def init(self) -> None:
        self.on_init()

    def forget_image(self, slot: int) -> None:
        """Drop what is remembered of an image that is no longer served."""
        for inode in [inode for inode in self._listings if inodes.split(inode)[0] == slot]:
            del self._listings[inode]

    # --- metadata: never waits ---------------------------------------------------------------------------------------

    @guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if name == b".":
            return self._attributes(parent_inode)
        if name == b"..":
            return self._attributes(self._parent(parent_inode))
        return self._attributes(self._child(parent_inode, name))

    @guarded
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    @guarded
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        image, nid = self._node(inode)
        return image.tree.readlink(nid)

    @guarded
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        return [name for name, _ in self._xattrs(inode)]

    @guarded
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        for key, value in self._xattrs(inode):
            if key == name:
                return value
        raise pyfuse3.FUSEError(pyfuse3.ENOATTR)

    @guarded
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        self._served.count_open(inode, 1)
        return inode

    @guarded
    async def releasedir(self, fh: int) -> None:
        self._served.count_open(fh, -1)

    @guarded
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = self._listing(fh)
        for index in range(start_id, len(listing)):
            name, inode = listing[index]
            if not pyfuse3.readdir_reply(token, name, self._attributes(inode), index + 1):
                return

    @guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        # overlayfs refuses a lower directory without it
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = limits.BLOCK_SIZE_BYTES
        data.f_blocks = sum(device.size for device in self._served.devices.values()) // limits.BLOCK_SIZE_BYTES
        data.f_namemax = limits.NAME_BYTES_MAX
        return data

    @guarded
    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        pass   # no lookup counts: a number means the same for ever

    # --- data --------------------------------------------------------------------------------------------------------

    @guarded
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EROFS)
        self._served.count_open(inode, 1)
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    @guarded
    async def release(self, fh: int) -> None:
        self._served.count_open(fh, -1)

    @guarded
    async def flush(self, fh: int) -> None:
        raise pyfuse3.FUSEError(errno.ENOSYS)   # the kernel asks once, and then no longer at each close

    @guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        pass

    @guarded
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        pass

    @guarded
    async def read(self, fh: int, off: int, size: int) -> bytes | memoryview:  # type: ignore[override]
        slot, number = inodes.split(fh)
        self.read_count += 1
        if slot == 0:
            device = self._served.devices.get(number - inodes.FIRST_DEVICE_INODE)
            if device is None:
                raise pyfuse3.FUSEError(errno.ESTALE)
            size = min(size, device.size - off)
            data = await self._read_device(device, off, size) if size > 0 else b""
        else:
            data = await self._read_file(*self._node(fh), off, size)
        self.read_bytes += len(data)
        return data

    async def _read_device(self, device: DeviceReader, offset: int, size: int) -> bytes | memoryview:
        data: bytes | memoryview | None = device.read_now(offset, size)
        if data is None:
            self.before_wait()
            timeout_s = device.read_timeout_s
            with trio.fail_after(timeout_s + _GRACE_S) as scope:
                device.waiting.add(scope)
                try:
                    data = await device.read(offset, size, time.monotonic() + timeout_s)
                finally:
                    device.waiting.discard(scope)
        if len(data) != size:   # a short answer would read as the end of the file, or as zeros
            raise BugError(f"read of {size} bytes at {offset} gave {len(data)}")
        return data

    async def _read_file(self, image: ServedImage, nid: int, offset: int, size: int) -> bytes | memoryview:
        size = min(size, image.tree.stat(nid).size - offset)
        if size <= 0:
            return b""
        parts: list[bytes | memoryview] = []
        for device, device_offset, length in image.tree.extents(nid, offset, size):
            if device < 0:
                parts.append(bytes(length))
            else:
                parts.append(await self._read_device(image.devices[device], device_offset, length))
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if len(data) != size:
            raise BugError(f"extents of node {nid} give {len(data)} bytes of {size} at {offset}")
        return data

    # --- numbers to things -------------------------------------------------------------------------------------------

    def _node(self, inode: int) -> tuple[ServedImage, int]:
        slot, nid = inodes.split(inode)
        image = self._served.images.get(slot)
        if image is None:
            raise pyfuse3.FUSEError(errno.ESTALE if slot else errno.EINVAL)
        return image, nid

    def _xattrs(self, inode: int) -> tuple[tuple[bytes, bytes], ...]:
        if inodes.split(inode)[0] == 0:
            return ()
        image, nid = self._node(inode)
        return image.tree.xattrs(nid)

    def _child(self, parent: int, name: bytes) -> int:
        if len(name) > limits.NAME_BYTES_MAX:   # FUSE itself lets 1,024 pass
            raise pyfuse3.FUSEError(errno.ENAMETOOLONG)
        slot, _ = inodes.split(parent)
        found: int | None = None
        if slot:
            image, nid = self._node(parent)
            child = image.tree.lookup(nid, name)
            found = None if child is None else inodes.tree_inode(slot, child)
        elif parent == inodes.ROOT_INODE:
            found = {b"dev": inodes.DEVICES_INODE, b"tree": inodes.TREES_INODE}.get(name)
        elif parent == inodes.TREES_INODE:
            image_slot = self._served.image_slots.get(name)
            found = None if image_slot is None else self._root_of(self._served.images[image_slot])
        elif parent == inodes.DEVICES_INODE and name.isdigit() and len(name) < 12:
            found = inodes.device_inode(int(name)) if int(name) in self._served.devices else None
        if found is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
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
        raise pyfuse3.FUSEError(errno.ENOTDIR)

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        slot, number = inodes.split(inode)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        if slot == 0:
            self._fill_fixed(entry, number)
            return entry
        image, nid = self._node(inode)
        status = image.tree.stat(nid)
        entry.entry_timeout = entry.attr_timeout = _TIMEOUT_S
        if nid == image.tree.root_nid:
            entry.entry_timeout = 0   # the name tree/<slot> goes away with the image
        entry.st_mode = _FORMAT_BITS[status.type] | status.mode
        entry.st_nlink = status.link_count
        entry.st_uid = status.uid
        entry.st_gid = status.gid
        entry.st_size = status.size
        entry.st_blocks = -(-status.size // limits.BLOCK_SIZE_BYTES) * 8   # in 512 bytes, as the kernel's EROFS says
        if status.type in {FileType.CHARACTER, FileType.BLOCK}:
            entry.st_rdev = os.makedev(*status.rdev)
        time_ns = status.mtime_s * _NS + status.mtime_ns
        entry.st_mtime_ns = entry.st_atime_ns = entry.st_ctime_ns = time_ns
        return entry

    def _fill_fixed(self, entry: pyfuse3.EntryAttributes, number: int) -> None:
        entry.entry_timeout = 0
        if number < inodes.FIRST_DEVICE_INODE:
            if number not in {inodes.ROOT_INODE, inodes.DEVICES_INODE, inodes.TREES_INODE}:
                raise pyfuse3.FUSEError(errno.ESTALE)
            entry.attr_timeout = 0
            entry.st_mode = stat.S_IFDIR | 0o755
            entry.st_nlink = 2
            return
        device = self._served.devices.get(number - inodes.FIRST_DEVICE_INODE)
        if device is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        entry.attr_timeout = _TIMEOUT_S
        entry.st_mode = stat.S_IFREG | 0o400
        entry.st_size = device.size
        entry.st_blocks = device.size // 512


async def _refuse(*_: object) -> NoReturn:
    raise pyfuse3.FUSEError(errno.EROFS)


for _name in ("setattr", "mknod", "mkdir", "unlink", "rmdir", "symlink", "rename", "link", "write", "create",
              "setxattr", "removexattr"):
    setattr(LazyOperations, _name, staticmethod(_refuse))
