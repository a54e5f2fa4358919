"""
The peer server: takes connections, lets in who shows a good token, answers requests one after the other.

Layer: peers. Who calls: the node's worker and the mirror, each with a store of its own. State: the connections
(bounded; the longest idle one makes room for a new one), and which tokens were found good. A connection's requests are
read by one task and answered by another, so that a request can be taken back while it is answered.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import trio

from lazyfs import requestid
from lazyfs.errors import FormatError, LazyfsError, PeerBusyError, PeerError
from lazyfs.guests import GONE, Guests, see_off
from lazyfs.peers import handshake, wire
from lazyfs.peers.answering import Answer, Link
from lazyfs.peers.channel import Channel
from lazyfs.peers.hop import Hop
from lazyfs.peers.securestream import SecureStream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lazyfs.peers.model import Gate, PieceRequest, Store
    from lazyfs.peers.questions import Desk
    from lazyfs.peers.tlsfiles import TlsFiles
    from lazyfs.peers.uploads import Uploads

_HANDSHAKE_S = 5.0               # from accept to the upgrade, TLS included
_IDLE_S = 90.0                   # a connection without a request; the asker closes it earlier (client)
_REST_S = 5.0                    # from a frame's first byte to its last: 64 KiB
_QUEUED_MAX = 4                  # requests of a connection that wait: an asker sends one after the other
_ADMITTED_MAX = 2048             # tokens, of 600 bytes each
_log = logging.getLogger("lazyfs.peers.server")


async def serve(listeners: Sequence[trio.SocketListener], store: Store, gate: Gate, uploads: Uploads, *,
                tls: TlsFiles | None = None, hop: Hop | None = None,
                better: Callable[[PieceRequest], tuple[str, ...]] | None = None, desk: Desk | None = None,
                refer: Callable[[PieceRequest], str] = lambda _request: "") -> None:
    """
    Answer peers until cancelled. The listeners are closed at the end.

    Args:
        listeners: bound and listening.
        store: what is served.
        gate: who may have it.
        uploads: how much of it; its counters say what was done.
        tls: our certificate, and whose are believed; None: plain.
        hop: decides what is compressed; None: one with the usual bounds.
        better: for a request that finds no room here: host:port of members that are known to have it.
        desk: answers small questions; None: there are none.
        refer: Swarm.refer.

    """
    server = _Server(store, gate, uploads, tls=tls, hop=hop or Hop(), better=better, desk=desk,
                     refer=refer)
    async with trio.open_nursery() as nursery:
        for listener in listeners:
            nursery.start_soon(server.guests.accept, listener, server.serve, nursery)


class _Queued(NamedTuple):
    number: int
    request: PieceRequest
    token: str


class _Server:
    def __init__(self, store: Store, gate: Gate, uploads: Uploads, *, tls: TlsFiles | None, hop: Hop,
                 better: Callable[[PieceRequest], tuple[str, ...]] | None, desk: Desk | None,
                 refer: Callable[[PieceRequest], str]) -> None:
        self.store = store
        self.uploads = uploads
        self.tls = tls
        self.hop = hop
        self.better = better
        self._refer = refer
        self.desk = desk
        self.guests = Guests(uploads.limits.connections, _log, "a peer's connection", turn_away=True)   # to others
        self._gate = gate
        self._admitted: OrderedDict[tuple[str, str], tuple[str, float]] = OrderedDict()

    async def serve(self, stream: trio.SocketStream) -> None:
        """One connection, to its end; never raises an Exception."""
        connection = _Connection(self)
        try:
            with connection.scope:
                await connection.run(stream)
        except* (PeerError, FormatError, trio.TooSlowError, *GONE) as group:
            _log.debug("a peer's connection ended: %s", _first_of(group))
        except* LazyfsError as group:
            _log.warning("a peer's connection was given up: %s", _first_of(group))
        except* Exception:  # noqa: BLE001 - must not end the server
            _log.exception("a peer's connection failed")
        finally:
            self.guests.busy(connection.scope)

    def name_another(self, request: PieceRequest) -> None:
        """Raises PeerBusyError: a read is to ask somebody else, at once."""
        address = self._refer(request)
        if address:
            raise PeerBusyError(f"{request.resource.key}: {address} has piece {request.indexes[0]}, or gets it",
                                better=(address,))

    def admit(self, token: str, key: str, where: str) -> str:
        """Who asks: a member's id, or where it comes from. Raises PeerRefusedError."""
        now = trio.current_time()
        known = self._admitted.get((token, key))
        if known is None or known[1] <= now:
            member, seconds = self._gate.admit(token, key)
            known = self._admitted[token, key] = member, now + seconds
            if len(self._admitted) > _ADMITTED_MAX:
                self._admitted.popitem(last=False)
        self._admitted.move_to_end((token, key))
        return known[0] or where


