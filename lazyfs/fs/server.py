"""
The loop that answers the kernel: one request read from /dev/fuse, one answer written, and so on.

A request is nearly always followed by the next within microseconds, and nearly every answer needs no waiting, so the
loop does not go through trio's scheduler for each: it answers in place, and looks for the next request with a short
select(2) before it goes to sleep. A read that has to wait for data goes on in a task of its own.

Layer: fs. Who calls: fs.session. State: reads that wait. Invariants: every request but FORGET gets exactly one answer,
whatever its handler raises, and also if it never ends (fs.waiting); other tasks get a turn every TURN_S, and then some;
at most READS_MAX reads wait, and then no further request is taken. The descriptor must be non-blocking: between
"readable" and the read the kernel may withdraw a request (its caller was killed), and a blocking read would then stop
everything.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import random
import select
import time
from typing import TYPE_CHECKING

import trio

from lazyfs import limits, requestid
from lazyfs.errors import HostError
from lazyfs.fs import guard, wire
from lazyfs.fs.waiting import WaitingReads

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs.fetch.readtrace import ReadTrace
    from lazyfs.fs.operations import LazyOperations
    from lazyfs.fs.waiting import WaitingRead

    # of (inode, body, unique): what to answer with; None: nothing now, or never
    Handler = Callable[[int, memoryview, int], "bytes | memoryview | None"]

_log = logging.getLogger("lazyfs.fs")
# A caller on another core needs 10 to 40 us for its next request, one that is not running some more; a trip through
# trio's scheduler costs about 50 us.
HOT_WAIT_S = 1e-3
HOT_WAIT_BUSY_S = 50e-6          # while reads wait for data, whose arrival other tasks have to handle
TURN_S = 2e-3                    # so long, then other tasks get a turn
READS_MAX = 2048                 # above MAX_BACKGROUND + the foreground ones of many processes
# FUSE's default lets 12 read-ahead requests wait at a time; a dozen that wait for the network would then hold up
# reads of cached data. This many are those of some 500 processes that wait for a registry that is down.
MAX_BACKGROUND = 1024
AGAIN_FIRST_S, AGAIN_MAX_S = 0.5, 10.0   # policy `wait`: between two attempts of a read; doubles, times 0.5 to 1.5
_REQUEST_BYTES_MAX = (1 << 20) + 8192   # what a connection set up by another server may demand as room (max_write)
_READ_PAGES_MAX = 256            # a read of 1 MiB
_SELECT_FD_MAX = 1023            # FD_SETSIZE - 1
_FLAGS = (wire.ASYNC_READ | wire.EXPORT_SUPPORT | wire.DO_READDIRPLUS | wire.ASYNC_DIO | wire.PARALLEL_DIROPS
          | wire.POSIX_ACL | wire.MAX_PAGES | wire.CACHE_SYMLINKS)
_NEVER_S = 1 << 30
# What changes something, if the kernel should ask although the mount is read-only.
_WRITERS = (wire.SETATTR, wire.SYMLINK, wire.MKNOD, wire.MKDIR, wire.UNLINK, wire.RMDIR, wire.RENAME, wire.LINK,
            wire.WRITE, wire.SETXATTR, wire.REMOVEXATTR, wire.CREATE, wire.FALLOCATE, wire.RENAME2,
            wire.COPY_FILE_RANGE, wire.TMPFILE)
_HEADER_BYTES = wire.HEADER.size
_GONE = {errno.ENODEV, errno.ECONNABORTED}   # unmounted; aborted


class FuseServer:
    """
    Serves one connection. `descriptor`: of /dev/fuse, non-blocking; the caller closes it afterwards.

    `answered_count`: of requests, so far; `waiting_count`: of those that were taken and not answered.
    """

    def __init__(self, operations: LazyOperations, descriptor: int) -> None:
        self._operations = operations
        self._descriptor = descriptor
        self._buffer = mmap.mmap(-1, _REQUEST_BYTES_MAX)   # pages that no request needs are never there
        self._view = memoryview(self._buffer)
        self._pid = 0   # who asked for what is answered now
        self._reads = WaitingReads(self._answer_errno)
        self._read_log = operations.read_log
        self._room = trio.Event()
        self.answered_count = 0
        self._handlers: dict[int, Handler] = {
            wire.INIT: self._init, wire.LOOKUP: self._lookup, wire.GETATTR: self._getattr,
            wire.READLINK: self._readlink, wire.OPEN: self._open, wire.READ: self._read, wire.RELEASE: self._release,
            wire.OPENDIR: self._opendir, wire.READDIR: self._readdir, wire.READDIRPLUS: self._readdirplus,
            wire.RELEASEDIR: self._release, wire.GETXATTR: self._getxattr, wire.LISTXATTR: self._listxattr,
            wire.STATFS: self._statfs, wire.DESTROY: self._nothing, **dict.fromkeys(_WRITERS, self._refuse),
        }  # fmt: skip

    @property
    def waiting_count(self) -> int:
        return len(self._reads)

    async def serve(self) -> None:
        """Answer until the mount is gone. Cancellation: what was not answered is for whoever takes the mount over."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._reads.watch)
            turn_end = time.monotonic() + TURN_S
            while True:
                try:
                    size = os.readv(self._descriptor, (self._buffer,))
                except BlockingIOError:
                    if not self._is_soon():
                        await trio.lowlevel.wait_readable(self._descriptor)
                        turn_end = time.monotonic() + TURN_S
                except OSError as error:
                    if error.errno in _GONE:
                        break
                    if error.errno != errno.ENOENT:   # that request was withdrawn
                        raise
                else:
                    self._handle(size)
                    if time.monotonic() > turn_end:
                        await trio.lowlevel.checkpoint()
                        turn_end = time.monotonic() + TURN_S
                    while len(self._reads) >= READS_MAX:
                        self._room = trio.Event()
                        await self._room.wait()
            nursery.cancel_scope.cancel()   # nobody is left to be answered

    def _is_soon(self) -> bool:
        """Wait a moment; whether there is something to read."""
        wait_s = HOT_WAIT_BUSY_S if self._reads else HOT_WAIT_S
        return self._descriptor <= _SELECT_FD_MAX and bool(select.select((self._descriptor,), (), (), wait_s)[0])

    def _handle(self, size: int) -> None:
        _, opcode, unique, inode, _, _, self._pid, _ = wire.HEADER.unpack_from(self._buffer)
        if opcode in (wire.FORGET, wire.BATCH_FORGET):
            return   # no lookup counts: a number means the same for ever
        handler = self._handlers.get(opcode)
        if handler is None:
            # also INTERRUPT: a signal must not end a read of a file, and the kernel need not tell us of more of them
            self._answer_errno(unique, errno.ENOSYS)
            return
        try:
            answer = handler(inode, self._view[_HEADER_BYTES:size], unique)
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends this request and nothing else
            self._read_log.count_error(error)
            with requestid.during(requestid.of_fuse(unique)):
                self._answer_errno(unique, guard.errno_of(error, handler.__name__[1:]))
        else:
            if answer is not None:
                self._answer(unique, answer)

    def _answer(self, unique: int, data: bytes | memoryview) -> None:
        self.answered_count += 1
        header = wire.OUT_HEADER.pack(wire.OUT_HEADER.size + len(data), 0, unique)
        self._write(unique, (header, data))

    def _answer_errno(self, unique: int, code: int) -> None:
        self.answered_count += 1
        self._write(unique, (wire.OUT_HEADER.pack(wire.OUT_HEADER.size, -code, unique),))

    def _write(self, unique: int, parts: tuple[bytes | memoryview, ...]) -> None:
        try:
            os.writev(self._descriptor, parts)
        except OSError as error:
            if error.errno == errno.ENOENT or error.errno in _GONE:
                return   # nobody waits for it any more
            _log.error("request %d: the kernel does not take the answer: %s", unique, error.strerror)

    def _give(self, inode: int, data: bytes | memoryview) -> None:
        """Put a small file into the page cache: a round trip less when it is read."""
        try:
            os.writev(self._descriptor, (wire.pack_store(inode, len(data)), data))
        except OSError as error:
            _log.debug("inode %d: the kernel does not take its content: %s", inode, error.strerror)

    # --- requests, by name -------------------------------------------------------------------------------------------

    def _init(self, _inode: int, body: memoryview, _unique: int) -> bytes:
        major, minor, max_readahead, flags = wire.INIT_IN.unpack_from(body)
        if (major, minor) < (wire.MAJOR, wire.MINOR_MIN):
            need = f"{wire.MAJOR}.{wire.MINOR_MIN}"
            raise HostError(f"this kernel's FUSE speaks {major}.{minor}, expected {need} or newer")
        return wire.pack_init(max_readahead, flags & _FLAGS, MAX_BACKGROUND, _READ_PAGES_MAX)

    def _lookup(self, inode: int, body: memoryview, _unique: int) -> bytes:
        status = self._operations.lookup(inode, bytes(body[:-1]))
        return wire.pack_no_entry(_NEVER_S) if status is None else wire.pack_entry(status)

    def _getattr(self, inode: int, _body: memoryview, _unique: int) -> bytes:
        return wire.pack_attributes(self._operations.status(inode))

    def _readlink(self, inode: int, _body: memoryview, _unique: int) -> bytes:
        return self._operations.readlink(inode)

    def _open(self, inode: int, body: memoryview, _unique: int) -> bytes:
        data = self._operations.open(inode, wire.OPEN_IN.unpack_from(body)[0])
        if data is not None:
            self._give(inode, data)
        return wire.pack_open(inode, wire.KEEP_CACHE)

    def _opendir(self, inode: int, _body: memoryview, _unique: int) -> bytes:
        keep = self._operations.opendir(inode)
        return wire.pack_open(inode, wire.KEEP_CACHE | wire.CACHE_DIR if keep else 0)

    def _release(self, inode: int, _body: memoryview, _unique: int) -> bytes:
        self._operations.release(inode)
        return b""

    def _readdir(self, inode: int, body: memoryview, _unique: int) -> bytes:
        _, offset, size = wire.READDIR_IN.unpack_from(body)
        return self._operations.readdir(inode, offset, size, plus=False)

    def _readdirplus(self, inode: int, body: memoryview, _unique: int) -> bytes:
        _, offset, size = wire.READDIR_IN.unpack_from(body)
        return self._operations.readdir(inode, offset, size, plus=True)

    def _getxattr(self, inode: int, body: memoryview, _unique: int) -> bytes:
        size, _ = wire.GETXATTR_IN.unpack_from(body)
        name = bytes(body[wire.GETXATTR_IN.size : -1])
        for key, value in self._operations.xattrs(inode):
            if key == name:
                return _fitting(value, size)
        raise guard.ErrnoError(errno.ENODATA)

    def _listxattr(self, inode: int, body: memoryview, _unique: int) -> bytes:
        size, _ = wire.GETXATTR_IN.unpack_from(body)
        return _fitting(b"".join(name + b"\0" for name, _ in self._operations.xattrs(inode)), size)

    def _statfs(self, _inode: int, _body: memoryview, _unique: int) -> bytes:
        return wire.pack_statfs(self._operations.block_count(), limits.NAME_BYTES_MAX)

    def _nothing(self, _inode: int, _body: memoryview, _unique: int) -> bytes:
        return b""

    def _refuse(self, _inode: int, _body: memoryview, _unique: int) -> bytes:
        raise guard.ErrnoError(errno.EROFS)

    def _read(self, inode: int, body: memoryview, unique: int) -> bytes | memoryview | None:
        _, offset, size = wire.READ_IN.unpack_from(body)
        data = self._operations.read_now(inode, offset, size, self._pid)
        if data is None:
            self._nursery.start_soon(self._read_later, inode, offset, size, self._reads.begin(unique, self._pid))
        return data

    async def _read_later(self, inode: int, offset: int, size: int, waiting: WaitingRead) -> None:
        code, data = errno.EINTR, None
        with self._read_log.reading(waiting.unique, inode, offset, size, waiting.thread_id) as trace:
            with waiting.scope:
                code, data = await self._attempts(inode, offset, size, waiting, trace)
            if self._reads.end(waiting):
                if data is None:
                    self._answer_errno(waiting.unique, code)
                else:
                    self._answer(waiting.unique, data)
        self._room.set()

    async def _attempts(
        self, inode: int, offset: int, size: int, waiting: WaitingRead, trace: ReadTrace
    ) -> tuple[int, bytes | memoryview | None]:
        """(0, the bytes), or (errno, None). With policy `wait` a source that fails is asked again and again."""
        pause_s = AGAIN_FIRST_S
        while True:
            self._reads.bound(waiting, self._operations.read_timeout_s(inode))
            try:
                data = await self._operations.read(inode, offset, size)
            except Exception as error:  # noqa: BLE001 - as in _handle
                trace.error = guard.kind_of(error)
                code = guard.errno_of(error, "read")
                if not (self._operations.patient and guard.is_of_source(error)):
                    return code, None
            else:
                trace.error = ""
                return 0, data
            self._reads.bound(waiting, pause_s * 2)
            await trio.sleep(pause_s * random.uniform(0.5, 1.5))  # noqa: S311 - spread, not secrecy
            pause_s = min(AGAIN_MAX_S, pause_s * 2)


def _fitting(data: bytes, size: int) -> bytes:
    """An xattr's answer for a caller with so much room; 0: it asks how much it needs."""
    if size == 0:
        return wire.pack_xattr_size(len(data))
    if len(data) > size:
        raise guard.ErrnoError(errno.ERANGE)
    return data
