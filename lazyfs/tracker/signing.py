"""
The keys that a tracker signs tokens with: in a directory, current and previous ones, rotated.

Layer: tracker. Who calls: tracker.issuing. Blocking; state: the keys as last read. The directory holds one PEM
file (PKCS #8, Ed25519, for its owner only) a key, in the order of their names; several trackers of one address share it
(a mounted secret). An operator rotates by adding a file with a later name and removing the oldest; the tracker does so
itself where it is told to (`rotate_s`). Without a directory there is one key, in memory, as long as the process lives.

Invariant: a key signs only when its file is PUBLISH_S old, so that all nodes know it by then (but for the very first
one), and its public half is handed out as long as the file is there.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from lazyfs.errors import ConfigError
from lazyfs.peers.tokens import KEY_COUNT_MAX, SigningKey

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_log: Final = logging.getLogger("lazyfs.tracker")
PUBLISH_S = 180.0                # nodes look for keys every 60 s
KEEP_S = 86_400.0                # a previous key: tokens last minutes, graces hours
LOOK_S = 5.0                     # whether the directory has changed
_FILE_BYTES_MAX = 16 * 1024


@dataclass(frozen=True, slots=True)
class _Kept:
    name: str
    made_at: float
    key: SigningKey


@dataclass(eq=False)
class SigningKeys:
    """
    The keys.

    Attributes:
        directory: None: in memory.
        rotate_s: a new key is made when the newest is that old; 0: never.
        now: seconds since the epoch.

    """

    directory: Path | None
    rotate_s: float = 0.0
    now: Callable[[], float] = time.time
    _kept: list[_Kept] = field(default_factory=list, repr=False)
    _looked_at: float = float("-inf")

    def load(self) -> None:
        """
        Read the directory for the first time; a key is made where there is none.

        Raises:
            ConfigError: it cannot be used, others may read it, or a file in it is no such key.

        """
        if self.directory is None:
            self._kept = [_Kept("", self.now(), SigningKey(Ed25519PrivateKey.generate()))]
            return
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not any(self.directory.glob("*.pem")):
                self._make()
        except OSError as error:
            raise ConfigError(f"tracker.keys_dir {self.directory}: {error.strerror}") from error
        self._kept = self._read()
        self._looked_at = time.monotonic()

    def current(self) -> SigningKey:
        """The one that signs now."""
        self._look()
        known = [one for one in self._kept if one.made_at <= self.now() - PUBLISH_S]
        return (known or self._kept[:1])[-1].key

    def publics(self) -> list[bytes]:
        """Raw public keys, for those that check."""
        self._look()
        return [one.key.public for one in self._kept]

    def _look(self) -> None:
        if self.directory is None or time.monotonic() - self._looked_at < LOOK_S:
            return
        self._looked_at = time.monotonic()
        try:
            self._kept = self._read()
            if self.rotate_s and self._kept[-1].made_at < self.now() - self.rotate_s:
                self._make()
                self._sweep()
                self._kept = self._read()
        except (ConfigError, OSError) as error:
            _log.warning("the tracker's keys stay as they were: %s", error)

    def _make(self) -> None:
        """A new key, whole and for its owner only before it has its name."""
        assert self.directory is not None
        pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        name = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self.now())) + f"-{secrets.token_hex(4)}"
        temporary = self.directory / f".{name}.new"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(pem)
                file.flush()
                os.fsync(file.fileno())
            os.utime(temporary, (self.now(), self.now()))
            temporary.rename(self.directory / f"{name}.pem")
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _log.info("a new key to sign tokens with: %s.pem", name)

    def _sweep(self) -> None:
        """What was replaced long ago goes. `_kept` is as before the new one was made."""
        assert self.directory is not None
        for one, successor in zip(self._kept, self._kept[1:], strict=False):
            if successor.made_at < self.now() - KEEP_S:
                (self.directory / one.name).unlink(missing_ok=True)
                _log.info("a key that signed tokens is gone: %s", one.name)

    def _read(self) -> list[_Kept]:
        """All of them, oldest first. Raises ConfigError."""
        assert self.directory is not None
        try:
            found = [_load(path) for path in sorted(self.directory.glob("*.pem"))]
        except OSError as error:
            raise ConfigError(f"tracker.keys_dir {self.directory}: {error.strerror}") from error
        if not 0 < len(found) <= KEY_COUNT_MAX:
            raise ConfigError(f"tracker.keys_dir {self.directory}: expected 1 to {KEY_COUNT_MAX} keys, "
                              f"found {len(found)}")
        return found


def _load(path: Path) -> _Kept:
    """Raises OSError, ConfigError (without a word of the content)."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        data = file.read(_FILE_BYTES_MAX)
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(f"tracker.keys_dir: {path} can be read by others than its owner", hint=f"chmod 600 {path}")
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"tracker.keys_dir: {path} is no Ed25519 key without a password",
                          hint="openssl genpkey -algorithm ED25519")
    return _Kept(path.name, status.st_mtime, SigningKey(key))
