"""
Credentials that somebody handed to this process: those that kubelet pulls with, seen by the snapshotter's proxy.

Layer: registry. Who calls: node.control puts them (the control operation `credentials`), keychain.py asks. Kept in
memory only, bounded, by host and repository, the newest counts; forgotten when nobody used them for as long as they
were given. A daemon's worker that has just begun waits a moment for them (`expect`) where a registry demands
credentials: the snapshotter hands them over again as soon as it sees that the worker is another one.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lazyfs.errors import UsageError
from lazyfs.registry.credentials import Credentials
from lazyfs.registry.options import Secret

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

COUNT_MAX = 4096             # images of one node, many times over
_TEXT_CHARS_MAX = 64 * 1024
LIFETIME_S = 12 * 3600.0     # if the giver does not say; clouds' registry tokens live that long
_LIFETIME_MAX_S = 30 * 24 * 3600.0


@dataclass(slots=True)
class _Held:
    credentials: Credentials
    lifetime_s: float
    used_at: float           # time.monotonic(): last used, or given


class PushedCredentials:
    """See the module. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._held: dict[tuple[str, str], _Held] = {}   # oldest first
        self._used: set[tuple[str, str]] = set()
        self._expected_until = 0.0

    def expect(self, seconds: float) -> None:
        """Somebody will hand credentials over, perhaps none, in so many seconds: find() waits for that."""
        with self._lock:
            self._expected_until = time.monotonic() + seconds

    def put(self, entries: Sequence[Mapping[str, Any]], *, more: bool = False) -> None:
        """
        Take over `{host, repository, username, password | identity_token, lifetime_s}` each, the newest last.

        `more`: the rest follows, so who waits goes on waiting if it is not among these.

        Raises:
            UsageError: one of them is malformed; nothing has changed then, and nothing of it is shown.

        """
        checked = [_checked(entry) for entry in entries]
        with self._lock:
            for key, held in checked:
                self._held.pop(key, None)
                self._held[key] = held
            self._forget()
            if not more:
                self._expected_until = 0.0
            self._lock.notify_all()

    def find(self, host: str, repository: str, refused: Collection[Credentials] = ()) -> Credentials | None:
        """What was handed over for just this repository, if it is not in `refused`; it counts as used then."""
        key = (host, repository)
        with self._lock:
            while True:
                self._forget()
                held = self._held.get(key)
                if held is not None and held.credentials not in refused:
                    held.used_at = time.monotonic()
                    self._used.add(key)
                    return held.credentials
                left_s = self._expected_until - time.monotonic()
                if left_s <= 0:
                    return None
                self._lock.wait(left_s)

    def take_used(self) -> list[list[str]]:
        """[host, repository] of those used since the last call: the giver keeps them alive."""
        with self._lock:
            used, self._used = self._used, set()
            return [list(key) for key in sorted(used)]

    def __len__(self) -> int:
        with self._lock:
            self._forget()
            return len(self._held)

    def _forget(self) -> None:
        now = time.monotonic()
        for key in [key for key, held in self._held.items() if held.used_at + held.lifetime_s < now]:
            del self._held[key]
        while len(self._held) > COUNT_MAX:
            del self._held[next(iter(self._held))]


def _checked(entry: Mapping[str, Any]) -> tuple[tuple[str, str], _Held]:
    try:
        texts = [entry.get(name, "") for name in ("host", "repository", "username", "password", "identity_token")]
        lifetime_s = float(entry.get("lifetime_s", LIFETIME_S))
    except (AttributeError, TypeError, ValueError):
        raise UsageError("malformed credentials") from None
    if not all(isinstance(text, str) and len(text) <= _TEXT_CHARS_MAX for text in texts) or not texts[0]:
        raise UsageError("malformed credentials: expected texts")
    if not 0 < lifetime_s <= _LIFETIME_MAX_S or not (texts[2] or texts[4]):
        raise UsageError("malformed credentials: no name and no token, or a lifetime that is none")
    host, repository, username, password, token = texts
    credentials = Credentials(username, Secret(password), Secret(token))
    return (host, repository), _Held(credentials, lifetime_s, time.monotonic())


PUSHED: Final = PushedCredentials()
