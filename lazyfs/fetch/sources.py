"""
What is known of each source: whether it answers, since when not and why, and how often it may be asked again.

Layer: fetch. Who calls: fetch.scheduler, on the loop, and the worker's status. Pure. One SourceState a server, whatever
number of images come from it; `now` is trio's clock throughout, times of day (`since`, `last_ok`) are for people.

The breaker: a source that has failed OPEN_FAILURE_COUNT times in a row, or nearly always of late, is *down*. Nothing is
asked of it then but one probe at a time, at growing intervals; what is wanted of it waits, as long as its readers do,
and goes out when a probe has been answered. So an outage of two seconds is a pause of two seconds, and one of an hour
costs the registry a request every few seconds, however many read.

The retry budget: of all requests one in RETRY_SHARE may be a repetition, and a few a second besides. Beyond that
repetitions wait for their turn: a source in trouble is not asked more than one in good health.
"""

from __future__ import annotations

import enum
import random
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from lazyfs.errors import (
    FormatError,
    IntegrityError,
    LazyfsError,
    RateLimitedError,
)
from lazyfs.fetch import retry

if TYPE_CHECKING:
    from lazyfs.registry.place import ImageSource

OPEN_FAILURE_COUNT = 5
OPEN_SHARE, OPEN_SHARE_COUNT = 0.75, 20    # of the last so many
PROBE_FIRST_S, PROBE_PAUSE_MAX_S = 0.5, 5.0    # between two probes; doubles
# How long a probe may take. It begins short, so that one to a black hole does not keep a registry that has come back
# from being noticed, and grows, so that a link on which a chunk takes long is not taken for dead.
PROBE_TIME_FIRST_S, PROBE_TIME_MAX_S = 5.0, 30.0
RETRY_SHARE, RETRY_RATE, RETRY_STOCK_MAX = 0.1, 2.0, 10.0
RETRY_WAIT_MAX_S = 10.0
SOURCE_COUNT_MAX = 256           # remembered; the longest unused goes


class State(enum.StrEnum):
    """
    What a source is doing.

    FAILING: its last answer was none, it is asked still. DOWN: it is not, but by probes. PAUSED: it asked for that.
    REFUSING: it wants (other) credentials, or has not what an image needs. LYING: wrong bytes.
    """

    OK = "ok"
    FAILING = "failing"
    DOWN = "down"
    PROBING = "probing"
    PAUSED = "paused"
    REFUSING = "refusing"
    LYING = "lying"


