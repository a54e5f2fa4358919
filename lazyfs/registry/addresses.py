"""
URLs and hosts: who is the same origin, how far an address reaches, and how a URL is shown without its secrets.

Layer: registry, no I/O. A query string may carry a signature (S3, GCS, Azure redirects) or a token, and a user part a
password: neither ever reaches a message.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from lazyfs.errors import SourceError

DEFAULT_PORTS = {"http": 80, "https": 443}
# Services of clouds that hand out credentials to whoever asks, at addresses that look like anybody's.
_METADATA = frozenset(map(ipaddress.ip_address, (
    "fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")))
# IPv6 networks whose addresses hold an IPv4 one, and how far from the right it stands (in bits): NAT64 (RFC 6052),
# 6to4 (RFC 3056), IPv4-compatible and -translated (RFC 4291, 2765).
_EMBEDDING = tuple((ipaddress.IPv6Network(text), bits) for text, bits in (
    ("64:ff9b::/96", 0), ("2002::/16", 80), ("::/96", 0), ("::ffff:0:0:0/96", 0)))
# Not in the standard library's list: site-local (RFC 3879), and NAT64 within a network (RFC 8215).
_CLOSED = tuple(map(ipaddress.IPv6Network, ("fec0::/10", "64:ff9b:1::/48")))
_BLANK = re.compile(r"[\x00-\x20\x7f]")  # neither spaces nor control characters: they would split a request


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host (lower case, without brackets) and port: credentials never leave it."""

    scheme: str
    host: str
    port: int

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def origin_of(url: str) -> Origin:
    """
    The origin of an absolute http(s) URL.

    Raises:
        SourceError: it is not one (a server sent it).

    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if parts.scheme not in DEFAULT_PORTS or not host or _BLANK.search(url):
        raise SourceError(f"the server named something that is not an http address: {printable(url)!r}",
                          transient=False)
    return Origin(parts.scheme, host.lower(), port or DEFAULT_PORTS[parts.scheme])


def resolve(base: str, location: str) -> str:
    """The absolute URL that `location`, out of a header, means at `base`. Raises SourceError."""
    try:
        return urljoin(base, location)
    except ValueError:
        raise SourceError(f"{printable(base)}: names a broken address: {printable(location)!r}",
                          transient=False) from None


def printable(url: str) -> str:
    """The URL for messages: no user part, no query, no fragment, bounded."""
    bare = url.split("?", 1)[0].split("#", 1)[0]
    scheme, separator, rest = bare.partition("://")
    if separator:
        netloc, slash, path = rest.partition("/")
        bare = scheme + separator + netloc.rpartition("@")[2] + slash + path
    return bare[:300]


def is_loopback_host(host: str) -> bool:
    """localhost, 127.0.0.0/8 or ::1, by name alone (nothing is resolved)."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Reach(enum.IntEnum):
    """
    Who can have an address, from everybody to this machine alone.

    MACHINE: this machine, its link (metadata services of clouds sit at 169.254.169.254), nobody, everybody at once.
    """

    PUBLIC = 0
    PRIVATE = 1
    MACHINE = 2


def reach_of(address: str) -> Reach:
    """How far a resolved address reaches. Of names, only localhost is known; others count as public."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return Reach.MACHINE if is_loopback_host(address) else Reach.PUBLIC
    ip = _embedded(ip)
    if ip in _METADATA or ip.is_loopback or ip.is_link_local or ip.is_unspecified or ip.is_multicast:
        return Reach.MACHINE
    return Reach.PUBLIC if ip.is_global and not any(ip in network for network in _CLOSED) else Reach.PRIVATE


def _embedded(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The IPv4 address that a router, or the kernel, makes of an IPv6 one; else the same."""
    if isinstance(ip, ipaddress.IPv4Address) or ip.is_loopback or ip.is_unspecified:
        return ip
    if ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    for network, shift in _EMBEDDING:
        if ip in network:
            return ipaddress.IPv4Address(int(ip) >> shift & 0xFFFFFFFF)
    return ip