class _Connection:
    def __init__(self, server: _Server) -> None:
        self.scope = trio.CancelScope()
        self._server = server
        self._answer: Answer | None = None
        self._withdrawn: set[int] = set()        # of those that wait
        self._queued: set[int] = set()

    async def run(self, stream: trio.SocketStream) -> None:
        """Raises PeerError, FormatError and others: it is over."""
        self._server.guests.idle(self.scope)
        with trio.move_on_after(_HANDSHAKE_S) as shaking:
            tls = self._server.tls
            channel = Channel(stream if tls is None else SecureStream(
                stream, tls.server(), server_side=True))
            upgraded = await handshake.answer(channel, self._server.desk)
        if shaking.cancelled_caught or not upgraded:
            await see_off(stream)
            return
        send, receive = trio.open_memory_channel[_Queued](_QUEUED_MAX)
        async with trio.open_nursery() as nursery, receive:
            nursery.start_soon(self._read, channel, send, nursery.cancel_scope)
            link = Link(channel)
            async for queued in receive:
                self._server.guests.busy(self.scope)
                await self._take(link, queued)
                if not link.whole:
                    break
                self._server.guests.idle(self.scope)
            nursery.cancel_scope.cancel()

    async def _read(self, channel: Channel, queue: trio.MemorySendChannel[_Queued], whole: trio.CancelScope) -> None:
        """Frames of the asker, until it ends; then nothing more is sent either."""
        room = memoryview(bytearray(wire.CONTROL_BYTES_MAX))
        head = room[:wire.HEAD.size]
        while await self._first(channel, head):
            with trio.fail_after(_REST_S):
                await channel.fill(head[1:])
                kind, number, length, _ = wire.parse_head(head)
                if kind not in {wire.Frame.REQUEST, wire.Frame.CANCEL}:
                    raise FormatError(f"{channel.peer}: a frame {kind.name} from who asks")
                await channel.fill(room[:length])
            if kind is wire.Frame.REQUEST:
                if len(self._queued) >= _QUEUED_MAX:
                    raise FormatError(f"{channel.peer}: more than {_QUEUED_MAX} requests at once on a connection")
                self._queued.add(number)
                queue.send_nowait(_Queued(number, *wire.parse_request(room[:length])))
            elif self._answer is not None and self._answer.number == number:
                self._answer.cancel()
            elif number in self._queued:
                self._withdrawn.add(number)
        whole.cancel()

    async def _first(self, channel: Channel, head: memoryview) -> bool:
        """The first byte of a frame; False: the asker has ended, or has wanted nothing for a while."""
        while True:
            with trio.move_on_after(_IDLE_S) as waiting:
                return bool(await channel.receive(head[:1]))
            if waiting.cancelled_caught and self._answer is None:
                return False

    async def _take(self, link: Link, queued: _Queued) -> None:
        """Answer a request, or say why not."""
        server, (number, request, token) = self._server, queued
        self._queued.discard(number)
        if number in self._withdrawn:
            self._withdrawn.discard(number)
            await link.frame(wire.head(wire.Frame.END, number, 0))
            return
        size = sum(map(request.resource.piece_bytes, request.indexes))
        with requestid.during(request.request):
            try:
                member = server.admit(token, request.resource.key, link.channel.peer)
                if request.asker and member in {request.asker, link.channel.peer}:    # a token's, or there are none
                    server.name_another(request)
                with server.uploads.request(member, request.priority, size, request.seconds):
                    self._answer = Answer(link, number, request, store=server.store, uploads=server.uploads,
                                          hop=server.hop)
                    try:
                        await self._answer.run()
                    finally:
                        self._answer = None
            except PeerError as error:
                if not link.whole:
                    raise
                if isinstance(error, PeerBusyError) and not error.better and server.better is not None:
                    error.better = server.better(request)
                await link.frame(wire.trouble_frame(number, wire.trouble_of(error)))


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