class SourceState:
    """
    One source.

    :paused_until: trio's clock; it asked us to wait (Retry-After).
    :running_count: foreground transfers under way.
    :last_error: of the streak of failures that goes on; None: it is well.
    """

    __slots__ = (
        "_outcomes", "_probe_at", "_probe_pause_s", "_probe_time_s", "_probing", "_stock", "_stock_at", "_streak",
        "down", "failure_count", "last_error", "last_ok", "name", "open_count", "paused_until", "request_count",
        "retry_count", "running_count", "since", "why",
    )  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.down = False
        self.paused_until = 0.0
        self.running_count = 0
        self.last_error: LazyfsError | None = None
        self.why = ""
        self.since: float | None = None
        self.last_ok: float | None = None
        self.request_count = self.failure_count = self.retry_count = self.open_count = 0
        self._streak = 0
        self._outcomes: deque[bool] = deque(maxlen=OPEN_SHARE_COUNT)
        self._probing = False
        self._probe_at = 0.0
        self._probe_pause_s = PROBE_FIRST_S
        self._probe_time_s = PROBE_TIME_FIRST_S
        self._stock = RETRY_STOCK_MAX
        self._stock_at = 0.0

    def admits(self, now: float) -> bool:
        """Whether a transfer may start: while it is down, as the one that tries it."""
        if self.paused_until > now:
            return False
        return not self.down or (not self._probing and self._probe_at <= now)

    def begin(self) -> float | None:
        """A transfer starts. Returns the seconds that it may take, where it is a probe."""
        self.request_count += 1
        self._stock = min(self._stock + RETRY_SHARE, RETRY_STOCK_MAX)
        if not self.down:
            return None
        self._probing = True
        return self._probe_time_s

    def succeeded(self) -> None:
        """Something of it has come, and was right."""
        self.last_ok = time.time()
        self.down = self._probing = False
        self.last_error, self.why, self.since = None, "", None
        self._streak = 0
        self._outcomes.append(True)
        self._probe_pause_s, self._probe_time_s = PROBE_FIRST_S, PROBE_TIME_FIRST_S

    def abandoned(self) -> None:
        """A transfer was given up by us: it tells nothing."""
        self._probing = False

    def failed(self, error: LazyfsError, now: float) -> float | None:
        """
        A transfer gave nothing.

        Returns:
            When it is to be tried, trio's clock, if it is down; else None.

        """
        was_probe, self._probing = self._probing, False
        if retry.says_nothing(error):
            if was_probe:
                self._probe_at = now + PROBE_FIRST_S
                return self._probe_at
            return None
        self.failure_count += 1
        self.last_error, self.why = error, str(error)
        if self.since is None:
            self.since = time.time()
        if isinstance(error, RateLimitedError) or not retry.is_transient(error):
            self._answered()
            return None
        self._streak += 1
        self._outcomes.append(False)
        if self.down:
            self._probe_pause_s = min(2 * self._probe_pause_s, PROBE_PAUSE_MAX_S)
            self._probe_time_s = min(2 * self._probe_time_s, PROBE_TIME_MAX_S)
        elif self._streak >= OPEN_FAILURE_COUNT or self._fails_nearly_always():
            self.down = True
            self.open_count += 1
        else:
            return None
        self._probe_at = now + self._probe_pause_s * random.uniform(0.5, 1.5)    # noqa: S311 - spreads load
        return self._probe_at

    def _answered(self) -> None:
        """It refuses, but it is there."""
        self.down = False
        self._streak = 0

    def _fails_nearly_always(self) -> bool:
        outcomes = self._outcomes
        return len(outcomes) == OPEN_SHARE_COUNT and outcomes.count(False) >= OPEN_SHARE * OPEN_SHARE_COUNT

    def retry_wait_s(self, now: float) -> float:
        """Take a repetition out of the budget; returns how long it has to wait for its turn."""
        self.retry_count += 1
        self._stock = min(self._stock + (now - self._stock_at) * RETRY_RATE, RETRY_STOCK_MAX) - 1.0
        self._stock_at = now
        return min(max(0.0, -self._stock / RETRY_RATE), RETRY_WAIT_MAX_S)

    def state(self, now: float) -> State:
        if self.paused_until > now:
            return State.PAUSED
        if self.down:
            return State.PROBING if self._probing else State.DOWN
        if self.last_error is None:
            return State.OK
        if isinstance(self.last_error, IntegrityError | FormatError):
            return State.LYING
        return State.FAILING if retry.is_transient(self.last_error) else State.REFUSING

    def describe(self, now: float) -> dict[str, Any]:
        """For people and metrics; times as time.time(), null: never, or not now."""
        return {"source": self.name, "state": str(self.state(now)), "why": self.why, "since": self.since,
                "last_ok": self.last_ok, "requests": self.request_count, "failures": self.failure_count,
                "retries": self.retry_count, "outages": self.open_count}


class Sources:
    """All of a fetcher's, by their names."""

    def __init__(self) -> None:
        self._states: dict[str, SourceState] = {}

    def of(self, source: ImageSource) -> SourceState:
        name = server_of(source)
        state = self._states.get(name)
        if state is None:
            state = self._states[name] = SourceState(name)
            while len(self._states) > SOURCE_COUNT_MAX:
                idle = next((key for key, one in self._states.items() if not one.running_count), name)
                if idle == name:
                    break
                del self._states[idle]
        return state

    def describe(self, now: float) -> list[dict[str, Any]]:
        return [state.describe(now) for state in self._states.values()]


def server_of(source: ImageSource) -> str:
    """Who answers for a source: the registry's host[:port], whatever the image; else the source's own name."""
    return str(getattr(source, "server", "") or source.name)
