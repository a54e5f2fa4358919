"""
Asking peers: the Exchange of peers.model over TCP, with connections that are kept.

Layer: peers. Who calls: peers.swarm, through the contract. State: idle connections, a few of each member. A connection
has one request at a time; several requests to a member at once are several connections. A request that is left early is
taken back with a frame, and what was on its way is passed over when the connection is used next; where a piece was
being read, or nothing was heard yet, it is closed instead.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

import lz4.block
import trio

from lazyfs.errors import FormatError, PeerBusyError, PeerError, PeerLacksError
from lazyfs.peers import handshake, wire
from lazyfs.peers.model import SILENCE_S, Piece
from lazyfs.peers.rates import STEP_MAX
from lazyfs.peers.reaching import reach

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from lazyfs.peers.channel import Channel
    from lazyfs.peers.model import Gate, Member, PieceRequest, Resource
    from lazyfs.peers.tlsfiles import TlsFiles

_CONNECT_S = 1.0                 # name, TCP, TLS and upgrade: a peer is near, or not worth the wait
_IDLE_S = 30.0                   # then an idle connection is closed; the server's bound is larger
_LOOK_S = 5.0
_LOOKS = 10                      # in the time of a silence: what came, but was too little to wake up for, breaks it
_TAKE_BACK_S = 0.05              # 12 bytes fit, or the connection is not worth keeping
_IDLE_PER_MEMBER_MAX = 8
_IDLE_MAX = 512                  # descriptors: the longest idle ones are closed
_HEARD_MAX = 4096                # addresses; then those that were heard of before _IDLE_S are forgotten
_NUMBER_MAX = (1 << 32) - 1
_log = logging.getLogger("lazyfs.peers.client")


class PeerClient:
    """
    An Exchange. `run` must run beside it: it closes what is idle, and everything at its end.

    :connections: that were made; requests: that were sent. For who describes the node.
    :told_rate: is called with a member's id and a byte, when it says another rate than before (Swarm.told_rate).
    """

    def __init__(self, gate: Gate, *, tls: TlsFiles | None = None, connect_s: float = _CONNECT_S) -> None:
        """`tls`: our certificate, and whose are believed; None: plain."""
        self.connections = 0
        self.requests = 0
        self.told_rate: Callable[[str, int], None] = lambda _member, _step: None
        self._gate = gate
        self._tls = tls
        self._connect_s = connect_s
        self._idle: dict[_Connection, None] = {}     # longest first
        self._heard: dict[str, float] = {}           # by address
        self._closed = False

    def heard_at(self, member: Member) -> float:
        """As Exchange.heard_at."""
        return self._heard.get(member.address, 0.0)

    def heard(self, address: str) -> None:
        """Of who is there, a byte has come."""
        self._heard[address] = now = trio.current_time()
        if len(self._heard) > _HEARD_MAX:
            self._heard = {one: at for one, at in self._heard.items() if now - at < _IDLE_S}

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                await trio.sleep(_LOOK_S)
                now = trio.current_time()
                for connection in [one for one in self._idle if now - one.idle_since >= _IDLE_S]:
                    await self._drop(connection)
        finally:
            self._closed = True
            with trio.CancelScope(shield=True):
                for connection in list(self._idle):
                    await self._drop(connection)

    @contextlib.asynccontextmanager
    async def ask(self, member: Member, request: PieceRequest) -> AsyncIterator[AsyncIterator[Piece]]:
        """As Exchange.ask."""
        token = await self._gate.token(request.resource.key, member.id)
        asking = _Asking(self, member, request, token)
        pieces = asking.pieces()
        try:
            async with contextlib.aclosing(pieces):
                yield pieces
        finally:
            with trio.CancelScope(shield=True):
                await asking.leave()

    async def connection(self, member: Member, *, fresh: bool) -> _Connection:
        """An idle one of the member, or (surely, if `fresh`) a new one. Raises PeerError."""
        if not fresh:
            for connection in reversed(self._idle):      # the one used last: the others may become idle enough to go
                if connection.address == member.address:
                    del self._idle[connection]
                    return connection
        with trio.move_on_after(self._connect_s):
            return await self._connect(member)
        raise PeerError(f"{member.id} at {member.address}: no connection within {self._connect_s:g} s",
                        hint="is it running, and may this node reach its port? lazyfs doctor looks")

    async def _connect(self, member: Member) -> _Connection:
        channel = await reach(member, self._tls)
        self.heard(member.address)
        try:
            await handshake.ask(channel, member.address)
        except BaseException:
            await channel.close()
            raise
        self.connections += 1
        self.heard(member.address)
        return _Connection(member.address, channel, self.heard)

    async def keep(self, connection: _Connection) -> None:
        """It is idle now."""
        same = sum(one.address == connection.address for one in self._idle)
        if self._closed or same >= _IDLE_PER_MEMBER_MAX:
            await connection.channel.close()
            return
        connection.idle_since = trio.current_time()
        self._idle[connection] = None
        if len(self._idle) > _IDLE_MAX:
            await self._drop(next(iter(self._idle)))

    async def forget(self, address: str) -> None:
        """Close the idle connections of a member: one of them was found dead."""
        for connection in [one for one in self._idle if one.address == address]:
            await self._drop(connection)

    async def _drop(self, connection: _Connection) -> None:
        self._idle.pop(connection, None)
        await connection.channel.close()


class _Connection:
    """:left: bytes of the frame being read that have not come yet; None: its header has not."""

    __slots__ = ("_have", "_head", "_heard", "address", "channel", "idle_since", "left", "number", "rate", "silent",
                 "used")

    def __init__(self, address: str, channel: Channel, heard: Callable[[str], None]) -> None:
        self.address = address
        self._heard = heard
        self.channel = channel
        self.idle_since = 0.0
        self.number = 0              # of the last request
        self.used = False            # an answer has come over it
        self.rate = 0                # as its frames say
        self.silent = False          # for too long
        self.left: int | None = None
        self._head = bytearray(wire.HEAD.size)
        self._have = 0               # bytes of the header

    async def next_head(self) -> wire.Head:
        """The next frame's header. A cancelled call loses nothing. Raises PeerError, FormatError."""
        assert not self.left, "the last frame was read or passed over"
        while self._have < len(self._head):
            self._have += await self._some(memoryview(self._head)[self._have:])
        self._have = 0
        head = wire.parse_head(self._head)
        self.left = head.length
        return head

    async def fill(self, view: memoryview) -> None:
        """Bytes of the frame; likewise. Raises PeerError."""
        assert self.left is not None
        done = 0
        while done < len(view):
            count = await self._some(view[done:], all_comes=True)
            done += count
            self.left -= count

    async def pass_over(self) -> None:
        """The rest of the frame. Raises PeerError."""
        room = memoryview(bytearray(min(self.left or 0, wire.CONTROL_BYTES_MAX)))
        while self.left:
            await self.fill(room[:min(self.left, len(room))])

    async def _some(self, view: memoryview, *, all_comes: bool = False) -> int:
        for _ in range(_LOOKS):
            with trio.move_on_after(SILENCE_S / _LOOKS) as look:
                count = await self.channel.receive(view, all_comes=all_comes)
            if look.cancelled_caught:
                count = self.channel.receive_now(view)
                if not count:
                    continue
            if not count:
                raise PeerError(f"{self.address}: connection ended within an answer")
            self._heard(self.address)
            return count
        self.silent = True
        raise PeerError(f"{self.address}: silent for {SILENCE_S:g} s")


