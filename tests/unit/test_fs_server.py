"""The loop that answers the kernel, asked over a socket pair in its place: one answer a request, whatever happens."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest
import trio

from lazyfs.errors import DeadlineError, DiskFullError, FormatError, IntegrityError, LazyfsError, SourceError
from lazyfs.fs import guard, inodes, server, wire
from lazyfs.fs.operations import LazyOperations
from lazyfs.fs.served import Served
from lazyfs.fs.server import FuseServer
from tests.mountkit import MemoryDevice, sample_tree

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SAMPLE = sample_tree()
OPEN = wire.OPEN_IN.pack(os.O_RDONLY) + bytes(4)
DEADLINE_S = 20.0


class Kernel:
    """The other end: asks, and takes the answers."""

    def __init__(self, end: socket.socket, slot: int, device: MemoryDevice) -> None:
        self.end = trio.socket.from_stdlib_socket(end)
        self.device = device
        self.root = inodes.tree_inode(slot, SAMPLE.tree.root_nid)
        self.file = inodes.tree_inode(slot, SAMPLE.tree.lookup(SAMPLE.tree.root_nid, b"f100000") or 0)

    async def ask(self, opcode: int, inode: int, body: bytes = b"", unique: int = 2) -> None:
        await self.end.send(wire.HEADER.pack(wire.HEADER.size + len(body), opcode, unique, inode, 0, 0, 0, 0) + body)

    async def answer(self) -> tuple[int, int, bytes]:
        """(unique, errno, data)."""
        with trio.fail_after(DEADLINE_S):
            data = await self.end.recv(1 << 21)
        length, code, unique = wire.OUT_HEADER.unpack_from(data)
        assert length == len(data)
        return unique, -code, data[wire.OUT_HEADER.size :]

    async def asked(self, opcode: int, inode: int, body: bytes = b"") -> tuple[int, bytes]:
        await self.ask(opcode, inode, body)
        unique, code, data = await self.answer()
        assert unique == 2
        return code, data

    async def read(self, size: int = 4096, unique: int = 2) -> None:
        await self.ask(wire.READ, self.file, wire.READ_IN.pack(0, 0, size) + bytes(20), unique)


@contextlib.asynccontextmanager
async def serving(*, patient: bool = False) -> AsyncIterator[Kernel]:
    served = Served()
    device = MemoryDevice(SAMPLE.data)
    slot = served.new_slot()
    served.add_image(slot, SAMPLE.tree, (device,))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.setblocking(False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(FuseServer(LazyOperations(served, patient=patient), theirs.fileno()).serve)
            yield Kernel(ours, slot, device)
            nursery.cancel_scope.cancel()


def test_the_kernel_is_told_how_we_want_to_be_asked():
    async def main() -> None:
        async with serving() as kernel:
            offered = wire.ASYNC_READ | wire.MAX_PAGES | wire.DO_READDIRPLUS | 1 << 16   # 16: a writeback cache
            code, data = await kernel.asked(wire.INIT, 0, wire.INIT_IN.pack(7, 45, 131072, offered) + bytes(48))
            major, minor, readahead, flags, background, _, write, _, pages = struct.unpack_from("<IIIIHHIIH", data)
            assert (code, len(data), major, minor, readahead) == (0, 64, 7, 38, 131072)
            assert flags == wire.ASYNC_READ | wire.MAX_PAGES | wire.DO_READDIRPLUS
            assert (background, write, pages) == (server.MAX_BACKGROUND, 4096, 256)
            assert (await kernel.asked(wire.INIT, 0, wire.INIT_IN.pack(7, 12, 0, 0)))[0] != 0, "too old"

    trio.run(main)


@pytest.mark.parametrize("opcode", server._WRITERS)
def test_every_change_is_refused(opcode: int):
    async def main() -> None:
        async with serving() as kernel:
            assert await kernel.asked(opcode, kernel.root, b"x\0") == (errno.EROFS, b"")

    trio.run(main)


def test_what_nobody_knows_gets_an_errno_and_forget_gets_nothing():
    async def main() -> None:
        async with serving() as kernel:
            await kernel.ask(wire.FORGET, kernel.root, bytes(8), unique=3)
            await kernel.ask(wire.BATCH_FORGET, 0, bytes(24), unique=4)
            for opcode in (0, 25, wire.INTERRUPT, 999, 0xFFFFFFFF):
                assert await kernel.asked(opcode, kernel.root) == (errno.ENOSYS, b"")
            assert (await kernel.asked(wire.DESTROY, 0))[0] == 0

    trio.run(main)


def test_names_that_are_missing_are_said_to_be_so_for_good():
    async def main() -> None:
        async with serving() as kernel:
            code, data = await kernel.asked(wire.LOOKUP, kernel.root, b"nothing\0")
            assert (code, data) == (0, wire.pack_no_entry(1 << 30))
            assert (await kernel.asked(wire.LOOKUP, inodes.TREES_INODE, b"99\0"))[0] == errno.ENOENT

    trio.run(main)


@pytest.mark.parametrize("room", [0, 3, 100])
def test_xattrs_fit_or_say_how_long_they_are(room: int):
    async def main() -> None:
        async with serving() as kernel:
            status = await kernel.asked(wire.LOOKUP, kernel.root, b"two\0")
            two = struct.unpack_from("<Q", status[1])[0]
            size = wire.GETXATTR_IN.pack(room, 0)
            expected = {0: (0, struct.pack("<II", 14, 0)), 3: (errno.ERANGE, b""), 100: (0, b"user.a\0user.b\0")}
            assert await kernel.asked(wire.LISTXATTR, two, size) == expected[room]
            value = (0, struct.pack("<II", 2, 0)) if room == 0 else (0, b"\0\xff")
            assert await kernel.asked(wire.GETXATTR, two, size + b"user.b\0") == value
            assert (await kernel.asked(wire.GETXATTR, two, size + b"user.c\0"))[0] == errno.ENODATA

    trio.run(main)


def test_statfs_has_what_overlayfs_and_df_want():
    async def main() -> None:
        async with serving() as kernel:
            code, data = await kernel.asked(wire.STATFS, kernel.root)
            _, free, _, _, _, block, name_max, fragment = struct.unpack_from("<QQQQQIII", data)
            assert (code, free, block, name_max, fragment, len(data)) == (0, 0, 4096, 255, 4096, 80)

    trio.run(main)


@pytest.mark.parametrize(("error", "code"), [
    (SourceError("down"), errno.EIO), (DeadlineError("late"), errno.ETIMEDOUT), (DiskFullError("full"), errno.ENOSPC),
    (IntegrityError("bad"), errno.EIO), (FormatError("odd"), errno.EIO), (ValueError("bug"), errno.EIO),
    (MemoryError(), errno.ENOMEM), (KeyError(3), errno.EIO), (RecursionError(), errno.EIO),
    (trio.TooSlowError(), errno.ETIMEDOUT), (OSError(errno.ENOSPC, "x"), errno.EIO),
])
@pytest.mark.parametrize("at_hand", [False, True])
def test_errors_end_their_request_and_nothing_else(
    error: Exception, code: int, at_hand: bool, caplog: pytest.LogCaptureFixture
):
    async def main() -> None:
        async with serving() as kernel:
            def fail(offset: int, size: int) -> None:
                raise error

            kernel.device.fail, kernel.device.at_hand = fail, at_hand
            for _ in range(2):
                await kernel.read()
                assert await kernel.answer() == (2, code, b"")
            kernel.device.fail = None
            await kernel.read()
            assert await kernel.answer() == (2, 0, SAMPLE.files[b"f100000"][:4096])

    guard._said.clear()
    with caplog.at_level(logging.WARNING, "lazyfs.fs"):
        trio.run(main)
    expected = isinstance(error, LazyfsError | trio.TooSlowError)
    assert len(caplog.records) == (1 if expected else 2), "an outage must not fill the log"


def test_a_read_that_waits_holds_up_nobody():
    async def main() -> None:
        async with serving() as kernel:
            arrived = trio.Event()
            kernel.device.fail = lambda offset, size: arrived.wait()
            await kernel.read(unique=8)
            assert (await kernel.asked(wire.GETATTR, kernel.root, bytes(16)))[0] == 0
            arrived.set()
            assert await kernel.answer() == (8, 0, SAMPLE.files[b"f100000"][:4096])

    trio.run(main)


def test_when_too_many_reads_wait_no_request_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server, "READS_MAX", 2)

    async def main() -> None:
        async with serving() as kernel:
            arrived = trio.Event()
            kernel.device.fail = lambda offset, size: arrived.wait()
            for unique in (8, 10):
                await kernel.read(unique=unique)
            await kernel.ask(wire.GETATTR, kernel.root, bytes(16), unique=12)
            await trio.testing.wait_all_tasks_blocked(0.01)
            arrived.set()
            assert sorted([(await kernel.answer())[0] for _ in range(2)]) == [8, 10]
            assert (await kernel.answer())[:2] == (12, 0)

    trio.run(main)


def test_a_small_file_is_given_before_the_answer_to_its_open():
    async def main() -> None:
        async with serving() as kernel:
            content = SAMPLE.files[b"f100000"]
            kernel.device.at_hand = True
            await kernel.ask(wire.OPEN, kernel.file, OPEN)
            notified, kind, data = await kernel.answer()
            assert (notified, -kind) == (0, wire.NOTIFY_STORE)
            assert data == struct.pack("<QQII", kernel.file, 0, len(content), 0) + content
            assert await kernel.answer() == (2, 0, wire.pack_open(kernel.file, wire.KEEP_CACHE))
            assert await kernel.asked(wire.OPEN, kernel.file, OPEN) == (0, wire.pack_open(kernel.file, wire.KEEP_CACHE))

    trio.run(main)


def test_only_an_image_s_listing_may_be_kept():
    async def main() -> None:
        async with serving() as kernel:
            kept = wire.pack_open(kernel.root, wire.KEEP_CACHE | wire.CACHE_DIR)
            assert await kernel.asked(wire.OPENDIR, kernel.root, OPEN) == (0, kept)
            own = wire.pack_open(inodes.TREES_INODE, 0)
            assert await kernel.asked(wire.OPENDIR, inodes.TREES_INODE, OPEN) == (0, own)

    trio.run(main)
