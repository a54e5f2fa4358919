"""
URLs and hosts: who is the same origin, who is this machine, and how a URL is shown without its secrets.

Layer: registry, no I/O. A query string may carry a signature (S3, GCS, Azure redirects) or a token, and a user part a
password: neither ever reaches a message.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from lazyfs.errors import SourceError

DEFAULT_PORTS = {"http": 80, "https": 443}
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


def is_private_to_machine(address: str) -> bool:
    """
    Addresses that a registry elsewhere has no business to send us to: this machine itself, its link (cloud
    metadata services sit at 169.254.169.254), nobody, everybody. Of names, localhost alone.
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return is_loopback_host(address)   # a name
    mapped = getattr(ip, "ipv4_mapped", None)
    ip = mapped or ip
    return ip.is_loopback or ip.is_link_local or ip.is_unspecified or ip.is_multicast
