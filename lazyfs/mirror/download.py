"""
One blob or file on its way to this node, for any number of readers at once: each piece comes once, from peers or from
the origin, in the order in which it is read.

Layer: mirror. Who calls: mirror.pieces (one Download a resource). State, on the loop: which pieces are there (the
PieceFile's), which are flying, who reads where. Threads only write and hash. Invariants: a piece is flying at most
once; it is present when its bytes are in the file; the name in `whole/` means that the digest was right. Peers are not
believed: the whole digest is checked before anything is called complete, and where it is wrong each piece that a
peer gave is compared with the origin's.

Why pieces have no digests of their own between nodes: in a simultaneous start nobody has them before the end, and a
list from a peer is worth no more than its pieces. Who knows them (a seed record) gives them as `sums`.
"""

from __future__ import annotations

import hashlib
import logging
import math
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import trio

from lazyfs.errors import BugError, DeadlineError, IntegrityError, LazyfsError, PeerLacksError
from lazyfs.image.digest import CHUNK_DIGEST_BYTES, Digest, chunk_digest
from lazyfs.limits import IO_TIMEOUT_S, KIB, MIB
from lazyfs.mirror.fromorigin import OriginLimits, Run, fetch_run, runs_of
from lazyfs.peers.model import Priority

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence

    from lazyfs.mirror.fromorigin import Origin
    from lazyfs.mirror.piecedir import PieceDirectory
    from lazyfs.mirror.piecefile import PieceFile
    from lazyfs.peers.model import Deliver, Member, Piece, Resource
    from lazyfs.peers.model import Origin as AskOrigin

SPAN_BYTES: Final = 4 * MIB              # a reader gets no more at once: others have their turn
_STRIDE_BYTES: Final = 4 * MIB           # asked for together: one request to the origin where this node is a root
_STRIDE_COUNT: Final = 8                 # on their way at once: 32 MiB fill 2.5 Gbit/s at 100 ms
_SAVE_BYTES: Final = 64 * MIB            # a killed mirror fetches no more than that again
_HASH_BYTES: Final = 512 * KIB
_PEERS_SHARE: Final = 0.5                # of a deadline; the rest is the origin's
PIECE_DEADLINE_S: Final = 4 * IO_TIMEOUT_S   # peers, then the origin with a connection that went dead once
_log = logging.getLogger("lazyfs.mirror")


class Fetching(Protocol):
    """What a download needs of peers.swarm.Swarm."""

    async def fetch(self, resource: Resource, indexes: Sequence[int], *, priority: Priority, deadline: float, hops: int,
                    deliver: Deliver, origin: AskOrigin | None = None,
                    request: str = "") -> list[int]:
        """Which of the pieces the origin must give, if `origin` was not told of them; the others were delivered."""
        ...


@dataclass(frozen=True, slots=True)
class Threads:
    """How many may wait for servers, and for the disk, of all downloads together."""

    origin: OriginLimits = field(default_factory=OriginLimits)
    disk: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(8))


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes that lie in a file; valid while the reader's block is open."""

    file: int
    offset: int
    size: int


@dataclass(slots=True)
class Counted:
    """Bytes by where they came from, of one download or of all; `wrong`: pieces that were not the origin's."""

    peers: int = 0
    origin: int = 0
    wrong: int = 0


@dataclass(eq=False, slots=True)
class _Reader:
    """Who reads: pieces [next, end). [first, given) it has; `is_misled`: one of these was wrong."""

    first: int
    next: int
    given: int
    end: int
    is_misled: bool = False


