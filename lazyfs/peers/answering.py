"""
One request of a peer, answered: its pieces are had from the store, several at once, and sent as they come.

Layer: peers. Who calls: peers.server, in the connection's task; `cancel` comes from the task that reads. A frame is
sent whole or the connection is over (`whole`): only the waiting between frames is given up. In hand, had or being had,
is a bounded number of pieces, and of those that lie in memory a bounded number of bytes a node.
"""

from __future__ import annotations

import heapq
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from lazyfs import limits
from lazyfs.errors import BugError, LazyfsError, PeerBusyError, PeerError
from lazyfs.peers import wire
from lazyfs.peers.channel import page_in
from lazyfs.peers.model import FileRange, Priority, beat_s

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazyfs.peers.channel import Channel
    from lazyfs.peers.hop import Hop
    from lazyfs.peers.model import PieceRequest, Store
    from lazyfs.peers.uploads import Uploads

    Data = bytes | memoryview | FileRange

_IN_HAND = 64                    # pieces of a request: what keeps a tree's pipes full (docs/peers.md)
_FRAME_S = 60.0                  # a piece of 4 MiB at 0.5 Mbit/s; who takes longer does not read
_RATE_BYTES_MIN = 64 * limits.KIB     # a smaller piece says nothing about the connection
_NEW_WEIGHT = 0.25               # of the newest piece in the connection's rate
_log = logging.getLogger("lazyfs.peers.answering")


@dataclass(slots=True)
class Link:
    """
    A connection as its answers see it.

    :rate: bytes/s that it took of late; 0.0: nothing was sent yet.
    :whole: no frame is half sent.
    :told: what we can give, as the other side knows it (wire.head).
    """

    channel: Channel
    rate: float = 0.0
    whole: bool = True
    told: int = 0

    async def frame(self, head: bytes, data: Data = b"") -> None:
        """Raises PeerError, CacheError: as Channel.send_with; or it was not taken in time."""
        self.whole = False
        with trio.move_on_after(_FRAME_S) as scope:
            await self.channel.send_with(head, data)
        if scope.cancelled_caught:
            raise PeerError(f"{self.channel.peer}: does not read: a frame was not taken in {_FRAME_S:g} s")
        self.whole = True


