"""
A connection between peers as bytes: exact reads, sends, and files by sendfile where there is no TLS between.

Layer: peers. Who calls: peers.handshake, peers.client, peers.server. One task may read while another sends. A call that
was cancelled while it read loses nothing of what it did not return; one that was cancelled while it sent leaves a
connection that is good for nothing but to be closed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import termios
from typing import TYPE_CHECKING

import trio

from lazyfs import limits
from lazyfs.errors import CacheError, PeerError
from lazyfs.peers.securestream import SecureStream

if TYPE_CHECKING:
    from lazyfs.peers.model import FileRange

# Trio's default of 16 KiB makes a system call and a wake-up of every 16 KiB. More than a piece would be sent in vain
# after the asker has left, and ahead of what is more urgent.
_UNSENT_BYTES_MAX = 512 * limits.KIB
_UNSENT_URGENT_BYTES_MAX = 128 * limits.KIB    # of what a read waits for: the next read's piece begins when it has gone
_UNHEARD_MS = 30_000             # not acknowledged, or no room on the other side: a disk may stall a reader for seconds
_TLS_BYTES = 256 * limits.KIB    # read from a file and encrypted at once
_PAGE_IN_BYTES = 128 * limits.KIB
# On a link of 200 Mbit/s bytes come in portions of 10 to 60 KiB, each of which would wake the loop. Not more, for the
# window that a connection begins with is hardly larger: it would be full before anybody takes from it.
_ENOUGH_BYTES = 128 * limits.KIB
_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


class Channel:
    """:stream: connected; a SocketStream is spoken to past trio's own buffering."""

    def __init__(self, stream: trio.SocketStream | SecureStream) -> None:
        self._stream = stream
        self._plain = stream if isinstance(stream, trio.SocketStream) else None
        self._secure = stream if isinstance(stream, SecureStream) else None
        self._low = 1            # SO_RCVLOWAT
        self._emptied = False    # the last read took all there was
        self._unsent_max = _UNSENT_BYTES_MAX
        transport = stream.transport if isinstance(stream, SecureStream) else stream
        try:
            transport.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES_MAX)
            transport.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNHEARD_MS)
            self._socket = transport.socket
            self.peer = str(transport.socket.getpeername()[0])
        except OSError as error:
            raise PeerError(f"peer: gone before it said anything: {error}") from error

    async def receive(self, view: memoryview, *, all_comes: bool = False) -> int:
        """
        Some bytes into `view`; 0: the other side has ended. Checkpoint: yes.

        `all_comes`: as many as it holds are on their way, so it is not worth while to wake up for a few of them.
        Raises PeerError: the connection broke.
        """
        try:
            if self._secure is not None:
                return await self._secure.receive_into(view)
            return await self._receive_plain(self._socket, view, _ENOUGH_BYTES if all_comes else 1)
        except (*_GONE, OSError) as error:
            raise PeerError(f"{self.peer}: connection broke: {_reason(error)}") from error

    async def _receive_plain(self, connection: trio.socket.SocketType, view: memoryview, enough: int) -> int:
        if not self._emptied:
            await trio.lowlevel.checkpoint_if_cancelled()
            count = self._taken(connection, view)
            if count is not None:
                await trio.lowlevel.cancel_shielded_checkpoint()    # what was taken must not be lost
                return count
        low = min(len(view), enough)
        if low != self._low:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low)
            self._low = low
        while True:
            await trio.lowlevel.wait_readable(connection)
            count = self._taken(connection, view)
            if count is not None:
                return count

    def _taken(self, connection: trio.socket.SocketType, view: memoryview) -> int | None:
        """As many bytes as there are; None: none."""
        try:
            count = os.readv(connection.fileno(), (view,))
        except BlockingIOError:
            return None
        self._emptied = count < len(view)
        return count

    def receive_now(self, view: memoryview) -> int:
        """What is there, be it too little to wake up for; 0: nothing. Raises PeerError."""
        try:
            return (self._taken(self._plain.socket, view) or 0) if self._plain is not None else 0
        except OSError as error:
            raise PeerError(f"{self.peer}: connection broke: {_reason(error)}") from error

    async def fill(self, view: memoryview) -> None:
        """Exactly its bytes. Raises PeerError: the connection ended or broke before."""
        done = 0
        while done < len(view):
            count = await self.receive(view[done:])
            if not count:
                raise PeerError(f"{self.peer}: connection ended, {len(view) - done} bytes early")
            done += count

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """All of it. Raises PeerError."""
        try:
            await self._stream.send_all(data)
        except (*_GONE, OSError) as error:
            raise PeerError(f"{self.peer}: connection broke: {_reason(error)}") from error

    def keep_unsent(self, *, urgent: bool) -> None:
        """How much may lie in the kernel before it is sent: little of what others wait behind."""
        size = _UNSENT_URGENT_BYTES_MAX if urgent else _UNSENT_BYTES_MAX
        if size != self._unsent_max:
            self._unsent_max = size
            with contextlib.suppress(OSError):    # it is gone: sending says so
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, size)

    async def send_with(self, head: bytes, data: bytes | memoryview | FileRange) -> None:
        """
        A header, and what it announces.

        Raises:
            PeerError: the connection broke.
            CacheError: the file is shorter than was said, or cannot be read. The connection is of no use any more.

        """
        if isinstance(data, (bytes, memoryview)):
            await self.send(head + data if len(data) <= _TLS_BYTES else head)
            if len(data) > _TLS_BYTES:
                await self.send(data)
        elif self._plain is None:
            await self._send_read(head, data)
        else:
            await self._send_file(self._plain.socket, head, data)

    async def _send_read(self, head: bytes, part: FileRange) -> None:
        await self.send(head)
        for start in range(0, part.size, _TLS_BYTES):
            size = min(_TLS_BYTES, part.size - start)
            data = _read_now(part.file, size, part.offset + start)
            if not data:
                data = await trio.to_thread.run_sync(os.pread, part.file, size, part.offset + start)
            if len(data) != size:
                raise CacheError(f"cache file ends at {part.offset + start + len(data)}, in a piece being sent")
            await self.send(data)

    async def _send_file(self, connection: trio.socket.SocketType, head: bytes, part: FileRange) -> None:
        try:
            sent = await connection.send(head, socket.MSG_MORE)    # a checkpoint, even if nothing has to wait for room
            if sent < len(head):
                await self.send(head[sent:])
            offset, end = part.offset, part.offset + part.size
            while offset < end:
                try:
                    count = os.sendfile(connection.fileno(), part.file, offset, end - offset)
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(connection)
                    continue
                if not count:
                    raise CacheError(f"cache file ends at {offset}, in a piece being sent")
                offset += count
        except (*_GONE, ConnectionError) as error:
            raise PeerError(f"{self.peer}: connection broke: {_reason(error)}") from error
        except OSError as error:
            if error.errno in {errno.EIO, errno.EINVAL}:
                raise CacheError(f"cache file: {os.strerror(error.errno)}, in a piece being sent") from error
            raise PeerError(f"{self.peer}: connection broke: {_reason(error)}") from error

    def unsent(self) -> int:
        """Bytes that were sent, and that the other side has not said to have; 0 where the kernel does not tell."""
        try:
            return int.from_bytes(fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        except (OSError, ValueError):    # it is closed
            return 0

    async def close(self) -> None:
        """At once, without waiting for the other side."""
        await trio.aclose_forcefully(self._stream.transport if isinstance(self._stream, SecureStream) else self._stream)


async def page_in(part: FileRange, threads: trio.CapacityLimiter) -> None:
    """
    Have the kernel read a file's range in a thread, unless it looks as if it had it in memory already.

    Else sendfile would stop the loop for the disk, and with it all readers of the node.
    """
    if not (_in_memory(part.file, part.offset) and _in_memory(part.file, part.offset + part.size - 1)):
        await trio.to_thread.run_sync(_read_through, part.file, part.offset, part.size, limiter=threads)


def _read_now(file: int, size: int, offset: int) -> bytes | bytearray:
    """What is in memory, as it mostly is (page_in); nothing: the disk would have to be waited for."""
    data = bytearray(size)
    try:
        return data if os.preadv(file, [data], offset, os.RWF_NOWAIT) == size else b""
    except OSError:
        return b""


def _in_memory(file: int, offset: int) -> bool:
    try:
        os.preadv(file, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True     # the file system cannot tell, or the send finds out what is wrong
    return True


def _read_through(file: int, offset: int, size: int) -> None:
    room = [memoryview(bytearray(_PAGE_IN_BYTES))]
    try:
        for start in range(offset, offset + size, _PAGE_IN_BYTES):
            os.preadv(file, room, start)
    except OSError:
        pass    # the send finds it, and says so


def _reason(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    return os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else str(error) or "closed"
