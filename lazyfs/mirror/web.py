"""
An HTTP/1.1 server for large answers: keep-alive, bodies of any size in order, files by sendfile, CONNECT.

Layer: mirror. Who calls: mirror.serving gives it a handler (one coroutine a request). State: the connections. Bounds:
of a header, a request's body, the number of connections, and the time that a client may be silent. A client that goes
away in the middle of an answer is normal: nothing is said about it.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, NoReturn

import h11
import trio

from lazyfs.config import split_address
from lazyfs.errors import BugError, TargetError
from lazyfs.guests import GONE, Guests, see_off
from lazyfs.limits import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

_HEADER_BYTES_MAX: Final = 32 * KIB      # a token of a cloud's registry is 4 KiB
_BODY_BYTES_MAX: Final = 64 * KIB        # nobody sends one to a mirror; a job of preheating is small
_READ_BYTES: Final = 64 * KIB
_SENDFILE_BYTES: Final = 4 * MIB
_REFUSAL_S: Final = 1.0                  # for one line
HEADER_S: Final = 15.0                   # from a connection's first byte to the end of a request
IDLE_S: Final = 90.0                     # clients keep connections for 90 s (Go) or less
STALL_S: Final = 300.0                   # a client that takes nothing: containerd itself gives a pull up after 5 min
CONNECTION_COUNT_MAX: Final = 512        # each may hold a piece of 4 MiB for a moment; a pull opens 3 to 6
_THREAD_COUNT: Final = 16                # which may wait for the disk in sendfile
_log = logging.getLogger("lazyfs.mirror")


@dataclass(frozen=True, slots=True)
class Request:
    """A request with its body. `headers`: names in lower case; of several of one name the last."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes = b""
    peer: str = ""


