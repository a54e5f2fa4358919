"""The FUSE handlers without a mount: numbers in, answers out. What the kernel makes of them: tests/mount."""

from __future__ import annotations

import errno
import logging
import os
import random
import stat
from typing import Any

import pyfuse3
import pytest
import trio

from lazyfs.errors import DeadlineError, DiskFullError, FormatError, IntegrityError, LazyfsError, SourceError
from lazyfs.fs import guard, inodes, operations
from lazyfs.fs.operations import LazyOperations
from lazyfs.fs.served import Served
from tests.mountkit import BLOCK, MemoryDevice, sample_tree

SAMPLE = sample_tree()
UNKNOWN = {errno.ESTALE, errno.EINVAL, errno.EIO, errno.ENOTDIR, errno.ENOENT}
CTX: Any = None


def serve() -> tuple[LazyOperations, MemoryDevice, int, int]:
    """Operations with one image in a slot and its device as a file; returns also slot and device inode."""
    served = Served()
    device = MemoryDevice(SAMPLE.data)
    index = served.add_device(device)
    slot = served.new_slot()
    served.add_image(slot, SAMPLE.tree, (device,))
    return LazyOperations(served), device, slot, inodes.device_inode(index)


def run(function: Any, *arguments: Any) -> Any:
    return trio.run(function, *arguments)


def error_of(function: Any, *arguments: Any) -> int:
    with pytest.raises(pyfuse3.FUSEError) as info:
        run(function, *arguments)
    return info.value.errno


def walk(ops: LazyOperations, slot: int, path: bytes) -> pyfuse3.EntryAttributes:
    entry = run(ops.lookup, inodes.TREES_INODE, str(slot).encode(), CTX)
    for name in path.split(b"/") if path else []:
        entry = run(ops.lookup, entry.st_ino, name, CTX)
    return entry


def test_every_file_reads_exactly_at_any_offset():
    ops, _, slot, _ = serve()
    rng = random.Random(2)
    for path, content in SAMPLE.files.items():
        inode = walk(ops, slot, path).st_ino
        assert bytes(run(ops.read, inode, 0, 2_000_000)) == content
        for _ in range(20):
            offset, size = rng.randrange(len(content) + 10), rng.randrange(1, 300_000)
            assert bytes(run(ops.read, inode, offset, size)) == content[offset : offset + size]


def test_device_files_are_whole_and_end_at_their_end():
    ops, device, _, inode = serve()
    entry = run(ops.getattr, inode, CTX)
    assert (entry.st_size, stat.S_IFMT(entry.st_mode), entry.st_mode & 0o777) == (device.size, stat.S_IFREG, 0o400)
    assert run(ops.read, inode, device.size - 10, 4096) == device.data[-10:]
    assert run(ops.read, inode, device.size + 5, 4096) == b""
    assert run(ops.lookup, inodes.DEVICES_INODE, b"0", CTX).st_ino == inode
    for name in (b"1", b"00x", b"", b"9" * 30, b"-1", b"\xb2"):
        assert error_of(ops.lookup, inodes.DEVICES_INODE, name, CTX) == errno.ENOENT


@pytest.mark.parametrize(("path", "kind"), [
    (b"sub/null", stat.S_IFCHR), (b"sub/disk", stat.S_IFBLK), (b"sub/pipe", stat.S_IFIFO),
    (b"sub/socket", stat.S_IFSOCK), (b"sub/link", stat.S_IFLNK), (b"sub", stat.S_IFDIR), (b"two", stat.S_IFREG),
])
def test_attributes_say_what_the_image_says(path: bytes, kind: int):
    ops, _, slot, _ = serve()
    entry = walk(ops, slot, path)
    assert stat.S_IFMT(entry.st_mode) == kind
    if path == b"sub/disk":
        assert (os.major(entry.st_rdev), os.minor(entry.st_rdev)) == (259, 70_000)
    if path == b"sub":
        assert (entry.st_uid, entry.st_gid, entry.st_mode & 0o7777) == (1000, 70_000, 0o2750)
        assert entry.st_mtime_ns == -5 * 10**9
    if path == b"two":
        assert (entry.st_nlink, entry.st_mode & 0o7777, entry.st_mtime_ns) == (2, 0o4755, 1_700_000_000_123_456_789)
        assert entry.st_ino == walk(ops, slot, b"sub/one").st_ino


