"""
Who is connected to one of our servers: accepted for as long as it runs, bounded in number, seen off in good order.

Layer: beside limits; trio only. Who calls: the servers node.web, tracker.server, mirror.web and peers.server; what is
spoken on a connection is theirs. State: the connections. Bound: `most` at once. Where there is no room, who has been
idle for longest (between two requests, or before the first) makes it: silent clients keep nobody out. Where nobody is
idle, the next one waits in the kernel's queue, or is turned away at once if it has somewhere else to go.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    import logging
    from collections.abc import Awaitable, Callable

GONE: Final = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)    # the client is: its own affair
_ACCEPT_PAUSE_S: Final = 0.1     # no descriptor is left: some end by then, and the log is not filled
_LINGER_S: Final = 2.0
_LINGER_BYTES: Final = 4 * 1024 * 1024      # of a body that nobody wants, before its sender is cut off
_PIECE_BYTES: Final = 64 * 1024


class Guests:
    """Of one server, with any number of listeners."""

    def __init__(self, most: int, log: logging.Logger, whose: str, *, turn_away: bool = False) -> None:
        """`whose`: said in the log of a connection that could not be accepted. `turn_away`: see above."""
        self.sent_away = 0
        self._limit = trio.CapacityLimiter(most)
        self._log = log
        self._whose = whose
        self._turn_away = turn_away
        self._idle: dict[trio.CancelScope, None] = {}      # the longest idle first

    @property
    def count(self) -> int:
        """Connected now."""
        return self._limit.borrowed_tokens

    def idle(self, scope: trio.CancelScope) -> None:
        """A connection has nothing to do; its scope is cancelled if somebody else needs its room."""
        self._idle.pop(scope, None)
        self._idle[scope] = None

    def busy(self, scope: trio.CancelScope) -> None:
        """It has, or is over."""
        self._idle.pop(scope, None)

    def send_home(self) -> None:
        """All that are idle."""
        while self._idle:
            self._idle.popitem()[0].cancel()

    async def accept(self, listener: trio.SocketListener, serve: Callable[[trio.SocketStream], Awaitable[None]],
                     nursery: trio.Nursery) -> None:
        """Until cancelled. `serve` runs in the nursery, and what it raises ends that; the stream is closed after it."""
        async with listener:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:   # no descriptor is left, the client is gone
                    self._log.warning("%s was not accepted: %s", self._whose, error)
                    await trio.sleep(_ACCEPT_PAUSE_S)
                    continue
                if not self._limit.available_tokens and not self._make_room() and self._turn_away:
                    await trio.aclose_forcefully(stream)
                    continue
                token = object()
                await self._limit.acquire_on_behalf_of(token)
                nursery.start_soon(self._hold, stream, serve, token)

    def _make_room(self) -> bool:
        scope = next(iter(self._idle), None)
        self.sent_away += scope is not None or self._turn_away
        if scope is not None:
            del self._idle[scope]
            scope.cancel()
        return scope is not None

    async def _hold(self, stream: trio.SocketStream, serve: Callable[[trio.SocketStream], Awaitable[None]],
                    token: object) -> None:
        try:
            await serve(stream)
        finally:
            self._limit.release_on_behalf_of(token)
            await trio.aclose_forcefully(stream)


async def see_off(stream: trio.SocketStream) -> None:
    """
    Read what is still coming, for a moment: an answer gets through before the connection is closed.

    Closed with bytes unread, it would be cut, and the client see a reset and no answer (RFC 9112 §9.6).
    """
    with contextlib.suppress(*GONE), trio.move_on_after(_LINGER_S):
        await stream.send_eof()
        left = _LINGER_BYTES
        while left > 0 and (data := await stream.receive_some(_PIECE_BYTES)):
            left -= len(data)
