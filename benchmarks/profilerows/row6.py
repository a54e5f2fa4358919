"""Row 6: a start with a list at a round trip of 100 ms against one of 1 ms, five round trips aside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, ratio
from benchmarks.profilerows.starts import PROGRAMS, start_hot

if TYPE_CHECKING:
    from benchmarks.session import Session, Subject

TITLE = "start with a list at 100 ms RTT, less 5 round trips, against 1 ms RTT"
_ALLOWED_TRIPS = 5
_RTTS_MS = {"a": (1, 20, 100), "b": (1, 100)}


def measure(session: Session) -> list[Figure]:
    figures = []
    try:
        for letter, subject in PROGRAMS:
            figures += _measure_one(session, letter, subject)
    finally:
        session.rtt_ms = 0
    return figures


def _measure_one(session: Session, letter: str, subject: Subject) -> list[Figure]:
    rtts = _RTTS_MS[letter]
    times: dict[int, list[float]] = {rtt: [] for rtt in rtts}
    for number in range(session.runs):
        for rtt in rtts:
            session.rtt_ms = rtt
            times[rtt].append(start_hot(session, subject).total_s)
        shown = ", ".join(f"{rtt} ms: {found[-1]:.2f} s" for rtt, found in times.items())
        session.say(f"{subject.program} {number + 1}: {shown}")
    figures = []
    for rtt in rtts[1:]:
        less = [total - _ALLOWED_TRIPS * rtt / 1000 for total in times[rtt]]
        key, target = (f"6{letter}", 1.3) if rtt == rtts[-1] else (f"6{letter}-{rtt}", None)
        figures.append(ratio(key, f"{subject.program}, {rtt} ms", target, less, times[1], total_s=times[rtt]))
    return figures
