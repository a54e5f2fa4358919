"""
The registries behind the mirror: a client for each repository, with this node's credentials; who is down is left alone.

Layer: mirror. Who calls: mirror.manifests, mirror.access, mirror.blobs, mirror.lists, in threads; all blocking, each
with an absolute deadline (time.monotonic()). State: clients, least recently used first; which registries did not
answer just now. The mirror never asks itself: hosts.toml's entry for it is passed over (registry.hosts), and what
comes with our own User-Agent is refused (mirror.pulling), so that two mirrors cannot ask each other in a circle.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import lazyfs
from lazyfs.errors import AuthError, FormatError, LazyfsError, NotFoundError, RateLimitedError, SourceError
from lazyfs.image.digest import Digest
from lazyfs.registry.client import RegistryClient
from lazyfs.registry.options import HostSettings
from lazyfs.registry.streams import RangeStream, read_exactly

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lazyfs.registry.options import RegistryOptions
    from lazyfs.registry.place import ByteStream, Document
    from lazyfs.registry.reference import RegistryReference

USER_AGENT: Final = f"lazyfs-mirror/{getattr(lazyfs, '__version__', '0')}"
_CLIENT_COUNT_MAX: Final = 64       # repositories; each may keep some connections
_CONNECT_S: Final = 3.0             # a client that asks us will not wait longer, and can ask the registry itself
_DOWN_S: Final = 5.0                # so long a registry that was not reached is not asked for small things
_SMALL_S: Final = 10.0              # a manifest, a HEAD, a list: from the first byte sent to the last received


class Upstream:
    """See the module. Thread-safe. Every method raises NotFoundError, AuthError, SourceError or FormatError."""

    def __init__(self, options: RegistryOptions) -> None:
        self._options = replace(options, user_agent=USER_AGENT, connect_timeout_s=min(_CONNECT_S,
                                                                                     options.connect_timeout_s))
        self._lock = threading.Lock()
        self._clients: OrderedDict[str, RegistryClient] = OrderedDict()
        self._down: dict[str, tuple[float, str]] = {}

    def close(self) -> None:
        with self._lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()

    def client(self, reference: RegistryReference) -> RegistryClient:
        place = reference.identity
        with self._lock:
            found = self._clients.get(place)
            if found is None:
                found = self._clients[place] = RegistryClient(reference.host, reference.repository, self._options)
                while len(self._clients) > _CLIENT_COUNT_MAX:
                    self._clients.popitem(last=False)[1].close()   # answers of it that are being read stay open
            self._clients.move_to_end(place)
        return found

    def is_down(self, reference: RegistryReference) -> bool:
        """Whether its registry did not answer when it was asked last."""
        with self._lock:
            return reference.host in self._down

    def _answered(self, reference: RegistryReference) -> None:
        with self._lock:
            self._down.pop(reference.host, None)

    @contextlib.contextmanager
    def small(self, reference: RegistryReference) -> Iterator[tuple[RegistryClient, float]]:
        """A client, and the deadline of a small request; at once SourceError where the registry is known to be down."""
        with self._lock:
            until, why = self._down.get(reference.host, (0.0, ""))
        if until > time.monotonic():
            raise SourceError(f"{reference.host}: not asked, it did not answer just now: {why}")
        try:
            yield self.client(reference), time.monotonic() + _SMALL_S
            self._answered(reference)
        except (NotFoundError, AuthError, RateLimitedError):
            self._answered(reference)
            raise
        except SourceError as error:
            if error.transient:
                with self._lock:
                    self._down.pop(reference.host, None)
                    self._down[reference.host] = time.monotonic() + _DOWN_S, str(error)
                    while len(self._down) > _CLIENT_COUNT_MAX:
                        del self._down[next(iter(self._down))]
            raise

    # --- what is asked --------------------------------------------------------------------------------------------

    def resolve(self, reference: RegistryReference) -> Digest | None:
        """What a tag names just now; None: the registry does not say so without sending the manifest."""
        with self.small(reference) as (client, deadline):
            header = client.head(f"manifests/{reference.tag}", deadline, resolves=True)
        try:
            return Digest(header.get("Docker-Content-Digest", ""))
        except FormatError:
            return None

    def has_manifest(self, reference: RegistryReference, digest: Digest) -> None:
        """Raises NotFoundError or AuthError: it has it not, or not for us."""
        with self.small(reference) as (client, deadline):
            client.head(f"manifests/{digest}", deadline)

    def manifest(self, reference: RegistryReference, digest: Digest | None) -> Document:
        """By digest, or (None) what the reference's tag names; its digest is checked."""
        with self.small(reference) as (client, deadline):
            return client.manifest(str(digest) if digest else reference.tag, digest, deadline)

    def blob_size(self, reference: RegistryReference, digest: Digest) -> int:
        """In bytes, as the registry says."""
        with self.small(reference) as (client, deadline):
            header = client.head(f"blobs/{digest}", deadline)
        text = header.get("Content-Length", "")
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise SourceError(f"blob {digest.short} of {reference.identity}: the registry does not say its size")
        return int(text)

    def sample(self, reference: RegistryReference, digest: Digest, offset: int, size: int) -> bytes:
        """Some bytes of a blob: who has them has the blob, and lets us have it."""
        with self.small(reference) as (client, deadline), RangeStream(
                client.blob(digest, offset, size, deadline), size) as stream:
            return read_exactly(stream, size)

    def read_range(self, reference: RegistryReference, digest: Digest, offset: int, size: int,
                   deadline: float) -> ByteStream:
        """Bytes [offset, offset + size) of a blob, as they come; nothing is tried again."""
        stream = RangeStream(self.client(reference).blob(digest, offset, size, deadline), size)
        self._answered(reference)
        return stream


def anonymous(options: RegistryOptions, directory: Path) -> RegistryOptions:
    """
    The same without any credentials; TLS client certificates are some, too.

    Raises:
        LazyfsError: an empty file of credentials cannot be written to `directory`.

    """
    nothing = directory / "no-credentials.json"
    try:
        nothing.write_text("{}", encoding="utf-8")
    except OSError as error:
        raise LazyfsError(f"{nothing}: {error.strerror}", hint="mirror.dir must be a local disk") from error
    hosts = {name: HostSettings(insecure=one.insecure, allow_private=one.allow_private, ca_file=one.ca_file)
             for name, one in options.hosts.items()}
    return replace(options, username=None, password=None, auth_file=nothing, provider_config=None, client_cert=None,
                   client_key=None, hosts=hosts)