def test_links_and_xattrs():
    ops, _, slot, inode = serve()
    assert run(ops.readlink, walk(ops, slot, b"sub/link").st_ino, CTX) == b"../f10000"
    two = walk(ops, slot, b"two").st_ino
    assert run(ops.listxattr, two, CTX) == [b"user.a", b"user.b"]
    assert run(ops.getxattr, two, b"user.b", CTX) == b"\0\xff"
    assert error_of(ops.getxattr, two, b"user.c", CTX) == errno.ENODATA
    assert run(ops.listxattr, inode, CTX) == []


@pytest.mark.parametrize("page", [1, 3, 17, 5000])
def test_readdir_gives_each_name_once_however_it_is_cut(page: int, monkeypatch: pytest.MonkeyPatch):
    ops, _, slot, _ = serve()
    many = walk(ops, slot, b"many").st_ino
    seen: list[tuple[bytes, int]] = []
    room = 0

    def reply(token: object, name: bytes, entry: pyfuse3.EntryAttributes, next_id: int) -> bool:
        nonlocal room, last
        if room == 0:
            return False
        room -= 1
        seen.append((name, entry.st_ino))
        last = next_id
        return True

    monkeypatch.setattr(operations.pyfuse3, "readdir_reply", reply)
    last, before = 0, -1
    while before != last:
        before, room = last, page
        run(ops.readdir, many, last, None)
        ops._listings.clear()   # as after a restart of the worker: offsets still mean the same
    names = [name for name, _ in seen]
    assert len(names) == len(set(names)) == 1002
    assert names[:2] == [b".", b".."]
    assert names[2:] == sorted(names[2:])
    assert dict(seen)[b".."] == walk(ops, slot, b"").st_ino
    assert dict(seen)[b"."] == many


def test_dot_and_parent_are_found_by_number():
    ops, _, slot, inode = serve()
    sub, root = walk(ops, slot, b"sub").st_ino, walk(ops, slot, b"").st_ino
    assert run(ops.lookup, sub, b".", CTX).st_ino == sub
    assert run(ops.lookup, sub, b"..", CTX).st_ino == root
    assert run(ops.lookup, root, b"..", CTX).st_ino == inodes.TREES_INODE
    assert run(ops.lookup, inodes.TREES_INODE, b"..", CTX).st_ino == inodes.ROOT_INODE
    assert run(ops.lookup, inode, b"..", CTX).st_ino == inodes.DEVICES_INODE


@pytest.mark.parametrize("name", ["setattr", "mknod", "mkdir", "unlink", "rmdir", "symlink", "rename", "link", "write",
                                  "create", "setxattr", "removexattr"])
def test_every_change_is_refused(name: str):
    ops, *_ = serve()
    assert error_of(getattr(ops, name), 1, b"x", 2, 3) == errno.EROFS


def test_opening_for_writing_is_refused():
    ops, _, slot, _ = serve()
    inode = walk(ops, slot, b"f1").st_ino
    for flags in (os.O_WRONLY, os.O_RDWR):
        assert error_of(ops.open, inode, flags, CTX) == errno.EROFS
    handle = run(ops.open, inode, os.O_RDONLY, CTX)
    assert (handle.fh, handle.keep_cache, handle.direct_io) == (inode, True, False)


@pytest.mark.parametrize(("error", "code"), [
    (SourceError("down"), errno.EIO), (DeadlineError("late"), errno.ETIMEDOUT), (DiskFullError("full"), errno.ENOSPC),
    (IntegrityError("bad"), errno.EIO), (FormatError("odd"), errno.EIO), (ValueError("bug"), errno.EIO),
    (MemoryError(), errno.ENOMEM), (KeyError(3), errno.EIO), (RecursionError(), errno.EIO),
    (trio.TooSlowError(), errno.ETIMEDOUT),
    (OSError(errno.ENOSPC, "x"), errno.EIO),
])
def test_errors_of_a_read_end_that_read_with_an_errno(error: Exception, code: int, caplog: pytest.LogCaptureFixture):
    ops, device, slot, inode = serve()
    guard._said.clear()

    def fail(offset: int, size: int) -> None:
        raise error

    device.fail = fail
    with caplog.at_level(logging.WARNING, "lazyfs.fs"):
        assert error_of(ops.read, inode, 0, 4096) == code
        assert error_of(ops.read, walk(ops, slot, b"f1").st_ino, 0, 4096) == code
    expected = isinstance(error, LazyfsError | trio.TooSlowError)
    assert len(caplog.records) == (1 if expected else 2), "an outage must not fill the log"
    device.fail = None
    assert run(ops.read, inode, 0, 4096) == SAMPLE.data[:4096]


