"""The file system without a mount: numbers in, answers out. What the kernel makes of them: tests/mount."""

from __future__ import annotations

import errno
import os
import random
import stat
import struct
from typing import TYPE_CHECKING, Any

import pytest
import trio

from lazyfs.errors import BugError
from lazyfs.fs import inodes, operations, wire
from lazyfs.fs.guard import ErrnoError
from lazyfs.fs.operations import LazyOperations
from lazyfs.fs.served import Served
from tests.mountkit import BLOCK, MemoryDevice, sample_tree

if TYPE_CHECKING:
    from lazyfs.fs.wire import Status

SAMPLE = sample_tree()
ALIASES = {b"two", b"sub/one"}   # one inode: given once
UNKNOWN = {errno.ESTALE, errno.EINVAL, errno.EIO, errno.ENOTDIR, errno.ENOENT}


def serve() -> tuple[LazyOperations, MemoryDevice, int, int]:
    """Operations with one image in a slot and its device as a file; returns also slot and device inode."""
    served = Served()
    device = MemoryDevice(SAMPLE.data)
    index = served.add_device(device)
    slot = served.new_slot()
    served.add_image(slot, SAMPLE.tree, (device,))
    return LazyOperations(served), device, slot, inodes.device_inode(index)


def read(ops: LazyOperations, inode: int, offset: int, size: int) -> bytes:
    return bytes(trio.run(ops.read, inode, offset, size))


def inode_of(ops: LazyOperations, parent: int, name: bytes) -> int:
    status = ops.lookup(parent, name)
    assert status is not None
    return status.inode


def error_of(function: Any, *arguments: Any) -> int:
    with pytest.raises(ErrnoError) as info:
        function(*arguments)
    return info.value.errno


def walk(ops: LazyOperations, slot: int, path: bytes) -> Status:
    entry = ops.lookup(inodes.TREES_INODE, str(slot).encode())
    for name in path.split(b"/") if path else []:
        assert entry is not None
        entry = ops.lookup(entry.inode, name)
    assert entry is not None
    return entry


def names(listing: bytes, *, plus: bool) -> list[tuple[bytes, int, int]]:
    """(name, inode, where to go on) of what READDIR says."""
    found = []
    while listing:
        listing = listing[128 if plus else 0 :]
        inode, following, length, _ = struct.unpack_from("<QQII", listing)
        found.append((listing[24 : 24 + length], inode, following))
        listing = listing[24 + length + -length % 8 :]
    return found


def test_every_file_reads_exactly_at_any_offset():
    ops, _, slot, _ = serve()
    rng = random.Random(2)
    for path, content in SAMPLE.files.items():
        inode = walk(ops, slot, path).inode
        assert bytes(read(ops, inode, 0, 2_000_000)) == content
        for _ in range(20):
            offset, size = rng.randrange(len(content) + 10), rng.randrange(1, 300_000)
            assert bytes(read(ops, inode, offset, size)) == content[offset : offset + size]


def test_device_files_are_whole_and_end_at_their_end():
    ops, device, _, inode = serve()
    entry = ops.status(inode)
    assert (entry.size, stat.S_IFMT(entry.mode), entry.mode & 0o777) == (device.size, stat.S_IFREG, 0o400)
    assert read(ops, inode, device.size - 10, 4096) == device.data[-10:]
    assert read(ops, inode, device.size + 5, 4096) == b""
    assert inode_of(ops, inodes.DEVICES_INODE, b"0") == inode
    for name in (b"1", b"00x", b"", b"9" * 30, b"-1", b"\xb2"):
        assert error_of(ops.lookup, inodes.DEVICES_INODE, name) == errno.ENOENT


@pytest.mark.parametrize(("path", "kind"), [
    (b"sub/null", stat.S_IFCHR), (b"sub/disk", stat.S_IFBLK), (b"sub/pipe", stat.S_IFIFO),
    (b"sub/socket", stat.S_IFSOCK), (b"sub/link", stat.S_IFLNK), (b"sub", stat.S_IFDIR), (b"two", stat.S_IFREG),
])
def test_attributes_say_what_the_image_says(path: bytes, kind: int):
    ops, _, slot, _ = serve()
    entry = walk(ops, slot, path)
    assert stat.S_IFMT(entry.mode) == kind
    if path == b"sub/disk":
        assert (os.major(entry.rdev), os.minor(entry.rdev)) == (259, 70_000)
    if path == b"sub":
        assert (entry.uid, entry.gid, entry.mode & 0o7777) == (1000, 70_000, 0o2750)
        assert (entry.mtime_s, entry.mtime_ns) == (-5, 0)
    if path == b"two":
        assert (entry.link_count, entry.mode & 0o7777) == (2, 0o4755)
        assert (entry.mtime_s, entry.mtime_ns) == (1_700_000_000, 123_456_789)
        assert entry.inode == walk(ops, slot, b"sub/one").inode


