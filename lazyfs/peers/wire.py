"""
The frames that go between peers, built and parsed: docs/peer-protocol.md.

Layer: peers; pure, no I/O. Who calls: peers.client, peers.server. All that comes in is hostile until it has passed
here: a parser raises FormatError and nothing else, and makes nothing larger than the frame it was given. Fields that
are not known are passed over, so that a later version may add some.
"""

from __future__ import annotations

import math
import re
import struct
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec
from msgspec import Meta

from lazyfs import limits, shapes
from lazyfs.errors import (
    FormatError,
    LazyfsError,
    PeerBusyError,
    PeerError,
    PeerLacksError,
    PeerRefusedError,
)
from lazyfs.image.digest import Digest
from lazyfs.peers.model import HOPS_MAX, PIECE_BYTES_MAX, TOKEN_CHARS_MAX, Kind, PieceRequest, Priority, Resource

if TYPE_CHECKING:
    from collections.abc import Iterable

PROTOCOL = "lazyfs-peer/1"       # the name in the Upgrade header; another number: other frames
MARK = 0xA7                      # first byte of each frame: what is not a frame is told at once
HEAD = struct.Struct("!BBHII")   # mark, type, rate of who is asked, number of the request, bytes that follow
PIECE = struct.Struct("!IIBxxx")  # index, bytes before compression, encoding; then the bytes
CONTROL_BYTES_MAX = 64 * limits.KIB   # a request: 1,024 ranges are 20 KiB, a token 2
PIECE_COUNT_MAX = 4096           # pieces of one request: 1 GiB at 256 KiB
RANGE_COUNT_MAX = 1024
PIECE_SIZE_MIN = 4 * limits.KIB
PIECE_INDEX_MAX = (1 << 32) - 1  # 16 TiB at 4 KiB
SECONDS_MAX = 600.0              # nobody waits longer for one answer
BETTER_COUNT_MAX = 8
_MESSAGE_CHARS_MAX = 300
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9._-]{1,253}):[0-9]{1,5}\Z")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{0,64}\Z")


class Frame(IntEnum):
    """Types of frames; the first two go to the one who is asked, the others come from there."""

    REQUEST = 1
    CANCEL = 2
    PIECE = 3
    TROUBLE = 4
    END = 5
    ALIVE = 6


class Encoding(IntEnum):
    """Of a piece on the wire."""

    RAW = 0
    LZ4 = 1      # one LZ4 block


class Code(StrEnum):
    """Why a piece, or all of a request, is not given."""

    BUSY = "busy"
    LACKS = "lacks"
    REFUSED = "refused"
    FAILED = "failed"


class Head(NamedTuple):
    """A frame's header; `length` is within the bound of its type. `rate`: see head()."""

    type: Frame
    number: int
    length: int
    rate: int = 0


class PieceHead(NamedTuple):
    """What stands before the bytes of piece number `piece`. `size`: before compression; `stored`: on the wire."""

    piece: int
    size: int
    encoding: Encoding
    stored: int


class Trouble(NamedTuple):
    """Of one piece, or (piece None) of the whole request, which is then over."""

    code: Code
    message: str
    retry_after_s: float = 0.0
    better: tuple[str, ...] = ()
    piece: int | None = None


class _Asked(msgspec.Struct, omit_defaults=True):
    kind: Kind
    digest: Annotated[str, Meta(max_length=100)]
    size: Annotated[int, Meta(ge=0, le=limits.LAYER_BYTES_MAX)]
    piece_size: Annotated[int, Meta(ge=PIECE_SIZE_MIN, le=PIECE_BYTES_MAX)]
    ranges: Annotated[list[tuple[int, int]], Meta(min_length=1, max_length=RANGE_COUNT_MAX)]
    seconds: float
    hops: Annotated[int, Meta(ge=0, le=HOPS_MAX)]
    priority: Annotated[int, Meta(ge=0)]
    request: Annotated[str, Meta(max_length=64)] = ""
    asker: Annotated[str, Meta(max_length=128)] = ""
    token: Annotated[str, Meta(max_length=TOKEN_CHARS_MAX)] = ""


class _Told(msgspec.Struct, omit_defaults=True):
    code: str
    message: str = ""
    retry_after: float = 0.0
    better: Annotated[list[str], Meta(max_length=64)] = []
    index: int | None = None


