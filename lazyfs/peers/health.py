"""
What a node knows of each peer from its own dealings: speed, failures, and whether it keeps away from it for a time.

Layer: peers. Who calls: swarm. No I/O; times are trio's clock. One wrong piece and a peer is left alone for long; one
that cannot be reached, for a second, then twice as long each time; one that is slow is asked last. What others should
know becomes a Report, for the tracker: it isolates for all only whom several have reported.
State: one Health a member that was asked, at most HEALTH_MAX.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from lazyfs.peers.model import SILENCE_S
from lazyfs.peers.rates import Rates

LIED_S = 600.0          # a disk that rots does not mend by itself
GONE_FIRST_S = 1.0      # doubles with each failure in a row,
GONE_MAX_S = 60.0       # up to this: a node that came back is found again within a minute
SLOW_S = 30.0
REFUSED_S = 10.0        # a token is fetched anew within seconds
LACKS_S = 2.0           # it has just joined, or just left
SLOW_TIMES = 3.0        # as long as what is usual
SLOW_MIN_S = 0.1        # what is usual counts as this at least: another continent is not slow
SLOW_SAMPLES = 8        # of the last pieces and what is overdue; half of them as slow as that, and it is
LATENCIES = 64          # kept, of one peer and of all
HEALTH_MAX = 20_000
REPORT_MAX = 256        # waiting for the tracker
QUIET = "quiet"         # Health.away of who is silent, and not yet known to be gone


class Fault(enum.StrEnum):
    """What a peer did. LIED: other bytes than the digest's. GONE: not reached, broke off, silent. SLOW: see above."""

    LIED = "lied"
    GONE = "gone"
    SLOW = "slow"


@dataclass(frozen=True, slots=True)
class Report:
    """`count` times a member was seen to do it, since the last report."""

    member: str
    fault: Fault
    count: int


class Latencies:
    """The last seconds-to-a-piece; quantiles are worked out anew after some have come."""

    def __init__(self, count: int = LATENCIES) -> None:
        self._kept: deque[float] = deque(maxlen=count)
        self._ordered: list[float] = []
        self._news = 0

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, seconds: float) -> None:
        self._kept.append(seconds)
        self._news += 1

    def quantile(self, share: float) -> float:
        """0.0 if there are none."""
        if self._news * 8 > len(self._ordered):
            self._ordered = sorted(self._kept)
            self._news = 0
        return self._ordered[min(len(self._ordered) - 1, int(share * len(self._ordered)))] if self._ordered else 0.0


@dataclass(slots=True)
class Health:
    """
    One peer, as this node has found it.

    Attributes:
        running: requests under way; `late` of them are SLOW_TIMES what is usual.
        away_until: it is not asked before (why: `away`).
        slow_until: it is asked last before.
        moved_at: when its last piece came.
        times_usual: seconds to a piece, by what was usual for that priority then.

    """

    running: int = 0
    late: int = 0
    requests: int = 0
    pieces: int = 0
    bytes_received: int = 0
    failures: int = 0
    busy: int = 0
    wrong_pieces: int = 0
    hedges: int = 0
    away: str = ""
    away_until: float = 0.0
    slow_until: float = 0.0
    moved_at: float = 0.0
    gone_in_a_row: int = 0
    last_error: str = ""
    latencies: Latencies = field(default_factory=Latencies)
    times_usual: deque[float] = field(default_factory=lambda: deque(maxlen=SLOW_SAMPLES * 8))

    def is_quiet(self, now: float) -> bool:
        """Left alone because nothing is heard of it."""
        return self.away == QUIET and self.away_until > now

    def is_mostly_late(self) -> bool:
        """Of its last pieces and of those under way that are overdue."""
        count = len(self.times_usual) + self.late
        if count < SLOW_SAMPLES:
            return False
        return self.late + sum(times > SLOW_TIMES for times in self.times_usual) > count / 2