def test_links_and_xattrs():
    ops, _, slot, inode = serve()
    assert ops.readlink(walk(ops, slot, b"sub/link").inode) == b"../f10000"
    two = walk(ops, slot, b"two").inode
    assert [name for name, _ in ops.xattrs(two)] == [b"user.a", b"user.b"]
    assert dict(ops.xattrs(two))[b"user.b"] == b"\0\xff"
    assert ops.xattrs(inode) == ()


@pytest.mark.parametrize("size", [280, 1000, 4096, 1 << 20])
@pytest.mark.parametrize("plus", [False, True])
def test_readdir_gives_each_name_once_however_it_is_cut(size: int, plus: bool):
    ops, _, slot, _ = serve()
    many = walk(ops, slot, b"many").inode
    seen: list[tuple[bytes, int]] = []
    last = 0
    while page := ops.readdir(many, last, size, plus=plus):
        assert len(page) <= size
        for name, inode, following in names(page, plus=plus):
            seen.append((name, inode))
            last = following
        ops._listings.clear()   # as after a restart of the worker: offsets still mean the same
    found = [name for name, _ in seen]
    assert len(found) == len(set(found)) == 1002
    assert found[:2] == [b".", b".."]
    assert found[2:] == sorted(found[2:])
    assert dict(seen)[b".."] == walk(ops, slot, b"").inode
    assert dict(seen)[b"."] == many


def test_a_listing_says_of_each_name_what_a_lookup_says():
    ops, _, slot, _ = serve()
    root = walk(ops, slot, b"").inode
    page = ops.readdir(root, 2, 1 << 20, plus=True)
    for name, inode, _ in names(page, plus=True):
        status = ops.lookup(root, name)
        assert status is not None
        assert status.inode == inode
        assert wire.pack_entry(status) in page


def test_dot_and_parent_are_found_by_number():
    ops, _, slot, inode = serve()
    sub, root = walk(ops, slot, b"sub").inode, walk(ops, slot, b"").inode
    assert inode_of(ops, sub, b".") == sub
    assert inode_of(ops, sub, b"..") == root
    assert inode_of(ops, root, b"..") == inodes.TREES_INODE
    assert inode_of(ops, inodes.TREES_INODE, b"..") == inodes.ROOT_INODE
    assert inode_of(ops, inode, b"..") == inodes.DEVICES_INODE


def test_opening_for_writing_is_refused():
    ops, _, slot, _ = serve()
    inode = walk(ops, slot, b"f1").inode
    for flags in (os.O_WRONLY, os.O_RDWR):
        assert error_of(ops.open, inode, flags) == errno.EROFS


@pytest.mark.parametrize("short", [b"", b"x", bytes(4095), bytes(4097)])
def test_a_read_of_another_length_is_an_error_never_data(short: bytes):
    ops, device, slot, inode = serve()
    for now in (True, False):
        device.at_hand = now
        device.fail = lambda offset, size: short
        for file in (inode, walk(ops, slot, b"f100000").inode):
            with pytest.raises(BugError):
                ops.read_now(file, 0, 4096) or read(ops, file, 0, 4096)


def test_a_device_that_ignores_its_deadline_is_cut_off(autojump_clock: trio.testing.MockClock):
    ops, device, _, inode = serve()
    device.fail = lambda offset, size: trio.sleep(10_000)   # noqa: ASYNC105 - MemoryDevice awaits it

    async def main() -> None:
        before = trio.current_time()
        with pytest.raises(trio.TooSlowError):
            await ops.read(inode, 0, 4096)
        assert device.read_timeout_s <= trio.current_time() - before < device.read_timeout_s + 5

    trio.run(main, clock=autojump_clock)


def test_what_is_no_longer_served_is_stale():
    served = Served()
    device = MemoryDevice(SAMPLE.data)
    index, slot = served.add_device(device), served.new_slot()
    served.add_image(slot, SAMPLE.tree, (device,))
    ops = LazyOperations(served)
    inode = walk(ops, slot, b"f1").inode
    directory = walk(ops, slot, b"sub").inode
    served.remove_device(index)
    served.remove_image(slot)
    assert error_of(read, ops, inode, 0, 1) == errno.ESTALE
    assert error_of(ops.status, directory) == errno.ESTALE
    assert error_of(read, ops, inodes.device_inode(index), 0, 1) == errno.ESTALE
    assert error_of(ops.status, inodes.device_inode(index)) == errno.ESTALE
    assert error_of(ops.lookup, inodes.TREES_INODE, str(slot).encode()) == errno.ENOENT
    assert served.new_slot() != slot
    assert served.add_device(device) != index


