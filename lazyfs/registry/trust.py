"""
Whom a TLS connection believes, and what it shows of itself.

Layer: registry. Who calls: transport.py, hostclient.py. One Trust a server: what its hosts.toml names is for it alone.
State: the contexts made lately.
"""

from __future__ import annotations

import ssl
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, Self

from lazyfs.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from lazyfs.registry.hoststoml import HostEntry
    from lazyfs.registry.options import RegistryOptions

# A context holds the system's authorities, half a megabyte of them: not one for each image and mirror.
_CONTEXT_COUNT_MAX = 32
_lock = threading.Lock()
_contexts: dict[tuple[Trust, tuple[tuple[int, int], ...]], ssl.SSLContext] = {}   # least recently used first


@dataclass(frozen=True, slots=True)
class Trust:
    """`insecure`: believe anybody. `client_pairs`: certificate and key, None: in the same file."""

    insecure: bool = False
    ca_files: tuple[Path, ...] = ()
    client_pairs: tuple[tuple[Path, Path | None], ...] = ()

    @classmethod
    def of(cls, options: RegistryOptions, entry: HostEntry | None = None) -> Self:
        """What the options and a hosts.toml's entry say together."""
        authorities = () if options.ca_file is None else (options.ca_file,)
        pairs = () if options.client_cert is None else ((options.client_cert, options.client_key),)
        if entry is None:
            return cls(options.insecure, authorities, pairs)
        return cls(options.insecure or entry.skip_verify, authorities + entry.ca_files, pairs + entry.client_pairs)


def tls_context(trust: Trust) -> ssl.SSLContext:
    """
    The context for connections with that trust; shared by all that have it, and made anew when a file has changed.

    Raises:
        UsageError: a file cannot be read, or holds something else.

    """
    files = (*trust.ca_files, *(path for pair in trust.client_pairs for path in pair if path is not None))
    key = (trust, tuple(map(_stamp, files)))
    with _lock:
        context = _contexts.pop(key, None) or _make(trust)
        _contexts[key] = context
        while len(_contexts) > _CONTEXT_COUNT_MAX:
            del _contexts[next(iter(_contexts))]
    return context


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_ino)


def _make(trust: Trust) -> ssl.SSLContext:
    # Loading the system's authorities takes 40 ms: not where nothing is checked.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if trust.insecure else ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for path in trust.ca_files:
        try:
            context.load_verify_locations(cafile=path)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(f"{path}: not readable as PEM certificates ({_cause(error)})",
                             hint="it must hold the authority's certificate, -----BEGIN CERTIFICATE-----") from error
    for certificate, key in trust.client_pairs:
        try:
            # a password callback: OpenSSL would ask on the terminal
            context.load_cert_chain(certificate, key, password=_no_password)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(f"{certificate}: not usable as a client certificate with its key ({_cause(error)})",
                             hint="both in PEM, the key without a password, and belonging together") from error
    if trust.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _no_password() -> NoReturn:
    raise ssl.SSLError("the key is encrypted")


def _cause(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return str(error.reason or "no such PEM content, or an encrypted key").replace("_", " ").lower()
    return error.strerror or type(error).__name__