class HealthBook:
    """All peers' Health; by member id."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, Health] = OrderedDict()
        self._lacking: dict[tuple[str, str], float] = {}    # (member, resource): not asked for it before
        self._reports: dict[tuple[str, Fault], int] = {}
        self.rates = Rates()

    def of(self, member_id: str) -> Health:
        health = self._of.get(member_id)
        if health is None:
            health = self._of[member_id] = Health()
            if len(self._of) > HEALTH_MAX:
                idle = next((name for name, old in self._of.items() if not old.running and name != member_id), None)
                if idle is not None:
                    del self._of[idle]
                    self.rates.forget(idle)
        return health

    def known(self) -> list[tuple[str, Health]]:
        return sorted(self._of.items())

    def is_away(self, member_id: str, key: str, now: float) -> bool:
        """Whether it is left alone now, for this resource. Who was gone is asked one thing at first."""
        health = self._of.get(member_id)
        if health is not None and (health.away_until > now or (health.gone_in_a_row and health.running)):
            return True
        return self._lacking.get((member_id, key), 0.0) > now

    def is_slow(self, member_id: str, now: float) -> bool:
        """As it was found, or by its own word beside the others'."""
        health = self._of.get(member_id)
        return health is not None and (health.slow_until > now or self.rates.is_slow(member_id, now))

    def delivered(self, member_id: str, size: int, now: float) -> None:
        health = self.of(member_id)
        health.pieces += 1
        health.bytes_received += size
        health.moved_at = now
        health.gone_in_a_row = 0
        if health.away == QUIET:
            health.away_until = now

    def lied(self, member_id: str, why: str, now: float) -> None:
        health = self.of(member_id)
        health.wrong_pieces += 1
        self._leave_alone(health, Fault.LIED, now + LIED_S, why)
        self._report(member_id, Fault.LIED)

    def gone(self, member_id: str, why: str, now: float) -> None:
        """Several requests that break together are one failure."""
        health = self.of(member_id)
        health.failures += 1
        if health.away_until > now and not health.is_quiet(now):
            return
        if not health.is_quiet(now):
            self._leave_gone(health, Fault.GONE, why, now)
        health.away, health.last_error = Fault.GONE, why
        self._report(member_id, Fault.GONE)

    def refused(self, member_id: str, key: str, why: str, now: float) -> None:
        """Not for this resource; nothing is wrong with it."""
        health = self.of(member_id)
        health.failures += 1
        health.last_error = why
        self._lack(member_id, key, now + REFUSED_S, now)

    def lacks(self, member_id: str, key: str, now: float) -> None:
        self._lack(member_id, key, now + LACKS_S, now)

    def busy(self, member_id: str, until: float, why: str) -> None:
        health = self.of(member_id)
        health.busy += 1
        if until > health.away_until:
            self._leave_alone(health, "busy", until, why)

    def was_slow(self, member_id: str, now: float, why: str) -> None:
        """Its pieces take much longer than the others': for a time it is asked last."""
        health = self.of(member_id)
        if health.slow_until <= now:
            health.slow_until = now + SLOW_S
            health.last_error = why
            health.times_usual.clear()    # judged anew by what it does then
            self._report(member_id, Fault.SLOW)

    def quiet(self, member_id: str, seconds: float, now: float) -> None:
        """
        For so long nothing was heard of it: left alone like one that is gone, until a piece of it comes.

        Others are told when it is SILENCE_S: it may have had other work.
        """
        health, why = self.of(member_id), "nothing is heard of it"
        if seconds >= SILENCE_S:
            self.gone(member_id, why, now)
        elif health.away_until <= now:
            self._leave_gone(health, QUIET, why, now)

    def take_reports(self) -> list[Report]:
        """What happened since the last call, for the tracker."""
        taken, self._reports = self._reports, {}
        return [Report(member, fault, count) for (member, fault), count in taken.items()]

    def _leave_gone(self, health: Health, word: str, why: str, now: float) -> None:
        pause = min(GONE_MAX_S, GONE_FIRST_S * 2**min(16, health.gone_in_a_row))
        health.gone_in_a_row += 1
        self._leave_alone(health, word, now + pause, why)

    def _leave_alone(self, health: Health, why: str, until: float, error: str) -> None:
        health.away, health.away_until, health.last_error = str(why), until, error

    def _lack(self, member_id: str, key: str, until: float, now: float) -> None:
        if len(self._lacking) >= HEALTH_MAX:
            self._lacking = {pair: end for pair, end in self._lacking.items() if end > now}
        if len(self._lacking) < HEALTH_MAX:
            self._lacking[member_id, key] = until

    def _report(self, member_id: str, fault: Fault) -> None:
        if (member_id, fault) in self._reports or len(self._reports) < REPORT_MAX:
            self._reports[member_id, fault] = self._reports.get((member_id, fault), 0) + 1