@pytest.mark.parametrize("inode", [0, 4, 15, 17, 999, inodes.tree_inode(1, 1), inodes.tree_inode(5, 1), (1 << 63) - 1])
def test_numbers_that_mean_nothing_get_an_errno(inode: int):
    ops, *_ = serve()
    questions = (ops.status, lambda number: read(ops, number, 0, 10), ops.readlink, ops.xattrs,
                 lambda number: ops.readdir(number, 0, 4096, plus=True), lambda number: ops.lookup(number, b"x"))
    for question in questions:
        if inode == inodes.tree_inode(1, 1):   # the image is there, the node is not
            with pytest.raises(BugError):
                question(inode)
        elif question != ops.xattrs or inode >= inodes.FIRST_TREE_INODE:   # what is our own has none
            assert error_of(question, inode) in UNKNOWN


def test_open_files_are_counted_for_a_lazy_detach():
    served = Served()
    device = MemoryDevice(SAMPLE.data)
    index, slot = served.add_device(device), served.new_slot()
    served.add_image(slot, SAMPLE.tree, (device,))
    ops = LazyOperations(served)
    file, directory = walk(ops, slot, b"f1").inode, walk(ops, slot, b"sub").inode
    assert not served.image_in_use(slot)
    ops.open(file, 0)
    ops.opendir(directory)
    ops.open(inodes.device_inode(index), 0)
    assert served.image_in_use(slot)
    assert served.device_in_use(index)
    ops.release(file)
    assert served.image_in_use(slot)
    ops.release(directory)
    ops.release(inodes.device_inode(index))
    assert not served.image_in_use(slot)
    assert not served.device_in_use(index)


def test_what_an_image_does_not_have_will_never_be_there_but_a_mount_may_come():
    ops, _, slot, _ = serve()
    assert ops.lookup(walk(ops, slot, b"sub").inode, b"nothing") is None
    for directory in (inodes.ROOT_INODE, inodes.TREES_INODE, inodes.DEVICES_INODE):
        assert error_of(ops.lookup, directory, b"99") == errno.ENOENT
    assert error_of(ops.lookup, walk(ops, slot, b"sub").inode, bytes(256)) == errno.ENAMETOOLONG


def test_a_small_file_is_given_when_it_is_opened_first():
    ops, device, slot, _ = serve()
    inode = walk(ops, slot, b"f100000").inode
    assert ops.open(inode, os.O_RDONLY) is None, "it is not at hand"
    ops.release(inode)
    device.at_hand = True
    assert ops.open(inode, os.O_RDONLY) == SAMPLE.files[b"f100000"]
    ops.release(inode)
    assert ops.open(inode, os.O_RDONLY) is None, "the kernel has it"
    ops.release(inode)
    assert ops.read_now(inode, 0, 4096) == SAMPLE.files[b"f100000"][:4096], "the kernel has it no longer"
    assert ops.open(inode, os.O_RDONLY) == SAMPLE.files[b"f100000"]


def test_a_file_that_somebody_may_be_reading_is_not_given():
    served = Served()
    device = MemoryDevice(SAMPLE.data, at_hand=True)
    slot = served.new_slot()
    served.restore_image(slot, SAMPLE.tree, (device,))
    inode = walk(LazyOperations(served), slot, b"f100000").inode
    assert LazyOperations(served).open(inode, os.O_RDONLY) is None, "who had it open is not known"
    assert served.image_in_use(slot)
    served.remove_image(slot)
    served.add_image(slot, SAMPLE.tree, (device,))
    for _ in range(2):
        given = LazyOperations(served).open(inode, os.O_RDONLY)
    assert given is None, "the first reader has it open"
    served.remove_image(slot)
    other = served.new_slot()
    served.add_image(other, SAMPLE.tree, (device,), giving=False)
    assert LazyOperations(served).open(walk(LazyOperations(served), other, b"f100000").inode, os.O_RDONLY) is None


def test_large_and_empty_files_are_not_given():
    ops, device, slot, _ = serve()
    device.at_hand = True
    for path, content in SAMPLE.files.items():
        given = ops.open(walk(ops, slot, path).inode, os.O_RDONLY)
        assert given == (content if 0 < len(content) <= operations.GIVEN_BYTES_MAX else None) or path in ALIASES


def test_blocks_are_counted_for_df():
    ops, device, *_ = serve()
    assert ops.block_count() == device.size // BLOCK