class _Asking:
    """One request, from its connection to its last frame."""

    def __init__(self, client: PeerClient, member: Member, request: PieceRequest, token: str) -> None:
        self._client = client
        self._member = member
        self._request = request
        self._token = token
        self._wanted = set(request.indexes)
        self._connection: _Connection | None = None
        self._over = False           # its last frame was read
        self._heard = False
        self._troubles: list[wire.Trouble] = []

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Its pieces. Raises as Exchange.ask."""
        await self._begin(fresh=False)
        while not self._over:
            try:
                piece = await self._next()
            except FormatError as error:
                raise PeerError(f"{self._member.id} at {self._member.address}: {error}") from error
            except PeerError:
                tried = self._connection
                if self._heard or tried is None or tried.silent or not tried.used:
                    raise
                await self._client.forget(self._member.address)     # it had been closed while it was idle
                await self._begin(fresh=True)
                continue
            if piece is not None:
                yield piece
        if self._wanted:
            raise self._failure()

    async def leave(self) -> None:
        """Give the connection back, take the request back if it is not over; or close it."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if not self._over and not await self._take_back(connection):
            await connection.channel.close()
            return
        await self._client.keep(connection)

    async def _take_back(self, connection: _Connection) -> bool:
        """Whether the connection can be used again: not if it is in doubt, or a piece is on its way."""
        if connection.left or not self._heard:
            return False
        with trio.move_on_after(_TAKE_BACK_S), contextlib.suppress(PeerError):
            await connection.channel.send(wire.head(wire.Frame.CANCEL, connection.number, 0))
            return True
        return False

    async def _begin(self, *, fresh: bool) -> None:
        if self._connection is not None:
            await self._connection.channel.close()
            self._connection = None
        connection = self._connection = await self._client.connection(self._member, fresh=fresh)
        connection.number = connection.number % _NUMBER_MAX + 1
        frame = wire.request_frame(connection.number, self._request, self._token)
        self._client.requests += 1
        with trio.move_on_after(SILENCE_S) as slow, contextlib.suppress(PeerError):
            await connection.channel.send(frame)      # what broke, reading tells
        if slow.cancelled_caught:
            raise PeerError(f"{self._member.id} at {self._member.address}: does not read")

    async def _next(self) -> Piece | None:
        """Read a frame; a piece if it is one that is wanted. Raises PeerError, FormatError."""
        connection = self._connection
        assert connection is not None
        head = await connection.next_head()
        if head.number != connection.number:       # of a request that was taken back
            await connection.pass_over()
            return None
        self._heard = connection.used = True
        if head.rate != connection.rate and head.type in {wire.Frame.PIECE, wire.Frame.ALIVE}:
            connection.rate = head.rate
            self._client.told_rate(self._member.id, min(head.rate, STEP_MAX))
        if head.type is wire.Frame.PIECE:
            return await self._piece(connection, head)
        if head.type is wire.Frame.END:
            self._over = True
        elif head.type is wire.Frame.TROUBLE:
            body = bytearray(head.length)
            await connection.fill(memoryview(body))
            trouble = wire.parse_trouble(body)
            if trouble.piece is None:
                self._over = True
            elif trouble.piece not in self._wanted:
                raise FormatError(f"peer: an error of piece {trouble.piece}, which was not asked for")
            if len(self._troubles) <= wire.PIECE_COUNT_MAX:
                self._troubles.append(trouble)
        elif head.type is not wire.Frame.ALIVE:
            raise FormatError(f"peer: a frame {head.type.name} from who was asked")
        return None

    async def _piece(self, connection: _Connection, head: wire.Head) -> Piece:
        resource: Resource = self._request.resource
        if head.length < wire.PIECE.size:
            raise FormatError(f"peer: a piece's frame of {head.length} bytes")
        start = bytearray(wire.PIECE.size)
        await connection.fill(memoryview(start))
        index, size, encoding, stored = wire.parse_piece(start, head.length, resource)
        if index not in self._wanted:
            raise FormatError(f"peer: piece {index}, which was not asked for")
        data = bytearray(stored)
        await connection.fill(memoryview(data))
        self._wanted.discard(index)
        if encoding is wire.Encoding.RAW:
            return Piece(index, data)
        try:
            plain = lz4.block.decompress(data, uncompressed_size=size)
        except (lz4.block.LZ4BlockError, ValueError, MemoryError, OverflowError) as error:
            raise FormatError(f"peer: piece {index} cannot be decompressed: {error}") from error
        if len(plain) != size:
            raise FormatError(f"peer: piece {index} has {len(plain)} bytes instead of {size}")
        return Piece(index, plain)

    def _failure(self) -> PeerError:
        """What the peer's troubles are, taken together: that of the whole request, else the most hopeful one."""
        who = f"{self._member.id} at {self._member.address}"
        if not self._troubles:
            return PeerError(f"{who}: left out {len(self._wanted)} of {len(self._request.indexes)} pieces")
        whole = [wire.error_of(trouble, who) for trouble in self._troubles if trouble.piece is None]
        errors = whole or [wire.error_of(trouble, who) for trouble in self._troubles]
        for kind in (PeerBusyError, PeerError, PeerLacksError):
            for error in errors:
                if type(error) is kind:
                    return error
        return errors[0]