class Answer:
    """`run` once. The link is of no use afterwards unless it is `whole`."""

    def __init__(self, link: Link, number: int, request: PieceRequest, *, store: Store, uploads: Uploads,
                 hop: Hop) -> None:
        self.number = number
        self.sent: list[int] = []        # indexes, in the order of sending
        self._link = link
        self._request = request
        self._store = store
        self._uploads = uploads
        self._hop = hop
        self._deadline = trio.current_time() + request.seconds
        self._todo: Iterator[int] = iter(request.indexes)
        self._left = len(request.indexes)
        self._ready: list[tuple[int, Data | wire.Trouble]] = []    # a heap: the first in order goes first
        self._arrived = trio.Event()
        self._room = trio.Semaphore(_IN_HAND)
        self._reading_s: dict[int, float] = {}      # that the disk took
        self._waiting: trio.CancelScope | None = None
        self._cancelled = False

    def cancel(self) -> None:
        """The asker does not want the rest: nothing more is begun."""
        self._cancelled = True
        self._link.channel.keep_unsent(urgent=False)    # who has left does not read: the rest of the frame finds room
        if self._waiting is not None:
            self._waiting.cancel()

    async def run(self) -> None:
        """
        Send what can be had, and the end.

        Raises PeerError, CacheError: the connection is over.
        """
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(min(_IN_HAND, self._left)):
                    nursery.start_soon(self._have)
                if self._link.told != self._uploads.giving.step:    # who can ask others does so at once
                    await self._beat()
                while self._left and not self._cancelled and await self._send_next():
                    pass
                nursery.cancel_scope.cancel()
        finally:
            for _, data in self._ready:
                self._let_go(data)
            self._ready.clear()
        if self._left and not self._cancelled:
            late = wire.Trouble(wire.Code.FAILED, f"{self._left} pieces could not be had in the time that was given")
            await self._link.frame(wire.trouble_frame(self.number, late))
        else:
            await self._link.frame(wire.head(wire.Frame.END, self.number, 0))

    async def _have(self) -> None:
        """Have pieces, one after the other; several of these run side by side."""
        request = self._request
        for index in self._todo:
            await self._room.acquire()
            try:
                data: Data | wire.Trouble = await self._read(index, await self._store.piece(request, index))
            except LazyfsError as error:
                data = wire.trouble_of(error, index)
            except Exception:  # noqa: BLE001 - of this piece only
                _log.exception("%s: piece %d could not be served", request.resource.key, index)
                data = wire.trouble_of(BugError("internal error, see this node's log"), index)
            heapq.heappush(self._ready, (index, self._checked(index, data)))
            self._arrived.set()

    async def _read(self, index: int, data: Data) -> Data:
        """The same, and what lies in a file is in memory: before its turn, so that beats are sent meanwhile."""
        self._uploads.giving.begin(self._link.channel.peer)
        if isinstance(data, FileRange):
            began = trio.current_time()
            try:
                await page_in(data, self._uploads.disk)
            except BaseException:
                self._let_go(data)
                raise
            self._reading_s[index] = trio.current_time() - began
        return data

    def _checked(self, index: int, data: Data | wire.Trouble) -> Data | wire.Trouble:
        """The store's piece if it is of the right size and, being in memory, there is room for it."""
        if isinstance(data, wire.Trouble):
            return data
        size = data.size if isinstance(data, FileRange) else len(data)
        if size != self._request.resource.piece_bytes(index):
            if isinstance(data, FileRange):
                data.release()
            self._uploads.giving.end(self._link.channel.peer)
            _log.error("%s: piece %d of %d bytes", self._request.resource.key, index, size)
            return wire.trouble_of(BugError("internal error, see this node's log"), index)
        if not isinstance(data, FileRange) and not self._uploads.hold(size):
            self._uploads.giving.end(self._link.channel.peer)
            return wire.trouble_of(PeerBusyError("busy: too much is waiting in memory", retry_after_s=1.0), index)
        return data

    def _let_go(self, data: Data | wire.Trouble) -> None:
        if isinstance(data, wire.Trouble):
            return
        self._uploads.giving.end(self._link.channel.peer)
        if isinstance(data, FileRange):
            data.release()
        else:
            self._uploads.drop(len(data))

    async def _send_next(self) -> bool:
        """Send the next piece there is. False: nothing came, and there is no time left, or nobody wants it."""
        with trio.CancelScope(deadline=self._deadline) as self._waiting:
            while not self._ready:
                self._arrived = trio.Event()
                with trio.move_on_after(beat_s(self._request.priority)) as silence:
                    await self._arrived.wait()
                if silence.cancelled_caught:
                    await self._beat()
        self._waiting = None
        if not self._ready or self._cancelled:
            return False
        index, data = heapq.heappop(self._ready)
        try:
            if isinstance(data, wire.Trouble):
                await self._link.frame(wire.trouble_frame(self.number, data))
            elif not await self._send_piece(index, data):
                return False
        finally:
            self._let_go(data)
        self._left -= 1
        self._room.release()
        return True

    async def _send_piece(self, index: int, data: Data) -> bool:
        """False: its turn did not come in time, or it is not wanted any more."""
        request, uploads = self._request, self._uploads
        size = request.resource.piece_bytes(index)
        with trio.CancelScope(deadline=self._deadline) as self._waiting:
            turn = await uploads.begin(request.priority, size, self._beat)
        if self._waiting.cancelled_caught:
            self._waiting = None
            return False
        self._waiting = None
        sent = 0
        try:
            encoding, body, stored = await self._hop.encode(request.resource.key, data, size,
                                                             uploads.rate_of(self._link.rate))
            began, waiting = trio.current_time(), self._link.channel.unsent()
            self._link.told = uploads.giving.step
            head = wire.piece_head(self.number, index, size, encoding, stored, rate=self._link.told)
            self._link.channel.keep_unsent(urgent=request.priority is Priority.FOREGROUND)
            await self._link.frame(head, body)
            sent = stored
            took_s = trio.current_time() - began
            left_us = stored + waiting - self._link.channel.unsent()
            uploads.giving.gave(left_us, took_s + self._reading_s.pop(index, 0.0))
        finally:
            uploads.end(turn, size, sent)
        if stored >= _RATE_BYTES_MIN and took_s > 0:
            rate = stored / took_s
            self._link.rate += _NEW_WEIGHT * (rate - self._link.rate) if self._link.rate else rate
        self.sent.append(index)
        return True

    async def _beat(self) -> None:
        self._link.told = self._uploads.giving.step
        await self._link.frame(wire.head(wire.Frame.ALIVE, self.number, 0, self._link.told))
