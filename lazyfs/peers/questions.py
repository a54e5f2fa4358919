"""
Small questions between members, beside their pieces: one HTTP GET at the peer port, one answer.

    GET /lazyfs-ask/WORDS HTTP/1.1          200 and bytes; 404: not known here; 403: no right to it; 503: busy
    Authorization: Bearer TOKEN

Layer: peers. Who calls: the mirror, both to ask and (by peers.handshake) to answer. State: none. What the words and
the bytes mean is theirs who ask. Bounds: a header of 8 KiB, ANSWER_BYTES_MAX; the asker's deadline is its caller's,
the answerer's that of a handshake.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import h11

from lazyfs.errors import PeerBusyError, PeerError, PeerLacksError, PeerRefusedError
from lazyfs.limits import KIB, MANIFEST_BYTES_MAX, MIB
from lazyfs.peers.reaching import reach

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lazyfs.peers.channel import Channel
    from lazyfs.peers.model import Member
    from lazyfs.peers.tlsfiles import TlsFiles

PREFIX: Final = "/lazyfs-ask/"
ANSWER_BYTES_MAX: Final = MANIFEST_BYTES_MAX + MIB
_READ_BYTES: Final = 64 * KIB
_BEARER: Final = "Bearer "
_BUSY_S: Final = 1.0


class Desk(Protocol):
    """Who answers."""

    async def __call__(self, words: str, token: str) -> bytes:
        """
        The answer, at most ANSWER_BYTES_MAX. Both are what a stranger sends.

        Raises:
            PeerRefusedError, PeerLacksError, PeerBusyError: as of pieces. FormatError, UsageError: no such question.

        """
        ...


def question_of(target: bytes, headers: Mapping[bytes, bytes]) -> tuple[str, str]:
    """Words and token of a request whose target begins with PREFIX."""
    shown = headers.get(b"authorization", b"").decode("latin-1")
    token = shown.removeprefix(_BEARER) if shown.startswith(_BEARER) else ""
    return target.decode("latin-1").removeprefix(PREFIX), token


def status_of(error: PeerError) -> int:
    """How an error is said to who asked."""
    kinds = ((PeerRefusedError, 403), (PeerLacksError, 404), (PeerBusyError, 503))
    return next((status for kind, status in kinds if isinstance(error, kind)), 500)


async def ask(member: Member, words: str, *, token: str, tls: TlsFiles | None) -> bytes:
    """
    Ask a member; what it answers is hostile until it is checked. `words`: percent-encoded.

    Raises:
        PeerLacksError: it does not know. PeerRefusedError: it does not tell us. PeerBusyError: not now. PeerError: it
        is not reached, or says something else. ConfigError: our own certificate cannot be read.

    """
    who = f"{member.id} at {member.address}"
    channel = await reach(member, tls)
    try:
        headers = [("Host", member.address), ("Connection", "close")]
        if token:
            headers.append(("Authorization", _BEARER + token))
        http = h11.Connection(h11.CLIENT)
        hello = http.send(h11.Request(method="GET", target=PREFIX + words, headers=headers)) or b""
        await channel.send(hello + (http.send(h11.EndOfMessage()) or b""))
        return await _answer(channel, http, who)
    except h11.RemoteProtocolError as error:
        raise PeerError(f"{who}: its answer is no HTTP") from error
    finally:
        await channel.close()


async def _answer(channel: Channel, http: h11.Connection, who: str) -> bytes:
    room = memoryview(bytearray(_READ_BYTES))
    status, body = 0, bytearray()
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(bytes(room[:await channel.receive(room)]))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > ANSWER_BYTES_MAX:
                raise PeerError(f"{who}: an answer of more than {ANSWER_BYTES_MAX} bytes")
        elif isinstance(event, h11.EndOfMessage):
            break
        elif not isinstance(event, h11.InformationalResponse):
            raise PeerError(f"{who}: connection ended within an answer")
    if status == 200:
        return bytes(body)
    if status == 403:
        raise PeerRefusedError(f"{who}: does not tell us")
    if status == 503:
        raise PeerBusyError(f"{who}: busy", retry_after_s=_BUSY_S)
    raise PeerLacksError(f"{who}: does not know it (status {status})")
