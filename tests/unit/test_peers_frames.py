"""Frames between peers: what is built is parsed as it was, what is odd is refused or made harmless."""

from __future__ import annotations

import msgspec
import pytest

from lazyfs.errors import FormatError, PeerBusyError, PeerError, PeerLacksError, PeerRefusedError
from lazyfs.peers import wire
from lazyfs.peers.model import HOPS_MAX, PIECE_BYTES_MAX, Priority
from tests.peerwire import asking, resource_of

RESOURCE = resource_of(10 * (64 << 10) + 5)      # 11 pieces


def body_of(frame: bytes) -> bytes:
    head = wire.parse_head(frame[:wire.HEAD.size])
    assert len(frame) == wire.HEAD.size + head.length
    return frame[wire.HEAD.size:]


def plain_request(**changes: object) -> dict[str, object]:
    fields = msgspec.msgpack.decode(body_of(wire.request_frame(1, asking(RESOURCE, [0, 1, 4]), "t")))
    return fields | changes


def test_a_request_as_it_was() -> None:
    request = asking(RESOURCE, [0, 1, 2, 7, 10], seconds=3.5, hops=HOPS_MAX, priority=Priority.COPY)
    frame = wire.request_frame(4_000_000_000, request, "a token")
    assert wire.parse_head(frame[:wire.HEAD.size]).number == 4_000_000_000
    assert wire.parse_request(body_of(frame)) == (request, "a token")
    assert len(frame) < 250


def test_fields_of_a_later_version_are_passed_over() -> None:
    fields = plain_request(colour="red", priority=9)
    request, _ = wire.parse_request(msgspec.msgpack.encode(fields))
    assert request.priority is Priority.COPY


@pytest.mark.parametrize("changes", [
    {"kind": "mount"}, {"digest": "sha256:12"}, {"digest": "sha256:" + "../" * 21 + "a"}, {"size": -1},
    {"size": 1 << 60}, {"size": None},
    {"piece_size": 0}, {"piece_size": 3 << 16}, {"piece_size": PIECE_BYTES_MAX * 2}, {"piece_size": 2048},
    {"ranges": []}, {"ranges": [(0, 12)]}, {"ranges": [(5, 1), (4, 1)]}, {"ranges": [(1, 2), (2, 1)]},
    {"ranges": [(0, 0)]}, {"ranges": [(-1, 1)]}, {"ranges": [(3, -1)]}, {"ranges": [(0, 1)] * 2000},
    {"ranges": [(0, 1 << 40)], "size": 1 << 40}, {"ranges": [(1 << 60, 1)]}, {"seconds": -1.0},
    {"seconds": float("nan")}, {"seconds": float("inf")}, {"seconds": 1e9}, {"hops": HOPS_MAX + 1}, {"hops": -1},
    {"priority": -1}, {"request": "a\nb"}, {"request": "x" * 65}, {"token": "x" * 5000}, {"token": 5},
], ids=str)
def test_requests_that_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        wire.parse_request(msgspec.msgpack.encode(plain_request(**changes)))


def test_a_request_of_too_much_is_not_sent() -> None:
    many = resource_of(1 << 40, 4096)
    for indexes in ([], range(wire.PIECE_COUNT_MAX + 1), range(0, 3000, 2)):
        with pytest.raises(PeerError, match="more than one request"):
            wire.request_frame(1, asking(many, indexes), "")
    with pytest.raises(PeerError, match="more than one request"):
        wire.request_frame(1, asking(RESOURCE, [1]), "x" * 3000)


@pytest.mark.parametrize("head", [
    b"HTTP/1.1 200", wire.HEAD.pack(wire.MARK, 99, 0, 1, 0), wire.HEAD.pack(wire.MARK, wire.Frame.END, 0, 1, 1),
    wire.HEAD.pack(wire.MARK, wire.Frame.REQUEST, 0, 1, 1 << 20),
    wire.HEAD.pack(wire.MARK, wire.Frame.PIECE, 0, 1, PIECE_BYTES_MAX + 13), wire.HEAD.pack(0, 1, 0, 1, 0),
])
def test_headers_that_are_refused(head: bytes) -> None:
    with pytest.raises(FormatError):
        wire.parse_head(head)


def piece(index: int, size: int, encoding: int, stored: int) -> wire.PieceHead:
    return wire.parse_piece(wire.PIECE.pack(index, size, encoding), wire.PIECE.size + stored, RESOURCE)


def test_pieces() -> None:
    whole, last = 64 << 10, 5
    assert piece(0, whole, 0, whole) == (0, whole, wire.Encoding.RAW, whole)
    assert piece(10, last, 1, 3) == (10, last, wire.Encoding.LZ4, 3)
    for wrong in [(11, last, 0, last), (10, last, 0, 4), (10, last, 1, 5), (10, last, 1, 0), (0, last, 0, last),
                  (0, whole, 2, whole), (0, whole, 0, whole + 1), (1 << 31, whole, 0, whole)]:
        with pytest.raises(FormatError):
            piece(*wrong)


@pytest.mark.parametrize(("error", "kind"), [
    (PeerBusyError("full", retry_after_s=2.5, better=("10.0.0.1:5", "[::1]:5")), PeerBusyError),
    (PeerLacksError("not here"), PeerLacksError), (PeerRefusedError("no"), PeerRefusedError),
    (FormatError("something else"), PeerLacksError),
])
def test_errors_as_they_were(error: PeerError, kind: type[PeerError]) -> None:
    trouble = wire.parse_trouble(body_of(wire.trouble_frame(7, wire.trouble_of(error))))
    again = wire.error_of(trouble, "node-1 at 10.0.0.1:5")
    assert type(again) is kind
    assert str(error) in str(again)
    if isinstance(error, PeerBusyError) and isinstance(again, PeerBusyError):
        assert (again.retry_after_s, again.better) == (2.5, ("10.0.0.1:5", "[::1]:5"))


def test_a_refusal_that_was_the_answerers_own_is_no_refusal_of_the_asker() -> None:
    """Its parent did not take its token: the asker's is good."""
    trouble = wire.trouble_of(PeerRefusedError("no"), 3)
    assert (trouble.code, trouble.piece) == (wire.Code.FAILED, 3)


def test_errors_are_made_harmless() -> None:
    told = {"code": "quantum", "message": "a\x1b[31m\nb" * 1000, "retry_after": float("nan"),
            "better": ["http://evil/", "10.0.0.1:5", "a b:1", "x:1\n", "host:99999999"], "more": 1}
    trouble = wire.parse_trouble(msgspec.msgpack.encode(told))
    assert trouble.code is wire.Code.FAILED
    assert trouble.message.isprintable()
    assert len(trouble.message) <= 300
    assert trouble.retry_after_s == 0
    assert trouble.better == ("10.0.0.1:5",)
    for fields in ({"code": 5}, {"code": "busy", "index": -1}, [], {"message": "no code"}):
        with pytest.raises(FormatError):
            wire.parse_trouble(msgspec.msgpack.encode(fields))
    for body in (b"", b"\xc1", b"\x81" * 1000):
        with pytest.raises(FormatError):
            wire.parse_trouble(body)
