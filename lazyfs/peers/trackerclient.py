"""
Requests to the trackers of a cluster: one connection kept, the next tracker when one fails.

Layer: peers, on trio. Who calls: peers.membership, the gate's authority, preheat. State: idle connections, which
tracker answered last, which failed when. Every request has a deadline, every answer a bound.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import urlsplit

import h11
import msgspec
import trio

from lazyfs import __version__, limits, shapes
from lazyfs.config.secretfile import read_word
from lazyfs.errors import (
    ConfigError,
    FormatError,
    LazyfsError,
    NotFoundError,
    PeerBusyError,
    PeerError,
    PeerRefusedError,
    UsageError,
)
from lazyfs.peers.model import Member
from lazyfs.peers.packed import ENCODING, unpack
from lazyfs.peers.reaching import why_not
from lazyfs.peers.tlsfiles import check_server

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazyfs.peers.tlsfiles import TlsFiles

REQUEST_S: Final = 10.0          # for a beat: Redis may take 2 s, who joins waits 1.5 s, a view has a megabyte
CONNECT_S: Final = 3.0           # then the next one is asked
AWAY_S: Final = 10.0             # one that failed is asked after the others for so long
_BODY_BYTES_MAX = 64 * limits.MIB
_HEADER_BYTES_MAX = 16 * 1024
_IDLE_COUNT_MAX = 2              # a beat and a token
_PIECE_BYTES = 256 * 1024
_LINE_CHARS_MAX = 300


@dataclass(slots=True)
class Reply:
    """What a tracker has answered, 2xx."""

    status: int
    body: bytes
    tracker: str


@dataclass(slots=True, eq=False)
class _Place:
    """A tracker. `away_until`: trio's clock."""

    url: str
    host: str
    port: int
    path: str
    tls: bool
    away_until: float = 0.0
    idle: list[trio.abc.Stream] = field(default_factory=list)


class _Question(NamedTuple):
    """`word`: to be shown; never in a message."""

    method: str
    path: str
    body: bytes
    word: str


class _Refusal(msgspec.Struct):
    error: str = ""
    hint: str = ""


class TrackerClient:
    """Of one node and cluster. `last`: the URL of who answered last; empty: nobody yet."""

    def __init__(self, urls: Sequence[str], tls: TlsFiles | None = None, token_file: str = "") -> None:
        """
        :tls: for https URLs: the authority of the tracker's certificate, and our own; None: the system's authorities.
        :token_file: with the word that the trackers want to be shown; empty: none.
        """
        self.last = ""
        self._tls = tls
        self._token_file = token_file
        self._places = [_place(url) for url in urls]

    async def request(self, method: str, path: str, body: bytes = b"", *, seconds: float = REQUEST_S) -> Reply:
        """
        Ask the tracker that answered last, else the next one.

        Args:
            method: in capitals.
            path: `/v1/...`, with its query.
            body: JSON, or empty.
            seconds: for all attempts together.

        Raises:
            PeerError: none of them answers. PeerRefusedError: 401 or 403. PeerBusyError: 429. NotFoundError: 404.
            UsageError: another 4xx. ConfigError: the word or a certificate cannot be read.

        """
        problems = []
        word = read_word(self._token_file, "peers.tracker_token_file") if self._token_file else ""
        question = _Question(method, path, body, word)
        deadline = trio.current_time() + seconds
        places = self._order()
        for index, place in enumerate(places):
            share_s = (deadline - trio.current_time()) / (len(places) - index)   # one that hangs leaves time for others
            try:
                with trio.fail_after(max(0.0, share_s)):
                    reply = await self._ask(place, question)
            except PeerBusyError:
                raise
            except (PeerRefusedError, NotFoundError, UsageError):    # all of them say so, or this one is none
                self.distrust(place.url)
                raise
            except (PeerError, OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError,
                    h11.ProtocolError) as error:
                place.away_until = trio.current_time() + AWAY_S
                said = f"no answer within {share_s:.1f} s" if isinstance(error, trio.TooSlowError) else why_not(error)
                problems.append(f"{place.url}: {said}")
                continue
            place.away_until = 0.0
            self.last = place.url
            return reply
        raise PeerError(f"no tracker answers: {'; '.join(problems):.{_LINE_CHARS_MAX}}")

    def distrust(self, url: str) -> None:
        """What it answered makes no sense, perhaps it is no tracker at all: the others are asked first for AWAY_S."""
        for place in self._places:
            if place.url == url:
                place.away_until = trio.current_time() + AWAY_S

    async def aclose(self) -> None:
        """Close what is idle."""
        for place in self._places:
            while place.idle:
                await trio.aclose_forcefully(place.idle.pop())

    def _order(self) -> list[_Place]:
        now = trio.current_time()
        return sorted(self._places, key=lambda place: (place.away_until > now, place.url != self.last))

    async def _ask(self, place: _Place, question: _Question) -> Reply:
        """One tracker. A kept connection that it has closed meanwhile is no failure of its own."""
        while place.idle:
            try:
                return await self._exchange(place, place.idle.pop(), question)
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, _ClosedError):
                continue
        return await self._exchange(place, await self._connect(place), question)

    async def _connect(self, place: _Place) -> trio.abc.Stream:
        with trio.fail_after(CONNECT_S):
            stream = await trio.open_tcp_stream(place.host, place.port)
            if not place.tls:
                return stream
            context = self._tls.client() if self._tls is not None else ssl.create_default_context()
            secure = trio.SSLStream(stream, context, server_hostname=place.host, https_compatible=True)
            try:
                await secure.do_handshake()
                if self._tls is not None and self._tls.ca_file:
                    check_server(secure.getpeercert(), Member(place.host, f"{place.host}:{place.port}"))
            except BaseException:
                await trio.aclose_forcefully(secure)
                raise
            return secure

    async def _exchange(self, place: _Place, stream: trio.abc.Stream, question: _Question) -> Reply:
        http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEADER_BYTES_MAX)
        method, path, body, word = question
        headers = [("Host", f"{place.host}:{place.port}"), ("User-Agent", f"lazyfs/{__version__}"),
                   ("Accept-Encoding", ENCODING), ("Content-Length", str(len(body)))]
        if body:
            headers.append(("Content-Type", "application/json"))
        if word:
            headers.append(("Authorization", f"Bearer {word}"))
        done = False
        try:
            data = http.send(h11.Request(method=method, target=place.path + path, headers=headers)) or b""
            data += (http.send(h11.Data(data=body)) or b"") if body else b""
            await stream.send_all(data + (http.send(h11.EndOfMessage()) or b""))
            status, found = await _receive(http, stream)
            done = http.our_state is h11.DONE and http.their_state is h11.DONE
        finally:
            if done and len(place.idle) < _IDLE_COUNT_MAX:
                place.idle.append(stream)
            else:
                await trio.aclose_forcefully(stream)
        if 200 <= status < 300:
            return Reply(status, found, place.url)
        raise _error(place.url, status, found)


