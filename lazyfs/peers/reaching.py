"""A new connection to a member: its address, TCP, and TLS where the node has certificates. Layer: peers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from lazyfs.config import split_address
from lazyfs.errors import PeerError
from lazyfs.peers.channel import Channel
from lazyfs.peers.tlsfiles import secure

if TYPE_CHECKING:
    from lazyfs.peers.model import Member
    from lazyfs.peers.tlsfiles import TlsFiles


async def reach(member: Member, tls: TlsFiles | None) -> Channel:
    """
    Connect. `tls`: our certificate, and whose are believed; None: plain. The caller has a deadline, and closes it.

    Raises:
        PeerError: it is not reached, or is another one. ConfigError: our own certificate cannot be read.

    """
    try:
        host, port = split_address(member.address)
        stream = await trio.open_tcp_stream(host, port)
    except (OSError, ValueError, OverflowError) as error:
        raise PeerError(f"{member.id} at {member.address}: {why_not(error)}") from error
    try:
        return Channel(stream if tls is None else await secure(stream, tls, member, host))
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise


def why_not(error: BaseException) -> str:
    """Why there is no connection, in the system's words; trio's own say only that all attempts failed."""
    cause = error.__cause__
    while isinstance(cause, BaseExceptionGroup):      # several addresses
        cause = cause.exceptions[0]
    found = cause if isinstance(cause, OSError) else error
    return (found.strerror if isinstance(found, OSError) else "") or str(found) or type(found).__name__
