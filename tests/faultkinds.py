"""
The faults of tests/faultproxy.py: which requests they meet and what they do to the answer.

A Fault applies to requests whose method equals `method` (if set) and whose "path?query" matches the regex `path`
(searched); the first `skip` matches pass untouched, then it applies `times` times (-1: for ever). The first fault that
applies wins. Offsets (`at`) count bytes of the response body.

Kinds: DELAY (answer after `seconds`) · DRIP (`size` bytes of body each `seconds`) · CUT (close after `at` bytes, the
length promised in full) · RESET (TCP RST after `at` bytes; at=-1: instead of an answer) · SHORT (`size` bytes fewer,
and the header agrees) · LONG (`size` more, and the header agrees) · WRONG_LENGTH (Content-Length
says `size` more than comes; negative: fewer) · IGNORE_RANGE (200 with everything) · WRONG_RANGE (206, Content-Range
shifted by `size`) · NO_CONTENT_RANGE (206 without the header) · FLIP (bit 0 of body byte `at` turned) · STATUS (answer
`status` with `headers` and `body`, upstream is not asked) · REDIRECT (307 to `location` + path, or to `location` itself
if `exact`) · BLACK_HOLE (no answer while the proxy lives) · STALL (silence after `at` bytes) · GARBAGE (bytes that are
not HTTP) · ENCODING (claims Content-Encoding: gzip) · CHUNKED (same bytes, chunked) · LOSE_UPLOAD (reads the request's
body, forwards it, then resets: the client cannot know that it arrived).
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import http.client
    from collections.abc import Iterator

PIECE_BYTES = 256 * 1024


class Kind(enum.Enum):
    DELAY = enum.auto()
    DRIP = enum.auto()
    CUT = enum.auto()
    RESET = enum.auto()
    SHORT = enum.auto()
    LONG = enum.auto()
    WRONG_LENGTH = enum.auto()
    IGNORE_RANGE = enum.auto()
    WRONG_RANGE = enum.auto()
    NO_CONTENT_RANGE = enum.auto()
    FLIP = enum.auto()
    STATUS = enum.auto()
    REDIRECT = enum.auto()
    BLACK_HOLE = enum.auto()
    STALL = enum.auto()
    GARBAGE = enum.auto()
    ENCODING = enum.auto()
    CHUNKED = enum.auto()
    LOSE_UPLOAD = enum.auto()


@dataclass
class Fault:
    """What goes wrong, for which requests, how often. See the module's text. `applied` counts."""

    kind: Kind
    path: str = ""
    method: str = ""
    times: int = -1
    skip: int = 0
    at: int = 0
    size: int = 1
    seconds: float = 0.0
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    location: str = ""
    exact: bool = False
    applied: int = 0

    def meets(self, method: str, path: str) -> bool:
        return (not self.method or self.method == method) and re.search(self.path, path) is not None


@dataclass(frozen=True)
class Seen:
    """One request as it arrived; header names in lower case. `path` includes the query."""

    method: str
    path: str
    headers: dict[str, str]
    fault: Kind | None


def spoil(response: http.client.HTTPResponse, fault: Fault | None) -> Iterator[bytes]:
    """The body's pieces, with the fault's changes to the bytes themselves."""
    kind = fault.kind if fault else None
    if fault is None or kind not in {Kind.CUT, Kind.RESET, Kind.STALL, Kind.FLIP, Kind.SHORT, Kind.LONG, Kind.DRIP}:
        while piece := response.read(PIECE_BYTES):
            yield piece
        return
    body = response.read()
    if kind in {Kind.CUT, Kind.RESET, Kind.STALL}:
        body = body[: fault.at]
    elif kind is Kind.FLIP and fault.at < len(body):
        body = body[: fault.at] + bytes([body[fault.at] ^ 1]) + body[fault.at + 1 :]
    elif kind is Kind.SHORT:
        body = body[: max(len(body) - fault.size, 0)]
    elif kind is Kind.LONG:
        body += b"\0" * fault.size
    step = fault.size if kind is Kind.DRIP else PIECE_BYTES
    for offset in range(0, len(body), step):
        yield body[offset : offset + step]


def shift_range(value: str, size: int) -> str:
    """Content-Range `bytes 10-19/100` -> both ends moved by `size`."""
    met = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", value)
    assert met is not None
    first, last, total = (int(part) for part in met.groups())
    return f"bytes {first + size}-{last + size}/{total}"
