"""
TLS over a connection, for large bodies: decrypted where they are wanted, read and sent in large portions.

Layer: peers. Who calls: peers.channel, and who makes one for it. Why not trio.SSLStream: that gives one record (16 KiB)
at a time, out of 32 KiB reads, each as an object of its own; receiving took 5.8 s of a core for a GB, of which
encryption is a tenth. State: OpenSSL's, and what was read and is not decrypted yet (READ_BYTES at most; as much is
being sent); the room for reading is one for all connections of a loop. One task may read while another sends. A
cancelled read loses nothing; a cancelled send leaves a connection that is only good to be closed. An end without a
goodbye is an end: frames say themselves whether they are whole.
"""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import trio

from lazyfs.limits import KIB

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")
READ_BYTES: Final = 128 * KIB        # OpenSSL keeps room for as much, of each connection
_WRITE_BYTES: Final = 128 * KIB
_REPLY_S: Final = 5.0                # 30 bytes; then the connection is of no use
_room: Final[trio.lowlevel.RunVar[memoryview | None]] = trio.lowlevel.RunVar("securestream_room", None)


class SecureStream:
    """See the module. `transport`: what is below."""

    def __init__(self, transport: trio.SocketStream, context: ssl.SSLContext, *, server_side: bool = False,
                 server_hostname: str | None = None) -> None:
        self.transport = transport
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side,
                                     server_hostname=server_hostname)
        self._sending = trio.Lock()
        self._ready = False

    async def shake_hands(self) -> Self:
        """
        Once; the first read or write does so where nobody has.

        Raises:
            trio.BrokenResourceError: the other side is none that is believed, or does not believe us, or is gone.

        """
        if not self._ready:
            await self._while_wanting(self._tls.do_handshake)
            self._ready = True
        return self

    def certificate(self) -> dict[str, Any] | None:
        """The other side's, as SSLSocket.getpeercert() gives it."""
        return self._tls.getpeercert()

    async def receive_into(self, view: memoryview) -> int:
        """Some bytes; 0: the other side has ended. Checkpoint: yes. Raises trio.BrokenResourceError, OSError."""
        await self.shake_hands()
        done = 0
        while not done:
            try:
                while done < len(view):
                    count: int = self._tls.read(len(view) - done, view[done:])    # type: ignore[assignment]
                    if not count:
                        return done
                    done += count
            except ssl.SSLWantReadError:
                if not done:
                    await self._reply()
                    await self._read()
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                return done
            except ssl.SSLError as error:
                raise trio.BrokenResourceError(str(error)) from error
        await trio.lowlevel.cancel_shielded_checkpoint()     # cancelled here, what was read would be lost
        return done

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Raises trio.BrokenResourceError, trio.ClosedResourceError."""
        await self.shake_hands()
        view = memoryview(data)
        for start in range(0, len(view), _WRITE_BYTES):
            try:
                self._tls.write(view[start:start + _WRITE_BYTES])     # into memory: all of it, always
            except ssl.SSLError as error:
                raise trio.BrokenResourceError(str(error)) from error
            await self._flush()

    async def aclose(self) -> None:
        """At once, without a goodbye."""
        await trio.aclose_forcefully(self.transport)

    async def _while_wanting(self, work: Callable[[], _T]) -> _T:
        while True:
            try:
                found = work()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._read()
                continue
            except ssl.SSLError as error:
                await self._flush()         # why, to the other side
                raise trio.BrokenResourceError(str(error)) from error
            await self._flush()
            return found

    async def _flush(self) -> None:
        if self._outgoing.pending:
            async with self._sending:
                data = self._outgoing.read()
                if data:
                    await self.transport.send_all(data)

    async def _reply(self) -> None:
        """What reading brought about (new keys), never cut off half way: who sends just now takes it along."""
        if self._outgoing.pending and not self._sending.locked():
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _REPLY_S):
                await self._flush()

    async def _read(self) -> None:
        """What there is, and at once into OpenSSL's hands: nobody else has the room in between."""
        room = _room.get()
        if room is None:
            room = memoryview(bytearray(READ_BYTES))
            _room.set(room)
        connection = self.transport.socket
        while True:
            try:
                count = os.readv(connection.fileno(), (room,))
            except BlockingIOError:
                await trio.lowlevel.wait_readable(connection)
                continue
            break
        if count:
            self._incoming.write(room[:count])
        else:
            self._incoming.write_eof()
