"""
Which address a registry's name stands for: host, scheme, Docker Hub's detour.

Layer: registry; used by client.py. Https unless plain http is allowed: by --insecure, or because the host is this
machine (docker's rule). Where it is allowed the registry is asked once which of both it speaks, without credentials.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from lazyfs.errors import SourceError
from lazyfs.registry.addresses import Origin, Reach, is_loopback_host, origin_of
from lazyfs.registry.transport import Call, is_untrusted

if TYPE_CHECKING:
    from lazyfs.registry.options import RegistryOptions
    from lazyfs.registry.transport import Transport

DOCKER_HUB, DOCKER_HUB_API = "docker.io", "registry-1.docker.io"
_PROBE_S = 5.0  # a server of the other protocol may wait for more bytes instead of answering


class Endpoint:
    """One registry's base address; found at the first use unless `origin` says it, then fixed. Thread-safe."""

    def __init__(self, host: str, options: RegistryOptions, transport: Transport, origin: Origin | None = None) -> None:
        self.host = host
        self._netloc = DOCKER_HUB_API if host == DOCKER_HUB else host
        self._transport = transport
        self.is_local = is_loopback_host((origin or origin_of(f"https://{self._netloc}")).host)
        allows_plain = options.insecure or self.is_local
        told = origin_of(options.origin) if options.origin and allows_plain else None
        if told is not None and told.netloc != origin_of(f"{told.scheme}://{self._netloc}").netloc:
            told = None                # of another registry
        self._origin = origin or told or (None if allows_plain else origin_of(f"https://{self._netloc}"))
        self._lock = threading.Lock()
        self._allows_private = options.allow_private
        self.reach = Reach.PUBLIC         # of the address that gave its last answer

    def origin(self, deadline: float) -> Origin:
        """Raises SourceError if the registry does not answer at all."""
        if self._origin is None:
            if not self._lock.acquire(timeout=max(deadline - time.monotonic(), 0)):
                raise SourceError(f"{self.host}: not reached in time")
            try:
                if self._origin is None:
                    self._origin = self._probe(deadline)
            finally:
                self._lock.release()
        return self._origin

    @property
    def known(self) -> str:
        """scheme://host:port, or "" as long as it has not been found."""
        return "" if self._origin is None else f"{self._origin.scheme}://{self._origin.netloc}"

    def may_send_to(self, target: Origin) -> Reach:
        """
        The most private address that it may send us to (redirects, token realms): none more private than its own.

        To this machine and its link only a registry that is called so may send us, or one to another port of its own
        host. [registry] allow_private says that it may send us to private addresses whatever its own is.
        """
        if self.is_local or target == self._origin:
            return Reach.MACHINE
        if self._origin is not None and target.host == self._origin.host:
            return max(self.reach, Reach.PRIVATE) if self._allows_private else self.reach
        return Reach.PRIVATE if self._allows_private else min(self.reach, Reach.PRIVATE)

    def base(self, deadline: float) -> str:
        origin = self.origin(deadline)
        return f"{origin.scheme}://{origin.netloc}"

    def _probe(self, deadline: float) -> Origin:
        """Http first on this machine, where nobody can listen in; https first elsewhere."""
        errors = {}
        for scheme in ("http", "https") if self.is_local else ("https", "http"):
            url = f"{scheme}://{self._netloc}/v2/"
            try:
                with self._transport.send(Call("GET", url), min(deadline, time.monotonic() + _PROBE_S)) as answer:
                    # Go and nginx answer 400 to http on a TLS port; others redirect.
                    if scheme == "https" or not (answer.status == 400 or 300 <= answer.status < 400):
                        self.reach = answer.reach
                        answer.finish()
                        return origin_of(url)
            except SourceError as error:
                errors[scheme] = error
        # A certificate that is not trusted shows that it speaks TLS; anything else may be plain http, out of order.
        raise errors["https"] if is_untrusted(errors["https"]) else errors.get("http", errors["https"])
