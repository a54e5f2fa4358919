"""
The credentials of the latest pulls, in memory only: by registry and repository, bounded, forgotten when unused.

Layer: snapshotter.credentials. Who calls: criproxy notes, feeder hands over. No secret is ever shown: repr, messages
and logs hold hosts and repositories only. Thread-safe.
"""

from __future__ import annotations

import base64
import binascii
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lazyfs.errors import UsageError
from lazyfs.registry.options import Secret
from lazyfs.registry.reference import RegistryReference, parse_reference

if TYPE_CHECKING:
    from collections.abc import Iterable

COUNT_MAX = 4096                 # as lazyfs.registry.pushed
LIFETIME_S = 12 * 3600.0         # unused for so long: forgotten; clouds' registry tokens live as long
_TEXT_CHARS_MAX = 64 * 1024
_DOCKER_HUB_HOSTS = {"docker.io", "index.docker.io", "registry-1.docker.io"}


@dataclass(frozen=True, slots=True)
class Pulled:
    """What one pull was made with. `number` grows with each: the newest counts."""

    host: str
    repository: str
    username: str = field(repr=False)
    password: Secret
    identity_token: Secret
    number: int = 0

    def to_json(self, lifetime_s: float) -> dict[str, Any]:
        """As the control operation `credentials` wants it. Holds the secret."""
        return {"host": self.host, "repository": self.repository, "username": self.username,
                "password": self.password.reveal(), "identity_token": self.identity_token.reveal(),
                "lifetime_s": lifetime_s}


class PulledCredentials:
    """See the module."""

    def __init__(self, lifetime_s: float = LIFETIME_S) -> None:
        self._lock = threading.Lock()
        self._held: dict[tuple[str, str], tuple[Pulled, float]] = {}   # oldest first; with the time of the last use
        self._count = 0
        self.lifetime_s = lifetime_s

    def note(self, pulled: Pulled) -> None:
        """The newest of its image counts."""
        key = (pulled.host, pulled.repository)
        with self._lock:
            self._count += 1
            numbered = Pulled(pulled.host, pulled.repository, pulled.username, pulled.password, pulled.identity_token,
                              self._count)
            self._held.pop(key, None)
            self._held[key] = (numbered, time.monotonic())
            while len(self._held) > COUNT_MAX:
                del self._held[next(iter(self._held))]

    def used(self, keys: Iterable[tuple[str, str]]) -> None:
        """The daemon has used these: they live on."""
        with self._lock:
            for key in keys:
                if key in self._held:
                    self._held[key] = (self._held[key][0], time.monotonic())

    def after(self, number: int) -> list[Pulled]:
        """All that were noted after the one with this number (0: all), the newest last."""
        now = time.monotonic()
        with self._lock:
            for key in [key for key, (_, used_at) in self._held.items() if used_at + self.lifetime_s < now]:
                del self._held[key]
            return [one for one, _ in self._held.values() if one.number > number]


def pulled_of(image: str, auth: Any) -> Pulled | None:
    """
    What a PullImage with an AuthConfig tells; None: nothing that could be used.

    Args:
        image: the reference, as kubelet sends it.
        auth: username, password, auth, server_address, identity_token, as texts.

    """
    username, password = auth.username, auth.password
    if auth.auth and not username:
        try:
            username, _, password = base64.b64decode(auth.auth, validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            return None
        password = password.rstrip("\0")
    if not (username or auth.identity_token) or max(map(len, (username, password, auth.identity_token))) > (
            _TEXT_CHARS_MAX):
        return None
    try:
        reference = parse_reference(image)
    except UsageError:
        return None
    if not isinstance(reference, RegistryReference) or not _is_for(auth.server_address, reference.host):
        return None
    return Pulled(reference.host, reference.repository, username, Secret(password), Secret(auth.identity_token))


def _is_for(server_address: str, host: str) -> bool:
    """Whether credentials for this address are the registry's; containerd compares them too. Empty: any."""
    if not server_address:
        return True
    try:
        netloc = urlsplit(server_address if "://" in server_address else f"https://{server_address}").netloc
    except ValueError:
        return False
    return netloc == host or (host == "docker.io" and netloc in _DOCKER_HUB_HOSTS)
