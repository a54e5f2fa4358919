"""
What passes between the parts of the peers: who, what, and the contracts of network, store and gate.

Layer: peers. Who calls: everybody in it, and who plugs it together (node, mirror, benchmarks.scale). Pure; no I/O.
Times of day never pass between nodes, only seconds that are left: their clocks differ.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from lazyfs import limits
from lazyfs.errors import BugError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from lazyfs.image.digest import Digest

PIECE_BYTES_MAX = 4 * limits.MIB
TOKEN_CHARS_MAX = 2048           # a token has about 600
HOPS_MAX = 32                    # a tree of 2 children over 10,000 nodes has 14 levels; fallbacks add some
HERE_ONLY = HOPS_MAX             # `hops` of a request that wants what is there already, see PieceRequest
COMING = HOPS_MAX - 1            # likewise, of one that wants what is there or on its way there
BEAT_S = 0.25                    # an answerer that has nothing to send yet says so that often,
BEAT_READ_S = 0.15               # if it was asked for a read,
SILENCE_S = 2.0                  # and one that says nothing for so long is gone: PeerError (Exchange.ask)


class Kind(enum.StrEnum):
    """
    What a resource is.

    DEVICE: a layer device, by device digest; its pieces are its chunks, uncompressed, each with a digest that the
    receiver knows. BLOB: a blob of an ordinary image, by its digest. FILE: something behind a URL (lazyfs get, proxy).
    """

    DEVICE = "device"
    BLOB = "blob"
    FILE = "file"


class Priority(enum.IntEnum):
    """As fetch.transfer.Priority; a piece is passed on with the priority of who asks."""

    FOREGROUND = 0
    PREFETCH = 1
    BACKGROUND = 2
    COPY = 3


def beat_s(priority: Priority) -> float:
    """How often an answerer says that it is there, while it has nothing to send. A read's asker looks sooner."""
    return BEAT_READ_S if priority is Priority.FOREGROUND else BEAT_S


@dataclass(frozen=True, slots=True)
class Resource:
    """`size` bytes in pieces of `piece_size` (power of two, at most PIECE_BYTES_MAX), the last one shorter."""

    kind: Kind
    digest: Digest
    size: int
    piece_size: int

    @property
    def key(self) -> str:
        """Its name everywhere: `device/sha256:...`."""
        return f"{self.kind}/{self.digest}"

    @property
    def piece_count(self) -> int:
        return -(-self.size // self.piece_size)

    def piece_bytes(self, index: int) -> int:
        """Raises BugError: there is no such piece."""
        if not 0 <= index < self.piece_count:
            raise BugError(f"{self.key} has no piece {index}")
        return min(self.piece_size, self.size - index * self.piece_size)


@dataclass(frozen=True, slots=True)
class Member:
    """
    A node as others see it.

    Attributes:
        id: unique in the cluster and lasting (over restarts); [A-Za-z0-9._-], at most 128.
        address: host:port of its peer server.
        zone: where it is; members of a zone are near each other. Empty: nobody said.
        up_rate: bytes/s that it is willing to send; 0: it did not say.

    """

    id: str
    address: str
    zone: str = ""
    up_rate: int = 0


@dataclass(frozen=True, slots=True)
class View:
    """
    Who is in a resource's swarm, as this node knows it: in order of id, itself included. Views of nodes differ.

    :complete: ids of those that have all of it, as they said; partial: of those that have some of it, and no little.
    """

    members: tuple[Member, ...] = ()
    complete: frozenset[str] = field(default_factory=frozenset)
    partial: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True, slots=True)
class PieceRequest:
    """
    What one node asks of another: pieces of one resource, ascending.

    Attributes:
        seconds: that the asker will wait, from now; the answerer's own fetching ends before.
        hops: how many have passed it on. HOPS_MAX (HERE_ONLY): give what is here or just coming from the origin, and
            PeerLacksError at once for the rest; nothing is fetched for it, and no flight is waited for that has gone
            to a peer, who may be waiting for the asker. More is refused. COMING: likewise, but every flight under way
            is waited for (referrals says why that ends).
        asker: who asks, if another member may be named instead (referrals): of a read of one piece; else empty.
        request: the id of the read that it is for (lazyfs.requestid), or empty.

    """

    resource: Resource
    indexes: tuple[int, ...]
    seconds: float
    hops: int
    priority: Priority
    request: str = ""
    asker: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """An answer's piece, as it was before compression; not checked against any digest. `data` is the caller's."""

    index: int
    data: bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class FileRange:
    """A piece that lies in a file: for sendfile. Valid until `release` is called."""

    file: int
    offset: int
    size: int
    release: Callable[[], None]


class Exchange(Protocol):
    """The network as the swarm sees it: peers.client in reality, an in-memory model in benchmarks.scale."""

    def ask(self, member: Member, request: PieceRequest) -> AbstractAsyncContextManager[AsyncIterator[Piece]]:
        """
        Ask a member; its pieces come in any order, as soon as it has them. Leaving the block early takes the rest back.

        Raises (inside the block, or on entering):
            PeerBusyError: not now; it may name others. PeerLacksError: it does not have the resource, or cannot get
            the pieces. PeerRefusedError: it does not admit us. PeerError: it cannot be reached, broke off, or is
            silent. All are lazyfs.errors.

        """
        ...

    def heard_at(self, member: Member) -> float:
        """When the last byte of it came, over any connection, a beat too (trio's clock); 0.0: not lately."""
        ...


class Store(Protocol):
    """What a node serves from: its cache, and what it fetches because somebody asked."""

    async def piece(self, request: PieceRequest, index: int) -> bytes | memoryview | FileRange:
        """
        One piece, checked; fetched first (from its own parent, with hops + 1) where it is not here.

        Raises:
            PeerLacksError: this node does not take part in the resource. LazyfsError: it could not be had in time.

        """
        ...


class Gate(Protocol):
    """Who may have what: peers.tokens. `key` is Resource.key."""

    async def token(self, key: str, to: str) -> str:
        """
        A token of ours for a resource, to show to the member with id `to` and to nobody else: who gets it cannot show
        it further. Fetched when needed; at most TOKEN_CHARS_MAX. "" where the cluster has none.

        Raises PeerRefusedError: this node may not have the resource. SourceError (no PeerError: it is not the member's
        fault): there is none to be had now.
        """
        ...

    def admit(self, token: str, key: str) -> tuple[str, float]:
        """Check a peer's token: the member's id, and for how many seconds it is good. Raises PeerRefusedError."""
        ...


class Deliver(Protocol):
    """What takes a piece: checks its digest, keeps it. May be called for several pieces at once."""

    async def __call__(self, piece: Piece, member: Member) -> bool:
        """False: these are not the piece's bytes, whoever gave them lied."""
        ...


class Origin(Protocol):
    """
    What Swarm.fetch calls with pieces that the origin must give, as soon as that is known; `fetch` then returns [].

    At once, not when the call ends: this node may be their root, and others' pieces wait for it, among them perhaps
    the parents of the rest of the very same call.
    """

    def __call__(self, indexes: list[int]) -> None:
        """Synchronous, on the loop; several times a call."""
        ...