@pytest.mark.parametrize("short", [b"", b"x", bytes(4095), bytes(4097)])
def test_a_read_of_another_length_is_an_error_never_data(short: bytes, caplog: pytest.LogCaptureFixture):
    ops, device, slot, inode = serve()
    device.fail = lambda offset, size: short
    assert error_of(ops.read, inode, 0, 4096) == errno.EIO
    assert error_of(ops.read, walk(ops, slot, b"f100000").st_ino, 0, 4096) == errno.EIO
    assert "incident" in caplog.text


def test_a_device_that_ignores_its_deadline_is_cut_off(autojump_clock: trio.testing.MockClock):
    ops, device, _, inode = serve()
    device.fail = lambda offset, size: trio.sleep(10_000)   # noqa: ASYNC105 - MemoryDevice awaits it

    async def main() -> None:
        before = trio.current_time()
        with pytest.raises(pyfuse3.FUSEError) as info:
            await ops.read(inode, 0, 4096)
        assert info.value.errno == errno.ETIMEDOUT
        assert device.read_timeout_s <= trio.current_time() - before < device.read_timeout_s + 5

    trio.run(main, clock=autojump_clock)


def test_what_is_no_longer_served_is_stale():
    served = Served()
    device = MemoryDevice(SAMPLE.data)
    index, slot = served.add_device(device), served.new_slot()
    served.add_image(slot, SAMPLE.tree, (device,))
    ops = LazyOperations(served)
    inode = walk(ops, slot, b"f1").st_ino
    directory = walk(ops, slot, b"sub").st_ino
    served.remove_device(index)
    served.remove_image(slot)
    assert error_of(ops.read, inode, 0, 1) == errno.ESTALE
    assert error_of(ops.getattr, directory, CTX) == errno.ESTALE
    assert error_of(ops.read, inodes.device_inode(index), 0, 1) == errno.ESTALE
    assert error_of(ops.getattr, inodes.device_inode(index), CTX) == errno.ESTALE
    assert error_of(ops.lookup, inodes.TREES_INODE, str(slot).encode(), CTX) == errno.ENOENT
    assert served.new_slot() != slot
    assert served.add_device(device) != index


@pytest.mark.parametrize("inode", [0, 4, 15, 17, 999, inodes.tree_inode(1, 1), inodes.tree_inode(5, 1), (1 << 63) - 1])
def test_numbers_that_mean_nothing_get_an_errno(inode: int, caplog: pytest.LogCaptureFixture):
    ops, *_ = serve()
    for handler, arguments in ((ops.getattr, (CTX,)), (ops.read, (0, 10)), (ops.readlink, (CTX,)),
                               (ops.readdir, (0, None)), (ops.lookup, (b"x", CTX))):
        assert error_of(handler, inode, *arguments) in UNKNOWN


def test_open_files_are_counted_for_a_lazy_detach():
    served = Served()
    device = MemoryDevice(SAMPLE.data)
    index, slot = served.add_device(device), served.new_slot()
    served.add_image(slot, SAMPLE.tree, (device,))
    ops = LazyOperations(served)
    file, directory = walk(ops, slot, b"f1").st_ino, walk(ops, slot, b"sub").st_ino
    assert not served.image_in_use(slot)
    run(ops.open, file, 0, CTX)
    run(ops.opendir, directory, CTX)
    run(ops.open, inodes.device_inode(index), 0, CTX)
    assert served.image_in_use(slot)
    assert served.device_in_use(index)
    run(ops.release, file)
    assert served.image_in_use(slot)
    run(ops.releasedir, directory)
    run(ops.release, inodes.device_inode(index))
    assert not served.image_in_use(slot)
    assert not served.device_in_use(index)


def test_statfs_has_what_overlayfs_and_df_want():
    ops, device, *_ = serve()
    data = run(ops.statfs, CTX)
    assert (data.f_bsize, data.f_namemax, data.f_bfree, data.f_blocks) == (4096, 255, 0, device.size // BLOCK)
