"""
The HTTP that nodes speak to a tracker, without a general parser: what is not quite that is left to h11. Pure.

Layer: tracker. Who calls: tracker.conversation. A beat comes every 2 ms in a large cluster, and h11 takes longer for
its few headers (0.11 ms) than the tracker for all the rest of it. So a head that comes whole, in the simplest of forms,
is split here. Invariant: what is taken here h11 takes too, and finds the same in it (a property test compares them);
no form in which two parsers could find different lengths is taken: one Content-Length or none, no Transfer-Encoding.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, NamedTuple

from lazyfs.errors import BugError

if TYPE_CHECKING:
    from collections.abc import Iterable

HEAD_BYTES_MAX: Final = 16 * 1024    # a request of ours has 300; one with a registry's token 5,000
_END: Final = b"\r\n\r\n"
_HEAD: Final = re.compile(rb"(GET|POST) (/[!-~]*) HTTP/1\.1\r\n((?:[A-Za-z0-9-]+: [!-~][ -~]*\r\n)+)")
_FIELD: Final = re.compile(rb"([A-Za-z0-9-]+): ([!-~][ -~]*)\r\n")
_LENGTH: Final = re.compile(rb"[0-9]{1,9}")
_OURS: Final = frozenset({b"host", b"user-agent", b"accept", b"accept-encoding", b"content-type", b"content-length",
                          b"authorization"})    # nothing else that a node sends changes how a request is read
_VALUE: Final = re.compile(r"[!-~][ -~]*")


class Head(NamedTuple):
    """A request's head. `size`: bytes of its body; `rest`: what has come after the head."""

    method: str
    target: bytes
    headers: dict[bytes, bytes]
    size: int
    rest: bytes


def parse_head(data: bytes) -> Head | None:
    """What a request begins with; None: it is not whole, not plain, or not right: h11 says which."""
    end = data.find(_END, 0, HEAD_BYTES_MAX)
    found = _HEAD.fullmatch(data, 0, end + 2) if end >= 0 else None
    if found is None:
        return None
    fields = _FIELD.findall(found[3])
    headers = {name.lower(): value.rstrip(b" ") for name, value in fields}
    if len(headers) != len(fields) or b"host" not in headers or not headers.keys() <= _OURS:
        return None
    length = headers.get(b"content-length", b"0")
    if _LENGTH.fullmatch(length) is None:
        return None
    return Head(found[1].decode(), found[2], headers, int(length), data[end + len(_END) :])


def format_head(status: int, size: int, content_type: str, headers: Iterable[tuple[str, str]] = ()) -> bytes:
    """The head of an answer whose body has `size` bytes. Raises BugError: a header could be read as two."""
    lines = [f"HTTP/1.1 {status} {_reason(status)}", f"Content-Type: {content_type}", f"Content-Length: {size}",
             "Cache-Control: no-store"]
    for name, value in headers:
        if _VALUE.fullmatch(value) is None:
            raise BugError(f"an answer's header {name} cannot be sent: {value!r:.100}")
        lines.append(f"{name}: {value}")
    return "\r\n".join([*lines, "", ""]).encode("ascii")


def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""