class _FileBytes:
    """Stands for bytes that sendfile will send: h11 counts them by their length."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


class Reply:
    """
    The answer to one request: `whole()`, or `begin()`, then `write()` and `send_file()`, then `end()`.

    Every method raises trio.BrokenResourceError where nobody reads any more.
    """

    def __init__(self, stream: trio.SocketStream, http: h11.Connection, method: str, threads: trio.CapacityLimiter,
                 ) -> None:
        self._stream = stream
        self._http = http
        self._threads = threads
        self.method = method
        self.has_begun = False
        self.has_ended = False
        self.body_bytes = 0
        self.status = 0

    async def whole(self, status: int, headers: Mapping[str, str], body: bytes = b"", *,
                    size: int | None = None) -> None:
        """An answer at once. `size`: of the body that a HEAD does not get, where `body` is not given."""
        data = b"" if self.method == "HEAD" else body
        first = self._head(status, {**headers, "Content-Length": str(len(body) if size is None else size)})
        events = first + (self._encode(h11.Data(data=data)) if data else b"") + self._encode(h11.EndOfMessage())
        self.body_bytes += len(data)
        self.has_ended = True
        await self._send(events)

    async def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """The header; without Content-Length the body is sent in chunks."""
        await self._send(self._head(status, headers))

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        for part in self._http.send_with_data_passthrough(h11.Data(data=data)) or ():  # type: ignore[arg-type]
            await self._send(part)
        self.body_bytes += len(data)

    async def send_file(self, file: int, offset: int, size: int) -> None:
        """`size` bytes of a file. Raises trio.BrokenResourceError as well where it is shorter: the answer is torn."""
        for part in self._http.send_with_data_passthrough(h11.Data(data=_FileBytes(size))) or ():  # type: ignore[arg-type]
            if isinstance(part, _FileBytes):
                await self._sendfile(file, offset, size)
            else:
                await self._send(part)

    async def _sendfile(self, file: int, offset: int, size: int) -> None:
        end = offset + size
        socket = self._stream.socket
        while offset < end:
            try:
                sent = await trio.to_thread.run_sync(os.sendfile, socket.fileno(), file, offset,
                                                     min(end - offset, _SENDFILE_BYTES), limiter=self._threads)
            except BlockingIOError:
                with trio.move_on_after(STALL_S) as scope:
                    await trio.lowlevel.wait_writable(socket)
                if scope.cancelled_caught:
                    raise trio.BrokenResourceError("the client takes nothing") from None
                continue
            except OSError as error:
                raise trio.BrokenResourceError(str(error)) from error
            if not sent:
                raise trio.BrokenResourceError("the file is shorter than it was")
            offset += sent
            self.body_bytes += sent

    async def end(self) -> None:
        self.has_ended = True
        await self._send(self._encode(h11.EndOfMessage()))

    def tunnel(self) -> tuple[trio.SocketStream, bytes]:
        """After a 2xx to CONNECT: the connection itself, and what the client has sent already."""
        return self._stream, self._http.trailing_data[0]

    def _head(self, status: int, headers: Mapping[str, str]) -> bytes:
        if self.has_begun:
            raise BugError("a second answer to one request")
        self.has_begun, self.status = True, status
        encoded = [(name.encode("ascii"), value.encode("latin-1")) for name, value in headers.items()]
        return self._encode(h11.Response(status_code=status, headers=encoded))

    def _encode(self, event: h11.Event) -> bytes:
        return self._http.send(event) or b""

    async def _send(self, data: bytes | bytearray | memoryview) -> None:
        with trio.move_on_after(STALL_S) as scope:
            await self._stream.send_all(data)
        if scope.cancelled_caught:
            raise trio.BrokenResourceError("the client takes nothing")


async def listen(address: str) -> list[trio.SocketListener]:
    """
    Sockets for host:port.

    Raises:
        TargetError: it cannot be used.

    """
    host, port = split_address(address)
    try:
        return await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        raise TargetError(f"cannot listen at {address}: {error.strerror or error}",
                          hint="another program has this address; set mirror.address") from error


async def serve(listeners: list[trio.SocketListener],
                handler: Callable[[Request, Reply], Awaitable[None]]) -> NoReturn:
    """Answer until cancelled. What a handler raises ends its connection, and is logged as a bug."""
    guests = Guests(CONNECTION_COUNT_MAX, _log, "a connection")
    serve_one = partial(_serve_one, handler=handler, guests=guests, threads=trio.CapacityLimiter(_THREAD_COUNT))
    async with trio.open_nursery() as nursery:
        for listener in listeners:
            nursery.start_soon(guests.accept, listener, serve_one, nursery)
    raise BugError("listeners ended")


async def _serve_one(stream: trio.SocketStream, *, handler: Callable[[Request, Reply], Awaitable[None]],
                     guests: Guests, threads: trio.CapacityLimiter) -> None:
    try:
        peer = str(stream.socket.getpeername()[0])
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEADER_BYTES_MAX)
        while True:
            request = await _next_request(stream, http, guests, peer)
            if request is None:
                break
            reply = Reply(stream, http, request.method, threads)
            await handler(request, reply)
            if not reply.has_ended or http.our_state is not h11.DONE or http.their_state is not h11.DONE:
                break
            http.start_next_cycle()
    except GONE:
        pass   # the client's affair
    except Exception:  # noqa: BLE001 - must not end the others
        _log.exception("a request failed")


async def _next_request(stream: trio.SocketStream, http: h11.Connection, guests: Guests,
                        peer: str) -> Request | None:
    """The next one on a connection; None: there is none, or it was none and has been answered."""
    head: h11.Request | None = None
    body = bytearray()
    scope = trio.CancelScope(deadline=trio.current_time() + IDLE_S)
    guests.idle(scope)
    try:
        with scope:
            while True:
                event = http.next_event()
                if event is h11.NEED_DATA:
                    if http.they_are_waiting_for_100_continue:
                        await stream.send_all(http.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
                    data = await stream.receive_some(_READ_BYTES)
                    http.receive_data(bytes(data))
                    if data:
                        guests.busy(scope)
                        scope.deadline = min(scope.deadline, trio.current_time() + HEADER_S)
                elif isinstance(event, h11.Request):
                    head = event
                    guests.busy(scope)
                    _check_length(head)
                elif isinstance(event, h11.Data):
                    body += event.data
                    if len(body) > _BODY_BYTES_MAX:
                        await _refuse(stream, http, 413)
                        return None
                elif head is not None and (isinstance(event, h11.EndOfMessage) or event is h11.PAUSED):
                    break
                else:
                    return None
    except h11.RemoteProtocolError as error:
        await _refuse(stream, http, error.error_status_hint)
        return None
    finally:
        guests.busy(scope)
    if scope.cancelled_caught or head is None:
        return None
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
    return Request(head.method.decode("ascii"), head.target.decode("ascii"), headers, bytes(body), peer)


def _check_length(head: h11.Request) -> None:
    """Raises h11.RemoteProtocolError: it is said in two ways, and who stands between may believe the other one."""
    if {b"transfer-encoding", b"content-length"} <= {name for name, _ in head.headers}:
        raise h11.RemoteProtocolError("two lengths")


async def _refuse(stream: trio.SocketStream, http: h11.Connection, status: int) -> None:
    if http.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
        headers = [("Content-Length", "0"), ("Connection", "close")]
        answer = (http.send(h11.Response(status_code=status, headers=headers)) or b"") + (
            http.send(h11.EndOfMessage()) or b"")
        with trio.move_on_after(_REFUSAL_S):
            await stream.send_all(answer)
        await see_off(stream)
