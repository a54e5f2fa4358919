"""
Certificates between the parts of a cluster: by file, read again when a file changes, TLS 1.3 only.

Layer: peers. Who calls: node and mirror (peer client and server), the tracker and its clients. State: the contexts
made last, and of what files. Blocking, but three stat() a connection and now and then reading three small files.

What a certificate proves: of both sides, that the cluster's authority has issued it; of a server also its name: one of
its subjectAltNames is the member's id (without `.mirror`) or the host of the address that it was reached by, to the
letter. So another member cannot stand in for it, and take what its asker's token is good for. A client's name is not
looked at: who it is, its token says, which is bound to a key of its own (peers.tokens).
"""

from __future__ import annotations

import logging
import ssl
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from lazyfs.errors import ConfigError, PeerError
from lazyfs.peers.securestream import SecureStream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lazyfs.peers.model import Member

_log: Final = logging.getLogger("lazyfs.peers")
_MIRROR: Final = ".mirror"
_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(slots=True)
class _Made:
    context: ssl.SSLContext
    stamp: _Stamp


@dataclass(eq=False)
class TlsFiles:
    """
    A certificate, its key, and the authority of the others.

    Attributes:
        section: of the configuration, for messages.
        cert_file: certificate (chain), PEM. Empty: only a client that shows none.
        key_file: its key, PEM, without a password, for its owner only.
        ca_file: whose certificates are believed. Empty: a server asks for none, a client believes the system's.

    """

    section: str
    cert_file: str
    key_file: str
    ca_file: str
    _made: dict[bool, _Made] = field(default_factory=dict, repr=False)

    def load(self) -> None:
        """
        Read all of it once, at the start.

        Raises:
            ConfigError: a file cannot be read, holds something else, or the key can be read by others.

        """
        if self.cert_file:
            self.server()
        self.client()

    def server(self) -> ssl.SSLContext:
        """The context for the next connection of others. Raises ConfigError, but only where none was made before."""
        return self._context(is_server=True, make=self._make_server)

    def client(self) -> ssl.SSLContext:
        """
        The context for our next connection to another. Raises ConfigError, as server().

        With `ca_file` it does not look at names: see check_server(). Without, it is the system's way of trusting.
        """
        return self._context(is_server=False, make=self._make_client)

    def _context(self, *, is_server: bool, make: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
        made, found = self._made.get(is_server), self._stamp()
        if made is not None and made.stamp == found:
            return made.context
        try:
            context = make()
        except ConfigError as error:
            if made is None:
                raise
            made.stamp = found     # half written, perhaps: said once, and looked at again when it changes again
            _log.warning("%s; going on with the certificate from before", error)
            return made.context
        self._made[is_server] = _Made(context, found)
        return context

    def _make_server(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._dress(context)
        if self.ca_file:
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _make_client(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.ca_file:
            context.check_hostname = False     # check_server() does
        else:
            context.load_default_certs()
        self._dress(context)
        return context

    def _dress(self, context: ssl.SSLContext) -> None:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if self.ca_file:
            try:
                context.load_verify_locations(self.ca_file)
            except (OSError, ssl.SSLError) as error:
                raise self._unusable("ca_file", self.ca_file, error) from error
        if not self.cert_file:
            return
        self._check_mode()
        try:
            context.load_cert_chain(self.cert_file, self.key_file, password=lambda: "")
        except (OSError, ssl.SSLError) as error:
            raise self._unusable("cert_file", f"{self.cert_file} with {self.key_file}", error) from error

    def _check_mode(self) -> None:
        try:
            mode = stat.S_IMODE(Path(self.key_file).stat().st_mode)
        except OSError as error:
            raise self._unusable("key_file", self.key_file, error) from error
        if mode & 0o077:
            raise ConfigError(f"{self.section}.key_file {self.key_file} can be read by others than its owner",
                              hint=f"chmod 600 {self.key_file}")

    def _unusable(self, key: str, path: str, error: OSError) -> ConfigError:
        reason = "no such PEM content" if isinstance(error, ssl.SSLError) else error.strerror
        return ConfigError(f"{self.section}.{key} {path}: {reason}", hint="docs/peers.md, Certificates")

    def _stamp(self) -> _Stamp:
        return tuple(_stamp(path) for path in (self.cert_file, self.key_file, self.ca_file) if path)


async def secure(stream: trio.SocketStream, tls: TlsFiles, member: Member, host: str) -> SecureStream:
    """TLS over a connection to a member, with the very one that was meant. Raises PeerError, ConfigError."""
    secured = SecureStream(stream, tls.client(), server_hostname=host)
    try:
        await secured.shake_hands()
    except (trio.BrokenResourceError, OSError) as error:
        raise PeerError(f"{member.id} at {member.address}: no TLS: {error.__cause__ or error}",
                        hint="the nodes' certificates are of one authority, [peers] ca_file") from error
    check_server(secured.certificate(), member)
    return secured


def check_server(certificate: Mapping[str, Any] | None, member: Member) -> None:
    """
    Whether what a server has shown names the member that we wanted to reach.

    Args:
        certificate: as SSLSocket.getpeercert() gives it; the chain is checked already.
        member: whom we wanted.

    Raises:
        PeerError: it does not.

    """
    host = member.address.rpartition(":")[0].strip("[]").lower()
    wanted = {("DNS", member.id.removesuffix(_MIRROR).lower()), ("DNS", member.id.lower()), _name(host)}
    shown = {_name(value.lower()) if kind == "IP Address" else (kind, value.lower())
             for kind, value in (certificate or {}).get("subjectAltName", ()) if kind in {"DNS", "IP Address"}}
    if not wanted & shown:
        raise PeerError(f"{member.address}: its certificate is not one of {member.id}",
                        hint="a subjectAltName of it must be peers.node of that node, or the host of its address")


def _name(host: str) -> tuple[str, str]:
    """A host as a subjectAltName: IPv6 addresses are written in several ways."""
    with suppress(ValueError):
        return "IP", str(ip_address(host))
    return "DNS", host


def _stamp(path: str) -> tuple[int, int, int]:
    """Zeros: it is not there."""
    try:
        found = Path(path).stat()
    except OSError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_size, found.st_ino
