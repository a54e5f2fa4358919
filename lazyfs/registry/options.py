"""
What a user may say about registries: credentials, trust, time limits.

Layer: registry. Who calls: cli makes it, or fields.py out of the configuration; everything in lazyfs.registry reads
it. Immutable, and safe to print: a password only comes out of `Secret.reveal()`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Self, final

import lazyfs
from lazyfs import limits
from lazyfs.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_VERSION: Final = getattr(lazyfs, "__version__", "0")


@final
class Secret:
    """A string that does not show up in repr(), str(), f-strings, tracebacks or pickles."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The string itself. Only for what goes to its rightful receiver."""
        return self._text

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(("Secret", self._text))

    def __bool__(self) -> bool:
        return bool(self._text)

    def __reduce__(self) -> str:
        raise TypeError("a secret is not to be pickled")


@dataclass(frozen=True, slots=True)
class HostSettings:
    """
    One registry's own settings: [registry.host."NAME"] of the configuration.

    `password_file` holds the password, or with no `username` nothing; read when it is needed, so it may be replaced.
    """

    username: str = ""
    password_file: Path | None = None
    insecure: bool = False
    allow_private: bool = False
    ca_file: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None


@dataclass(frozen=True, slots=True)
class RegistryOptions:
    """
    How to speak to registries. Without username, credentials come from the sources of keychain.py.

    `insecure` allows plain http and certificates that nobody vouches for. `allow_private`: a registry outside may send
    us to private addresses (endpoint.py). `ca_file` (PEM) is trusted besides the
    system's authorities. `client_cert` (PEM) is shown to registries that ask for one; its key is in `client_key` or in
    the same file. `auth_file` None: $REGISTRY_AUTH_FILE, $DOCKER_CONFIG/config.json or ~/.docker/config.json.
    `hosts_dir`: containerd's hosts.toml files (hosts.py), None: none. `provider_config`, `provider_bin_dir`: kubelet's
    credential-provider plugins (kubelet.py). `hosts`: settings by host[:port]. `origin`: scheme://host:port of one
    registry, as a process just before this one has found it; where plain http is allowed, it need not be found again.
    `shown`: what to show as Authorization, somebody else's proof, and nothing besides it; empty: be anonymous.
    """

    username: str | None = None
    password: Secret | str | None = None
    insecure: bool = False
    allow_private: bool = False
    ca_file: Path | None = None
    auth_file: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None
    hosts_dir: Path | None = None
    provider_config: Path | None = None
    provider_bin_dir: Path | None = None
    hosts: Mapping[str, HostSettings] = field(default_factory=dict)
    user_agent: str = f"lazyfs/{_VERSION}"
    connect_timeout_s: float = limits.CONNECT_TIMEOUT_S
    io_timeout_s: float = limits.IO_TIMEOUT_S
    request_deadline_s: float = limits.REQUEST_DEADLINE_S
    retry_count: int = limits.RETRY_COUNT_MAX
    origin: str = ""
    shown: Secret | None = None

    def __post_init__(self) -> None:
        """A bare string is wrapped at once, so that repr() of the options never shows it."""
        if isinstance(self.password, str):
            object.__setattr__(self, "password", Secret(self.password))
        if self.username and ":" in self.username:
            raise UsageError("a user name holds no colon (RFC 7617)", hint="check --username")
        if self.client_key is not None and self.client_cert is None:
            raise UsageError("a client key was given, but no certificate", hint="add --client-cert")

    def for_host(self, host: str) -> Self:
        """These options with what `hosts` says about one registry."""
        own = self.hosts.get(host)
        if own is None:
            return self
        certificate = (own.client_cert, own.client_key) if own.client_cert else (self.client_cert, self.client_key)
        return replace(self, insecure=self.insecure or own.insecure,
                       allow_private=self.allow_private or own.allow_private, ca_file=own.ca_file or self.ca_file,
                       client_cert=certificate[0], client_key=certificate[1])
