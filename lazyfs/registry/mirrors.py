"""
What is known of servers: who has lately failed and is left alone for a while, how soon each answers, since when.

Layer: registry; used by client.py and hedge.py, and by the worker's status. One memory for the process: fifty mounts
do not find out one after the other that a mirror is down. Bounded. A server that gave wrong bytes is not asked at all
meanwhile; one that failed is asked after all the others, for where nothing else answers it is better than nothing; when
its time is over one request tries it, the others go on without it until that one has an answer. "Not found" is no
failure.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from lazyfs.errors import AuthError, FormatError, IntegrityError, LazyfsError, NotFoundError, RateLimitedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazyfs.registry.hostclient import HostClient

PAUSE_FIRST_S, PAUSE_MAX_S = 10.0, 300.0   # doubles while it goes on failing
LIAR_S = 600.0                             # wrong bytes are no accident of the network
PROBE_S = 15.0                             # so long one request may try whether a server is well again
_SERVER_COUNT_MAX = 1024
_DELAY_COUNT = 64                          # of the last answers; the 95th percentile needs some
_DELAY_COUNT_MIN = 8
_LATE_SHARE = 0.95
# Of the requests to a server so many may be asked of another one as well: a slow registry must not get twice the load.
HEDGE_SHARE, HEDGE_STOCK_FIRST, HEDGE_STOCK_MAX = 0.05, 3.0, 5.0
HEDGE_FIRST_S = 1.0                        # while nothing is known of how soon it answers
HEDGE_S_MIN, HEDGE_S_MAX = 0.02, 5.0
BEATEN_COUNT_MAX = 3                       # overtaken by another server so often in a row: left alone; new ones at once
_log: Final = logging.getLogger("lazyfs.registry")


@dataclass(slots=True)
class _Pause:
    """`is_over`: it has answered since; kept, for who fails again soon is left alone for longer."""

    until: float
    length_s: float
    is_liar: bool
    probed_until: float = 0.0
    is_over: bool = False


@dataclass(slots=True)
class _Server:
    """Times of day are for people: time.time(). `stock`: requests that may be asked of another server as well."""

    request_count: int = 0
    failure_count: int = 0
    hedge_count: int = 0
    beaten_count: int = 0      # in a row
    why: str = ""
    since: float | None = None
    last_ok: float | None = None
    stock: float = HEDGE_STOCK_FIRST
    delays_s: deque[float] = field(default_factory=lambda: deque(maxlen=_DELAY_COUNT))


class Health:
    """See the module. Thread-safe. Keys: a server; with a repository where that alone was refused."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pauses: dict[str, _Pause] = {}
        self._servers: dict[str, _Server] = {}

    def in_order(self, servers: Sequence[HostClient]) -> list[HostClient]:
        """Those to ask, in which order. The registry itself stays in, whatever it did."""
        now = time.monotonic()
        with self._lock:
            pauses = [self._worst(one, now) for one in servers]
            found = [(pause is not None, place, one)
                     for place, (one, pause) in enumerate(zip(servers, pauses, strict=True))
                     if pause is None or not pause.is_liar or one.is_last]
            order = [one for _, _, one in sorted(found, key=lambda each: each[:2])] or list(servers)
            if order:
                self._try_again(order[0], now)
        return order

    def _worst(self, server: HostClient, now: float) -> _Pause | None:
        """The pause that keeps a server from being asked before others."""
        known = (self._pauses.get(key) for key in _keys(server))
        return next((one for one in known if one is not None and max(one.until, one.probed_until) > now), None)

    def _try_again(self, server: HostClient, now: float) -> None:
        """The first request after a pause tries it; the others wait for what that one finds out."""
        for key in _keys(server):
            pause = self._pauses.get(key)
            if pause is not None and not pause.is_over and pause.until <= now:
                pause.probed_until = now + PROBE_S

    def is_well(self, server: HostClient) -> bool:
        """Whether it is not left alone, nor being tried just now."""
        with self._lock:
            return self._worst(server, time.monotonic()) is None

    def blame(self, server: HostClient, error: LazyfsError) -> bool:
        """Remember a failure. True: it was a mirror's, so there is somebody else to ask."""
        if isinstance(error, NotFoundError):
            return not server.is_last
        key = f"{server.key} {server.repository}" if isinstance(error, AuthError) else server.key
        is_liar = isinstance(error, IntegrityError | FormatError)
        now = time.monotonic()
        with self._lock:
            self._note_failure(server.key, str(error))
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
            _bound(self._pauses)
        if not server.is_last:
            _log.warning("mirror %s is left alone for %.0f s: %s", server.key, length_s, str(error))
        return not server.is_last

    def praise(self, server: HostClient, delay_s: float) -> None:
        """It has answered as it should, `delay_s` after it was asked: what it did wrong before is over."""
        now = time.monotonic()
        with self._lock:
            known = self._server(server.key)
            known.request_count += 1
            known.beaten_count = 0
            known.stock = min(known.stock + HEDGE_SHARE, HEDGE_STOCK_MAX)
            known.delays_s.append(delay_s)
            known.last_ok = time.time()
            known.why, known.since = "", None
            for key in _keys(server):
                pause = self._pauses.get(key)
                if pause is not None:
                    pause.until, pause.probed_until, pause.is_over = min(pause.until, now), 0.0, True

    def beaten(self, server: HostClient, after_s: float) -> bool:
        """Another one, asked later, was sooner. True: that happens again and again, and it is left alone now."""
        with self._lock:
            known = self._server(server.key)
            known.beaten_count += 1
            is_new = len(known.delays_s) < _DELAY_COUNT_MIN
            known.delays_s.append(after_s)    # at least
            return is_new or known.beaten_count >= BEATEN_COUNT_MAX

    def hedge_after_s(self, server: HostClient) -> float:
        """So late nearly all its answers are here: who has waited longer may ask another server."""
        with self._lock:
            delays = sorted(self._server(server.key).delays_s)
        if len(delays) < _DELAY_COUNT_MIN:
            return HEDGE_FIRST_S
        return min(max(delays[int(_LATE_SHARE * (len(delays) - 1))], HEDGE_S_MIN), HEDGE_S_MAX)

    def may_hedge(self, server: HostClient) -> bool:
        """Take one out of its stock of second requests. False: there is none."""
        with self._lock:
            known = self._server(server.key)
            if known.stock < 1.0:
                return False
            known.stock -= 1.0
            known.hedge_count += 1
            return True

    def describe(self) -> list[dict[str, Any]]:
        """For people and metrics: each server that has been asked; times as time.time(), null: never, or not now."""
        now = time.monotonic()
        with self._lock:
            return [{"server": key, "state": self._state(key, now), "why": known.why, "since": known.since,
                     "last_ok": known.last_ok, "requests": known.request_count, "failures": known.failure_count,
                     "hedges": known.hedge_count} for key, known in self._servers.items()]

    def _state(self, key: str, now: float) -> str:
        pause = self._pauses.get(key)
        if pause is not None and pause.until > now:
            return "distrusted" if pause.is_liar else "left alone"
        if pause is not None and pause.probed_until > now:
            return "probing"
        return "failing" if self._servers[key].since is not None else "ok"

    def _note_failure(self, key: str, why: str) -> None:
        known = self._server(key)
        known.request_count += 1
        known.failure_count += 1
        known.why = why
        if known.since is None:
            known.since = time.time()

    def _server(self, key: str) -> _Server:
        known = self._servers.get(key)
        if known is None:
            known = self._servers[key] = _Server()
            _bound(self._servers)
        return known


def _keys(server: HostClient) -> tuple[str, str]:
    return server.key, f"{server.key} {server.repository}"


def _bound(known: dict[str, Any]) -> None:
    while len(known) > _SERVER_COUNT_MAX:
        del known[next(iter(known))]


HEALTH: Final = Health()
