"""
How long to wait for a peer before another one is asked as well (a hedge), and how often that may be done.

Layer: peers. Who calls: swarm. Pure; no clock of its own. A node that is gone shows by its silence (model.SILENCE_S),
so a hedge is for what is slow: it waits by what is usual, the 95th percentile of the pieces that came lately, since on
a full link everything takes long and asking twice makes it longer.
"""

from __future__ import annotations

from dataclasses import dataclass

from lazyfs.peers.health import Latencies
from lazyfs.peers.model import Priority

TIMES = 1.5                  # of the 95th percentile,
TIMES_MEDIAN = 3.0           # but no more than this of the median: one slow peer of eight is more than 5 %
ANEW = 4                     # pieces: so often it is worked out anew
SAMPLES_MIN = 16             # fewer say nothing: the longest delay counts
FOREGROUND_S = (0.03, 0.5)   # least and most; a read's stall is to be less than 1 s
BULK_S = (0.5, 4.0)          # a window of 64 MiB at 200 Mbit/s takes 2.7 s
URGENT_S = (0.15, 2.0)       # a read that comes to want what is under way for something less urgent waits so long,
URGENT_TIMES = 1.5           # by what is usual for that: on a slow link all wait, and each hurry brings a piece twice;
URGENT_PIECES = 3            # but no longer than so many pieces take a usual member's link,
URGENT_PIECES_S = 0.5        # or this: of links of 200 Mbit/s, full with what is fetched ahead, 1.5 times was 1.1 s
CREDIT_EACH = 0.2            # hedges by requests: one in five,
CREDIT_MAX = 16.0            # and some at once;
CREDIT_EACH_S = 2.0          # a second: the last requests of a window have no more after them


@dataclass(slots=True)
class _Class:
    latencies: Latencies
    credit: float
    least: float
    most: float
    delay_s: float
    median_s: float = 0.0
    news: int = 0
    at: float = 0.0


class Pace:
    """Of all of a swarm's peers together; what somebody waits for and what not are two things."""

    def __init__(self) -> None:
        self._foreground = _Class(Latencies(256), CREDIT_MAX, *FOREGROUND_S, FOREGROUND_S[1])
        self._bulk = _Class(Latencies(256), CREDIT_MAX, *BULK_S, BULK_S[1])

    def add(self, priority: Priority, seconds: float) -> None:
        """A piece has come, so long after it was asked for, or after the one before it."""
        kind = self._of(priority)
        kind.latencies.add(seconds)
        kind.news += 1
        if kind.news == ANEW:
            kind.news = 0
            kind.median_s = kind.latencies.quantile(0.5)
            if len(kind.latencies) >= SAMPLES_MIN:
                usual = min(TIMES * kind.latencies.quantile(0.95), TIMES_MEDIAN * kind.median_s)
                kind.delay_s = min(kind.most, max(kind.least, usual))

    def delay_s(self, priority: Priority) -> float:
        return self._of(priority).delay_s

    def median_s(self, priority: Priority) -> float:
        """Half of the pieces take less; 0.0 until some have come."""
        return self._of(priority).median_s

    def urgent_s(self, priority: Priority, piece_s: float = 0.0) -> float:
        """
        How long a read waits for what is under way with that priority before it asks for it itself.

        `piece_s`: that a piece takes a usual member's link; 0.0: nobody knows.
        """
        usual_s = URGENT_TIMES * self.median_s(priority) or self.delay_s(Priority.FOREGROUND)
        most_s = max(URGENT_PIECES_S, URGENT_PIECES * piece_s) if piece_s else URGENT_S[1]
        return max(URGENT_S[0], min(usual_s, most_s, URGENT_S[1]))

    def asked(self, priority: Priority) -> None:
        """A request was made: some of a hedge is allowed by it."""
        kind = self._of(priority)
        kind.credit = min(CREDIT_MAX, kind.credit + CREDIT_EACH)

    def may_hedge(self, priority: Priority, now: float) -> bool:
        """Takes one, if there is one. `now`: trio's clock."""
        kind = self._of(priority)
        kind.credit = min(CREDIT_MAX, kind.credit + CREDIT_EACH_S * (now - kind.at))
        kind.at = now
        if kind.credit < 1.0:
            return False
        kind.credit -= 1.0
        return True

    def describe(self) -> dict[str, float]:
        return {"foreground_p50_s": self._foreground.latencies.quantile(0.5),
                "foreground_p95_s": self._foreground.latencies.quantile(0.95),
                "bulk_p50_s": self._bulk.latencies.quantile(0.5),
                "bulk_p95_s": self._bulk.latencies.quantile(0.95)}

    def _of(self, priority: Priority) -> _Class:
        return self._foreground if priority is Priority.FOREGROUND else self._bulk