class _ClosedError(PeerError):
    """A connection ended before the answer began."""


async def _receive(http: h11.Connection, stream: trio.abc.Stream) -> tuple[int, bytes]:
    status, encoding = 0, b""
    body = bytearray()
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            data = bytes(await stream.receive_some(_PIECE_BYTES))
            if not data and not status:
                raise _ClosedError("it closed the connection")
            http.receive_data(data)
        elif isinstance(event, h11.Response):
            status, encoding = event.status_code, dict(event.headers).get(b"content-encoding", b"")
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > _BODY_BYTES_MAX:
                raise PeerError(f"its answer has more than {_BODY_BYTES_MAX} bytes")
        elif isinstance(event, h11.EndOfMessage):
            return status, _unpacked(bytes(body)) if encoding == ENCODING.encode() else bytes(body)
        elif isinstance(event, h11.ConnectionClosed):
            raise _ClosedError("it closed the connection")


def _unpacked(body: bytes) -> bytes:
    try:
        return unpack(body, _BODY_BYTES_MAX)
    except FormatError as error:
        raise PeerError(f"its answer cannot be read: {error}") from None


def _error(url: str, status: int, body: bytes) -> LazyfsError:
    """What a tracker has said instead; its words are shortened and made printable."""
    try:
        said = shapes.from_json(body, _Refusal)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        said = _Refusal()
    text = "".join(char if char.isprintable() else "?" for char in said.error[:_LINE_CHARS_MAX]) or f"status {status}"
    hint = "".join(char if char.isprintable() else "?" for char in said.hint[:_LINE_CHARS_MAX])
    message = f"tracker {url}: {text}"
    if status in (401, 403):
        return PeerRefusedError(message, hint=hint)
    if status == 404:
        return NotFoundError(message, hint=hint)
    if status == 429:
        return PeerBusyError(message, hint=hint, retry_after_s=1.0)
    if 400 <= status < 500:
        return UsageError(message, hint=hint)
    return PeerError(f"{text} (status {status})", hint=hint)


def _place(url: str) -> _Place:
    """Raises ConfigError: it is no URL of a server."""
    found = urlsplit(url)
    try:
        port = found.port or (443 if found.scheme == "https" else 80)
    except ValueError:
        port = 0
    if found.scheme not in ("http", "https") or not found.hostname or not port:
        raise ConfigError(f"peers.tracker {url}: expected http(s)://host[:port]")
    return _Place(url, found.hostname, port, found.path.rstrip("/"), found.scheme == "https")
