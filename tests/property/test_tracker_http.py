"""The tracker's own reading of HTTP: what it takes h11 takes too, and finds the same; what it writes, h11 reads."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.errors import BugError
from lazyfs.tracker.plainhttp import HEAD_BYTES_MAX, format_head, parse_head

NAMES = st.sampled_from(["Host", "host", "Content-Length", "Transfer-Encoding", "Connection", "Accept",
                         "Authorization", "Content-Type", "User-Agent", "Expect", "X-Other", "Bad Name", ""])
VALUES = st.one_of(st.sampled_from(["a", "0", "5", "05", "+5", "5, 5", "5 ", " 5", "chunked", "100-continue", "close",
                                    "", "a\x00b", "a\rb", "a\tb", "\xe4", "1e3", "99999999999"]),
                   st.text(st.characters(min_codepoint=1, max_codepoint=255), max_size=6))
LINES = st.lists(st.tuples(NAMES, VALUES), max_size=5)
STARTS = st.sampled_from(["GET / HTTP/1.1", "POST /v1/clusters/c/beat?a=b HTTP/1.1", "GET  / HTTP/1.1",
                          "GET / HTTP/1.0", "get / HTTP/1.1", "HEAD / HTTP/1.1", "GET a HTTP/1.1",
                          "GET /\x7f HTTP/1.1", "GET / HTTP/1.12", "OPTIONS * HTTP/1.1", "GET /a b HTTP/1.1"])
BODY = b"12345GET /next"


def by_h11(data: bytes) -> tuple[h11.Request, bytes]:
    """The request, and its body."""
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)
    http.receive_data(data)
    head, body = http.next_event(), b""
    assert isinstance(head, h11.Request)
    while isinstance(event := http.next_event(), h11.Data):
        body += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    return head, body


@given(start=STARTS, lines=LINES, has_host=st.booleans(), end=st.sampled_from(["\r\n", "\n"]))
def test_what_is_taken_h11_takes_and_finds_the_same(start: str, lines: list[tuple[str, str]], end: str, *,
                                                    has_host: bool) -> None:
    fields = [("Host", "a")] if has_host else []
    text = end.join([start, *(f"{name}: {value}" for name, value in (*fields, *lines)), "", ""])
    data = text.encode("latin-1") + BODY
    found = parse_head(data)
    if found is None or found.size > len(BODY):
        return
    head, body = by_h11(data)
    assert (head.method.decode(), head.target) == (found.method, found.target)
    assert dict(head.headers) == found.headers
    assert body == found.rest[: found.size]
    assert found.rest == BODY


def test_what_nodes_send_is_taken() -> None:
    data = (b"POST /v1/clusters/prod/beat HTTP/1.1\r\nHost: tracker:9450\r\nUser-Agent: lazyfs/1\r\n"
            b"Content-Length: 5\r\nContent-Type: application/json\r\nAuthorization: Bearer word\r\n\r\n12345")
    found = parse_head(data)
    assert found is not None
    assert (found.method, found.target, found.size, found.rest) == ("POST", b"/v1/clusters/prod/beat", 5, b"12345")
    assert found.headers[b"authorization"] == b"Bearer word"
    assert all(parse_head(data[:size]) is None for size in range(data.index(b"\r\n\r\n") + 4))


@pytest.mark.parametrize("head", ["Transfer-Encoding: chunked", "Content-Length: 5\r\nContent-Length: 5",
                                  "Connection: close", "Content-Length: -1", "Expect: 100-continue", "Upgrade: h2c",
                                  "X: " + "a" * 20_000])
def test_what_could_be_read_in_two_ways_is_left_to_h11(head: str) -> None:
    assert parse_head(f"POST / HTTP/1.1\r\nHost: a\r\n{head}\r\n\r\n".encode()) is None


@given(status=st.sampled_from([200, 204, 404, 429, 503, 599]), size=st.integers(0, 1 << 40),
       value=st.text(st.characters(min_codepoint=1, max_codepoint=255), max_size=8))
def test_what_is_written_h11_reads(status: int, size: int, value: str) -> None:
    try:
        data = format_head(status, size, "application/json", [("X-Some", value)])
    except BugError:
        assert not value.isprintable() or not value.isascii() or value.strip() != value or not value
        return
    http = h11.Connection(h11.CLIENT)
    http.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    http.receive_data(data)
    found = http.next_event()
    assert isinstance(found, h11.Response)
    assert found.status_code == status
    assert dict(found.headers)[b"content-length"] == str(size).encode()
    assert dict(found.headers)[b"x-some"] == value.rstrip().encode()
