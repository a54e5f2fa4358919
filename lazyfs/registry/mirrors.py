"""
Which servers have lately failed, and are left alone for a while.

Layer: registry; used by client.py. One memory for the process: fifty mounts do not find out one after the other that a
mirror is down. Bounded. A server that gave wrong bytes is not asked at all meanwhile; one that failed is asked after
all the others, for where nothing else answers it is better than nothing. "Not found" is no failure.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lazyfs.errors import AuthError, FormatError, IntegrityError, LazyfsError, NotFoundError, RateLimitedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazyfs.registry.hostclient import HostClient

PAUSE_FIRST_S, PAUSE_MAX_S = 10.0, 300.0   # doubles while it goes on failing
LIAR_S = 600.0                             # wrong bytes are no accident of the network
_SERVER_COUNT_MAX = 1024
_log: Final = logging.getLogger("lazyfs.registry")


@dataclass(slots=True)
class _Pause:
    until: float
    length_s: float
    is_liar: bool


class Health:
    """See the module. Thread-safe. Keys: a server; with a repository where that alone was refused."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pauses: dict[str, _Pause] = {}

    def in_order(self, servers: Sequence[HostClient]) -> list[HostClient]:
        """Those to ask, in which order. The registry itself stays in, whatever it did."""
        now = time.monotonic()
        with self._lock:
            pauses = [self._worst(one, now) for one in servers]
        found = [(pause is not None, place, one) for place, (one, pause) in enumerate(zip(servers, pauses, strict=True))
                 if pause is None or not pause.is_liar or one.is_last]
        return [one for _, _, one in sorted(found, key=lambda each: each[:2])] or list(servers)

    def _worst(self, server: HostClient, now: float) -> _Pause | None:
        for key in (server.key, f"{server.key} {server.repository}"):
            pause = self._pauses.get(key)
            if pause is not None and pause.until > now:
                return pause
        return None

    def blame(self, server: HostClient, error: LazyfsError) -> bool:
        """Remember a failure. True: it was a mirror's, so there is somebody else to ask."""
        if isinstance(error, NotFoundError):
            return not server.is_last
        key = f"{server.key} {server.repository}" if isinstance(error, AuthError) else server.key
        is_liar = isinstance(error, IntegrityError | FormatError)
        now = time.monotonic()
        with self._lock:
            known = self._pauses.pop(key, None)
            if known is not None and known.until > now and known.is_liar >= is_liar:
                self._pauses[key] = known   # several threads met the same failure
                return not server.is_last
            length_s = PAUSE_FIRST_S
            if known is not None and known.until + PAUSE_MAX_S > now:
                length_s = min(2 * known.length_s, PAUSE_MAX_S)
            if is_liar:
                length_s = LIAR_S
            elif isinstance(error, RateLimitedError) and error.retry_after_s is not None:
                length_s = min(max(error.retry_after_s, 1.0), PAUSE_MAX_S)
            self._pauses[key] = _Pause(now + length_s, length_s, is_liar)
            while len(self._pauses) > _SERVER_COUNT_MAX:
                del self._pauses[next(iter(self._pauses))]
        if not server.is_last:
            _log.warning("mirror %s is left alone for %.0f s: %s", server.key, length_s, str(error))
        return not server.is_last


HEALTH: Final = Health()
