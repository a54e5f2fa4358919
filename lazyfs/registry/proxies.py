"""
Which web proxy a request goes through: HTTP_PROXY, HTTPS_PROXY and NO_PROXY of this process's environment.

Layer: registry; used by transport.py. As curl and containerd understand them: small letters count before capitals;
NO_PROXY holds names (which stand for what is below them too), addresses, networks (10.0.0.0/8) and *. This machine's
own addresses are never asked through a proxy. Https goes through a tunnel (CONNECT), so a proxy sees neither
credentials nor data of the registry, and the registry nothing of the proxy's password.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self
from urllib.parse import unquote, urlsplit

from lazyfs.errors import DeadlineError, LazyfsError, SourceError, UsageError
from lazyfs.registry.addresses import is_loopback_host
from lazyfs.registry.options import Secret

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lazyfs.registry.addresses import Origin

_NAMES = {"http": "HTTP_PROXY", "https": "HTTPS_PROXY"}
_DEFAULT_PORT = 80
_HINT = "check HTTPS_PROXY, HTTP_PROXY and NO_PROXY where this was started (for the daemon: in its unit)"


@dataclass(frozen=True, slots=True)
class Proxy:
    """An http proxy. `authorization`: what to send as Proxy-Authorization; may be empty."""

    host: str
    port: int
    authorization: Secret

    @property
    def url(self) -> str:
        """Without a user name and password."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Proxy-Authorization": self.authorization.reveal()} if self.authorization else {}

    def refusal(self, where: str, cause: str, *, transient: bool) -> SourceError:
        return SourceError(f"{where}: the proxy {self.host}:{self.port}: {cause}", hint=_HINT, transient=transient)

    def demands_credentials(self, where: str) -> SourceError:
        return self.refusal(where, "it wants a user name and password, or others", transient=False)

    def explain(self, root: BaseException, where: str, deadline: float) -> LazyfsError:
        """The error that a connection to, or through, the proxy failed with; `root`: the lowest cause."""
        if isinstance(root, TimeoutError):
            if time.monotonic() >= deadline:
                return DeadlineError(f"{where}: the proxy {self.host}:{self.port} did not answer in time", hint=_HINT)
            return self.refusal(where, "no answer for too long", transient=True)
        if "Tunnel connection failed: 407" in str(root):   # http.client says it in no other way
            return self.demands_credentials(where)
        cause = (root.strerror or str(root)[:100]) if isinstance(root, OSError) else type(root).__name__
        return self.refusal(where, cause, transient=True)


class Proxies:
    """What an environment says. Immutable."""

    def __init__(self, by_scheme: Mapping[str, Proxy], exceptions: tuple[str, ...]) -> None:
        self._by_scheme = by_scheme
        self._exceptions = exceptions

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Raises UsageError: one of the variables is no address of an http proxy."""
        known = os.environ if environment is None else environment
        found = {}
        for scheme, name in _NAMES.items():
            text = known.get(name.lower()) or known.get(name)
            if text:
                found[scheme] = _parse(text, name)
        listed = known.get("no_proxy") or known.get("NO_PROXY") or ""
        return cls(found, tuple(word.strip().lower() for word in listed.split(",") if word.strip()))

    def find(self, origin: Origin) -> Proxy | None:
        """Whom to send a request to; None: to `origin` itself."""
        proxy = self._by_scheme.get(origin.scheme)
        if proxy is None or is_loopback_host(origin.host) or any(_is_meant(one, origin) for one in self._exceptions):
            return None
        return proxy


def _parse(text: str, name: str) -> Proxy:
    """`[http://][user:password@]host[:port]`; the text is never shown, for it may hold a password."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host, port = parts.hostname, parts.port or _DEFAULT_PORT
    except ValueError:
        host, port, parts = None, 0, urlsplit("")
    if parts.scheme != "http" or not host:
        raise UsageError(f"{name} is no address of an http proxy", hint="expected http://[USER:PASSWORD@]HOST[:PORT]")
    if parts.username is None:
        return Proxy(host, port, Secret(""))
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return Proxy(host, port, Secret("Basic " + base64.b64encode(pair.encode()).decode()))


def _is_meant(exception: str, origin: Origin) -> bool:
    """Whether an entry of NO_PROXY speaks of `origin`."""
    if exception == "*":
        return True
    try:
        return ipaddress.ip_address(origin.host) in ipaddress.ip_network(exception.strip("[]"), strict=False)
    except ValueError:
        pass   # one of them is a name, or has a port
    name, colon, port = exception.rpartition(":")
    if colon and port.isdigit() and not name.endswith(":"):
        if int(port) != origin.port:
            return False
        exception = name.strip("[]")
    bare = exception.removeprefix("*").removeprefix(".")
    return bool(bare) and (origin.host == bare or origin.host.endswith(f".{bare}"))