_ASKED = shapes.msgpack_decoder(_Asked)
_TOLD = shapes.msgpack_decoder(_Told)
_LENGTH_MAX = {
    Frame.REQUEST: CONTROL_BYTES_MAX, Frame.CANCEL: 0, Frame.PIECE: PIECE.size + PIECE_BYTES_MAX,
    Frame.TROUBLE: CONTROL_BYTES_MAX, Frame.END: 0, Frame.ALIVE: 0,
}


def head(frame: Frame, number: int, length: int, rate: int = 0) -> bytes:
    """
    A frame's header; its `length` bytes follow.

    `rate`: that who is asked can give, as a step (peers.rates); 0: not known.
    """
    return HEAD.pack(MARK, frame, rate, number, length)


def parse_head(data: bytes | bytearray | memoryview) -> Head:
    """Of HEAD.size bytes. Raises FormatError: it is none, or announces too much."""
    mark, kind, rate, number, length = HEAD.unpack(data)
    try:
        frame = Frame(kind)
    except ValueError:
        frame = None
    if mark != MARK or frame is None:
        raise FormatError(f"peer: not a frame: it begins with {bytes(data[:4]).hex()}")
    if length > _LENGTH_MAX[frame]:
        raise FormatError(f"peer: a frame {frame.name} of {length} bytes, at most {_LENGTH_MAX[frame]} are allowed")
    return Head(frame, number, length, rate)


def piece_head(number: int, index: int, size: int, encoding: Encoding, stored: int, *, rate: int = 0) -> bytes:
    """All that stands before a piece's `stored` bytes."""
    return head(Frame.PIECE, number, PIECE.size + stored, rate) + PIECE.pack(index, size, encoding)


def parse_piece(data: bytes | bytearray | memoryview, length: int, resource: Resource) -> PieceHead:
    """
    Of PIECE.size bytes, in a frame of `length` bytes.

    Raises FormatError: it is not a piece of that resource, or compression made it larger.
    """
    if length < PIECE.size:
        raise FormatError(f"peer: a piece's frame of {length} bytes")
    index, size, code = PIECE.unpack(data)
    stored = length - PIECE.size
    try:
        encoding = Encoding(code)
    except ValueError:
        raise FormatError(f"peer: piece {index} in encoding {code}, which is not known") from None
    if index >= resource.piece_count or size != resource.piece_bytes(index):
        raise FormatError(f"peer: {resource.key} has no piece {index} of {size} bytes")
    if stored != size if encoding is Encoding.RAW else not 0 < stored < size:
        raise FormatError(f"peer: piece {index} of {size} bytes comes as {stored} bytes, {encoding.name.lower()}")
    return PieceHead(index, size, encoding, stored)


def ranges_of(indexes: Iterable[int]) -> list[tuple[int, int]]:
    """(first, count) of ascending indexes."""
    found: list[tuple[int, int]] = []
    for index in indexes:
        if found and index == found[-1][0] + found[-1][1]:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((index, 1))
    return found


def request_frame(number: int, request: PieceRequest, token: str) -> bytes:
    """
    A request as a frame.

    Raises:
        PeerError: it asks for more than one request may, or the token is too long.

    """
    resource, ranges = request.resource, ranges_of(request.indexes)
    if not 0 < len(request.indexes) <= PIECE_COUNT_MAX or len(ranges) > RANGE_COUNT_MAX or len(token) > TOKEN_CHARS_MAX:
        raise PeerError(f"{resource.key}: {len(request.indexes)} pieces in {len(ranges)} ranges, a token of "
                        f"{len(token)} characters: more than one request may have")
    body = msgspec.msgpack.encode(_Asked(
        kind=resource.kind, digest=str(resource.digest), size=resource.size, piece_size=resource.piece_size,
        ranges=ranges, seconds=min(max(request.seconds, 0.0), SECONDS_MAX), hops=request.hops,
        priority=request.priority, request=request.request, asker=request.asker, token=token))
    return head(Frame.REQUEST, number, len(body)) + body