class Download:
    """
    See the module. `run` fetches, until cancelled or complete; `spans` reads.

    Attributes:
        error: of the last attempt, while nobody has asked again.
        began: on trio's clock.
        shared: peers may have it.
        origin_pieces: that the origin gave.
        is_doubted: it was whole on the disk, which may have rotted: nobody reads it to its end before `decide`.

    """

    def __init__(self, file: PieceFile, directory: PieceDirectory, threads: Threads, counted: Counted, *,
                 sums: bytes = b"", verify: bool = True,
                 blame: Callable[[str, Download], None] | None = None,
                 recall: Callable[[Resource], Awaitable[None]] | None = None) -> None:
        """
        `counted`: is added to. `sums`: BLAKE3 of all pieces, where somebody vouches for them. `verify`: the resource's
        digest is that of its bytes (else: of what names it). `blame`: is told who gave wrong bytes (a member's id).
        `recall`: is told that readers may have been given wrong bytes, before any gets more.
        """
        if sums and len(sums) != CHUNK_DIGEST_BYTES * file.resource.piece_count:
            raise BugError(f"{file.resource.key}: {len(sums)} bytes of digests")
        self.file, self.resource = file, file.resource
        self.origin: Origin | None = None
        self.error: LazyfsError | None = None
        self.began = trio.current_time()
        self.counted = counted
        self.shared = False
        self.origin_pieces = 0
        self.is_doubted = False
        self._rotten: LazyfsError | None = None
        self._directory, self._threads = directory, threads
        self._swarm: Fetching | None = None
        self._sums, self._verify, self._blame, self._recall = sums, verify, blame, recall
        self._flying: set[int] = set()
        self._at_origin: set[int] = set()         # of these
        self._given_by: dict[int, str] = {}       # by whom, of pieces that peers gave since the start
        self._readers: set[_Reader] = set()
        self._wants_all = False
        self._changed = trio.Event()
        self._unsaved_bytes = 0
        self._epoch = 0    # how often somebody asked: an earlier origin's failure is not the later one's

    # --- reading ---

    def ask(self, origin: Origin, swarm: Fetching | None, *, shared: bool) -> None:
        """From now on ask these. Peers need an origin that can begin anywhere: what they lack comes in pieces."""
        self.shared = shared and origin.ranges
        self.origin, self._swarm = origin, swarm if self.shared else None
        self._epoch += 1

    def want_all(self) -> None:
        """Fetch all of it, whether anybody reads it or not."""
        self._wants_all, self.error = True, None
        self._notify()

    async def spans(self, start: int, end: int) -> AsyncGenerator[Span, None]:
        """
        Bytes [start, end), in order, as soon as they are there. Use with contextlib.aclosing.

        Whoever reads all of it gets the last piece only when the whole digest was right, and none of what it got
        before had to be replaced: so a wrong blob is never read to its end.

        Raises:
            LazyfsError: they cannot be had. IntegrityError: some that came out of here were wrong; ask again.

        """
        size, count = self.resource.piece_size, self.resource.piece_count
        held_back = int(start == 0 and end == self.resource.size)
        reader = _Reader(start // size, 0, 0, -(-end // size))
        self._readers.add(reader)
        self.error = None
        try:
            while start < end:
                reader.next = index = start // size
                self._notify()
                upto = count if self._is_sure() else count - held_back
                await self.wait(index, whole=index >= upto)
                if reader.is_misled:
                    raise IntegrityError(f"{self.resource.key}: a peer gave wrong bytes, and they were read",
                                         hint="ask again: they have been replaced")
                stop = index + 1
                while stop < min(reader.end, upto) and self.file.present[stop] and (stop - index) * size < SPAN_BYTES:
                    stop += 1
                reader.given, until = stop, min(end, stop * size)
                yield Span(self.file.file, start, until - start)
                start = until
        finally:
            self._readers.discard(reader)

    async def wait(self, index: int, *, whole: bool = False) -> None:
        """Until a piece is there, or all of it is checked. Raises LazyfsError: it cannot be had."""
        while not (self._is_sure() if whole else self.file.present[index]):
            if self._rotten is not None:
                raise self._rotten
            if self.error is not None and index not in self._flying:
                raise self.error
            await self._changed.wait()

    def _is_sure(self) -> bool:
        return self.file.is_whole and not self.is_doubted

    async def piece(self, index: int, *, priority: Priority, deadline: float, hops: int, request: str) -> None:
        """
        A piece that a peer asks for: there when this returns.

        Raises:
            PeerLacksError: it is not here, and this node has no origin to ask. LazyfsError: it cannot be had in time.

        """
        if self.file.present[index]:
            return
        if self.origin is None:
            raise PeerLacksError(f"{self.resource.key}: piece {index} is not here")
        with trio.move_on_at(deadline) as scope:
            if index not in self._flying:
                self._flying.add(index)
                await self._fetch([index], priority, deadline, hops, request)
            while index in self._flying:
                await self._changed.wait()
            await self.wait(index)
        if scope.cancelled_caught and not self.file.present[index]:
            raise DeadlineError(f"{self.resource.key}: piece {index} did not come in time")

    def is_at_origin(self, index: int) -> bool:
        """Whether a piece is on its way, and not from a peer: nobody else is waited for."""
        return index in self._at_origin

    # --- fetching ---

    async def run(self) -> None:
        """Fetch what readers want, check it when it is all there. Ends when it is whole; else cancel it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._check_all, nursery.cancel_scope)
            while True:
                changed = self._changed
                while self.error is None and (stride := self._next_stride()):
                    self._flying.update(stride)
                    deadline = trio.current_time() + PIECE_DEADLINE_S
                    priority = Priority.FOREGROUND if self._readers else Priority.PREFETCH
                    nursery.start_soon(self._fly, stride, priority, deadline)
                await changed.wait()

    def _next_stride(self) -> list[int]:
        """Neighbours to ask for now; empty: enough is on its way."""
        size, count = self.resource.piece_size, self.resource.piece_count
        wide = max(1, _STRIDE_BYTES // size) if self.origin is None or self.origin.ranges else count
        if len(self._flying) > (_STRIDE_COUNT - 1) * wide or self.origin is None:
            return []
        ranges = sorted((reader.next, reader.end) for reader in self._readers)
        if self._wants_all:
            ranges.append((0, count))
        for begin, end in ranges:
            index = begin
            while (index := self.file.present.find(0, index, end)) >= 0 and index in self._flying:
                index += 1
            if index >= 0:
                stop = min(end, index - index % wide + wide)
                return [one for one in range(index, stop) if not self.file.present[one] and one not in self._flying]
        return []

    async def _fly(self, indexes: list[int], priority: Priority, deadline: float) -> None:
        """For this node's own readers: what failed is in `error`."""
        epoch = self._epoch
        try:
            await self._fetch(indexes, priority, deadline, 0, "")
        except LazyfsError as error:
            self.error = error if epoch == self._epoch else None
            self._notify()

    async def _fetch(self, indexes: list[int], priority: Priority, deadline: float, hops: int, request: str) -> None:
        """From peers, then the origin. The indexes are flying already."""
        failures: list[LazyfsError] = []

        async def ask_origin(left: list[int]) -> None:
            self._at_origin.update(left)
            try:
                await self._from_origin([index for index in left if not self.file.present[index]], deadline)
            except LazyfsError as error:
                failures.append(error)

        try:
            async with trio.open_nursery() as nursery:
                left = indexes
                if self._swarm is not None:
                    until = trio.current_time() + (deadline - trio.current_time()) * _PEERS_SHARE
                    try:
                        left = await self._swarm.fetch(
                            self.resource, indexes, priority=priority, deadline=until, hops=hops, request=request,
                            deliver=self._deliver, origin=lambda indexes: nursery.start_soon(ask_origin, indexes))
                    except LazyfsError as error:
                        failures.append(error)
                        left = []
                nursery.start_soon(ask_origin, left)
            if failures:
                raise failures[0]
        finally:
            self._flying.difference_update(indexes)
            self._at_origin.difference_update(indexes)
            self._notify()

    async def _deliver(self, piece: Piece, member: Member) -> bool:
        """peers.model.Deliver."""
        index, data = piece.index, piece.data
        if len(data) != self.resource.piece_bytes(index):
            return False
        if self.file.present[index]:
            return True

        def keep() -> bool:
            at = index * CHUNK_DIGEST_BYTES
            if self._sums and chunk_digest(data) != self._sums[at:at + CHUNK_DIGEST_BYTES]:
                return False
            self._write(index, data)
            return True

        if not await trio.to_thread.run_sync(keep, limiter=self._threads.disk):
            return False
        self._given_by[index] = member.id
        self.counted.peers += len(data)
        await self._landed(index)
        return True

    async def _from_origin(self, indexes: Iterable[int], deadline: float) -> None:
        assert self.origin is not None
        for run in runs_of(indexes):
            async with aclosing(fetch_run(self.origin, self.resource, run, deadline, self._threads.origin)) as pieces:
                async for index, data in pieces:
                    self.counted.origin += len(data)
                    if not self.file.present[index]:
                        await trio.to_thread.run_sync(self._write, index, data, limiter=self._threads.disk)
                        self._given_by.pop(index, None)
                        self.origin_pieces += 1
                        await self._landed(index)

    def _write(self, index: int, data: bytes | bytearray | memoryview) -> None:
        try:
            self.file.write(index, data)
        except OSError as error:
            self._directory.failed(error)

    async def _landed(self, index: int) -> None:
        self.file.note(index)
        self._flying.discard(index)
        self._unsaved_bytes += self.resource.piece_bytes(index)
        self._notify()
        if self._unsaved_bytes >= _SAVE_BYTES:
            self._unsaved_bytes = 0
            await trio.to_thread.run_sync(self._directory.save, self.file, limiter=self._threads.disk)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # --- checking ---

    async def _check_all(self, scope: trio.CancelScope) -> None:
        """Follows what is there with the digest; at the end it is whole, or each suspicious piece is replaced."""
        try:
            if self._verify and await self.digest() != self.resource.digest:
                await self._replace_lies()
                is_right = await self.digest() == self.resource.digest
                if self._recall is not None:
                    await self._recall(self.resource)
                if not is_right:
                    await trio.to_thread.run_sync(self._directory.drop, self.resource)
                    self.file.present[:] = bytes(self.resource.piece_count)
                    raise IntegrityError(f"{self.resource.key}: what the origin gives has another digest",
                                         hint="the registry's copy is damaged, or it is not what was named")
            for index in range(self.resource.piece_count):
                await self._until_present(index)
            await trio.to_thread.run_sync(self._directory.complete, self.file, limiter=self._threads.disk)
        except LazyfsError as error:
            self.error = error
        self._notify()
        scope.cancel()

    def decide(self, *, is_right: bool) -> None:
        """End of doubt."""
        if not is_right:
            self._rotten = IntegrityError(f"{self.resource.key}: it has rotted on the disk", hint="ask again")
        self.is_doubted = not is_right
        self._notify()

    async def digest(self) -> Digest:
        """Of all pieces, as they come. Raises CacheError."""
        seen = hashlib.sha256()

        def add(index: int) -> None:
            data = memoryview(self.file.read(index))
            for start in range(0, len(data), _HASH_BYTES):   # hashlib lets go of the interpreter for each
                seen.update(data[start:start + _HASH_BYTES])

        for index in range(self.resource.piece_count):
            await self._until_present(index)
            await trio.to_thread.run_sync(add, index, limiter=self._threads.disk)
        return Digest("sha256:" + seen.hexdigest())

    async def _until_present(self, index: int) -> None:
        while not self.file.present[index]:
            await self._changed.wait()

    async def _replace_lies(self) -> None:
        """Compare what did not come from the origin just now with the origin's; who gave something else is told on."""
        if self.origin is None:
            return
        _log.warning("%s: what peers gave has another digest; it is compared with %s", self.resource.key,
                     self.origin.name)
        whole = Run(0, self.resource.piece_count)
        async with aclosing(fetch_run(self.origin, self.resource, whole, math.inf, self._threads.origin)) as pieces:
            async for index, data in pieces:
                self.counted.origin += len(data)
                if chunk_digest(data) == self.file.sum_of(index):
                    continue
                await trio.to_thread.run_sync(self._write, index, data, limiter=self._threads.disk)
                self.counted.wrong += 1
                for reader in self._readers:
                    reader.is_misled = reader.is_misled or reader.first <= index < reader.given
                liar = self._given_by.pop(index, "")
                if liar and self._blame is not None:
                    self._blame(liar, self)
