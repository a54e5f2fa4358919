"""
The tracker's HTTP server: connections that stay open, bounded in number.

Layer: tracker. Who calls: tracker.run. Plain enough for 10,000 nodes that each ask every few seconds: a connection
costs a task, a request one read and one write (tracker.conversation). Whatever a client does costs that client its
connection, and nobody else anything. node.web is the other server: there each request has its own connection.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import h11
import trio

from lazyfs.guests import GONE, Guests
from lazyfs.limits import MIB
from lazyfs.tracker.conversation import REQUEST_S, Caller, Conversation

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from lazyfs.tracker.web import Answer, Request, Routes

CONNECTION_COUNT_MAX = 16_384    # 10,000 nodes, each with one; a connection holds some 10 KiB
BODIES_BYTES_MAX = 256 * MIB     # that are still coming, of all: a beat has 150 KiB where it has many images
_ENDING_S = 5.0                  # for answers under way when the tracker ends
_log = logging.getLogger("lazyfs.tracker.web")


@dataclass(slots=True)
class Traffic:
    """What went on, for metrics; `statuses`: answers by their code."""

    connections: int = 0
    statuses: dict[int, int] = field(default_factory=dict)


class Server:
    """Serves routes on listeners that are open already. One a process is enough."""

    def __init__(self, routes: Routes, tls: Callable[[], ssl.SSLContext] | None = None) -> None:
        """`tls`: the context for the next connection; None: plain HTTP."""
        self.traffic = Traffic()
        self._routes = routes
        self._tls = tls
        self._guests = Guests(CONNECTION_COUNT_MAX, _log, "a connection")     # who is sent away connects again
        self._accepting = trio.CancelScope()
        self._coming_bytes = 0
        self.ending = False

    async def serve(self, listeners: list[trio.SocketListener]) -> None:
        """Until `end`, or cancelled."""
        async with trio.open_nursery() as nursery:
            with self._accepting:
                async with trio.open_nursery() as accepting:
                    for listener in listeners:
                        accepting.start_soon(self._guests.accept, listener, self._serve_one, nursery)
            nursery.cancel_scope.deadline = trio.current_time() + _ENDING_S

    def end(self) -> None:
        """Accept nobody any more; requests under way are answered, other connections end (nodes ask another one)."""
        self.ending = True
        self._accepting.cancel()
        self._guests.send_home()

    async def _serve_one(self, connection: trio.SocketStream) -> None:
        self.traffic.connections += 1
        try:
            with trio.CancelScope() as scope:
                peer = str(connection.socket.getpeername()[0])
                if self._tls is None:
                    await Conversation(self, connection, Caller(peer), scope).run()
                else:
                    stream = trio.SSLStream(connection, self._tls(), server_side=True, https_compatible=True)
                    await self._secure(stream, peer, scope)
        except (*GONE, trio.TooSlowError, h11.ProtocolError):
            pass   # the client's affair
        except Exception:  # noqa: BLE001 - must not end the tracker
            _log.exception("a connection failed")
        finally:
            self.traffic.connections -= 1

    async def _secure(self, stream: trio.SSLStream[trio.SocketStream], peer: str, scope: trio.CancelScope) -> None:
        with trio.fail_after(REQUEST_S):
            await stream.do_handshake()
        await Conversation(self, stream, Caller(peer, bool(stream.getpeercert())), scope).run()

    async def respond(self, request: Request) -> Answer:
        """For a conversation."""
        answer = await self._routes.answer(request)
        self.count(answer.status)
        return answer

    def count(self, status: int) -> None:
        self.traffic.statuses[status] = self.traffic.statuses.get(status, 0) + 1

    def refusal_of_body(self, request: Request, size: int) -> Answer | None:
        """For a conversation."""
        return self._routes.refusal_of_body(request, size)

    def take(self, size: int) -> bool:
        """Room for a body that is still to come; False: too many come at once. `give` gives it back."""
        if self._coming_bytes + size > BODIES_BYTES_MAX:
            return False
        self._coming_bytes += size
        return True

    def give(self, size: int) -> None:
        self._coming_bytes -= size

    def idle(self, scope: trio.CancelScope, *, idle: bool) -> None:
        """A connection waits for its next request, or has it."""
        if idle and self.ending:
            scope.cancel()
        elif idle:
            self._guests.idle(scope)
        else:
            self._guests.busy(scope)