def parse_request(body: bytes | bytearray | memoryview) -> tuple[PieceRequest, str]:
    """A request and its token. Raises FormatError."""
    try:
        asked = _ASKED.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"peer: not a request: {str(error)[:200]}") from None
    resource = Resource(asked.kind, Digest(asked.digest), asked.size, asked.piece_size)
    if asked.piece_size & (asked.piece_size - 1) or resource.piece_count > PIECE_INDEX_MAX:
        raise FormatError(f"peer: {resource.key} in pieces of {asked.piece_size} bytes")
    if not (math.isfinite(asked.seconds) and 0 <= asked.seconds <= SECONDS_MAX):
        raise FormatError(f"peer: a request that waits {asked.seconds} s, at most {SECONDS_MAX:g} are allowed")
    if not _REQUEST_ID.match(asked.request):
        raise FormatError("peer: a request's id of other than letters, digits and ._-")
    priority = Priority(min(asked.priority, max(Priority)))    # a kind that a later version has is the least urgent
    indexes = _indexes(asked.ranges, resource)
    return PieceRequest(resource, indexes, asked.seconds, asked.hops, priority, asked.request, asked.asker), asked.token


def _indexes(ranges: list[tuple[int, int]], resource: Resource) -> tuple[int, ...]:
    count, end = 0, 0
    for first, size in ranges:
        count += size
        if first < end or size < 1 or count > PIECE_COUNT_MAX or first + size > resource.piece_count:
            raise FormatError(f"peer: {resource.key} of {resource.piece_count} pieces: range {first} + {size} is not "
                              f"ascending within it, or makes more than {PIECE_COUNT_MAX}")
        end = first + size
    return tuple(index for first, size in ranges for index in range(first, first + size))


def trouble_frame(number: int, trouble: Trouble) -> bytes:
    """What is not given, and why, as a frame."""
    body = msgspec.msgpack.encode(_Told(
        code=trouble.code, message=trouble.message[:_MESSAGE_CHARS_MAX], retry_after=trouble.retry_after_s,
        better=list(trouble.better[:BETTER_COUNT_MAX]), index=trouble.piece))
    return head(Frame.TROUBLE, number, len(body)) + body


def parse_trouble(body: bytes | bytearray | memoryview) -> Trouble:
    """
    Of a frame's bytes. What is merely odd is made harmless: unprintable letters, addresses that are none.

    Raises FormatError.
    """
    try:
        told = _TOLD.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"peer: not an error: {str(error)[:200]}") from None
    code = Code(told.code) if told.code in set(Code) else Code.FAILED
    retry = min(max(told.retry_after, 0.0), SECONDS_MAX) if math.isfinite(told.retry_after) else 0.0
    if told.index is not None and not 0 <= told.index <= PIECE_INDEX_MAX:
        raise FormatError(f"peer: an error of piece {told.index}")
    better = tuple(address for address in told.better if _ADDRESS.match(address))[:BETTER_COUNT_MAX]
    return Trouble(code, printable(told.message), retry, better, told.index)


def printable(text: str) -> str:
    """A peer's words, fit for a line of the log."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text[:_MESSAGE_CHARS_MAX])


def trouble_of(error: LazyfsError, index: int | None = None) -> Trouble:
    """How an error of ours is told to a peer: its kind and its line, for neither holds a secret."""
    if isinstance(error, PeerBusyError):
        return Trouble(Code.BUSY, str(error), error.retry_after_s, error.better, index)
    code = Code.LACKS if isinstance(error, PeerLacksError) else Code.FAILED
    if isinstance(error, PeerRefusedError) and index is None:    # of a piece: somebody refused us, not the asker
        code = Code.REFUSED
    return Trouble(code, str(error), piece=index)


def error_of(trouble: Trouble, who: str) -> PeerError:
    """What a peer's trouble is to us; `who`: it, for the message."""
    message = f"{who}: {trouble.message}"
    if trouble.code is Code.BUSY:
        return PeerBusyError(message, retry_after_s=trouble.retry_after_s, better=trouble.better)
    if trouble.code is Code.REFUSED:
        return PeerRefusedError(message, hint="the peer does not take our token: compare the clocks, the cluster's "
                                              "name and the keys of both (lazyfs peers)")
    return PeerLacksError(message)    # FAILED too: who says so is there and honest; the swarm keeps away from others
