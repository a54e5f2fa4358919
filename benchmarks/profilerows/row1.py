"""Row 1: cold start with a list against the longer of: the same start with everything cached; the hot bytes' time."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from benchmarks.figures import Figure, ratio
from benchmarks.kit.lazy import COMMAND, environment
from benchmarks.kit.proc import run
from benchmarks.profilerows.starts import FAST_BIT_S, PROGRAMS, SLOW_BIT_S, hot_image, start_hot

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.session import Session, Subject

TITLE = "cold start with a list against the longer of: all data cached; hot bytes / link speed"
_TIMEOUT_S = 120.0


def measure(session: Session) -> list[Figure]:
    figures = []
    for letter, subject in PROGRAMS:
        hot_bytes = _hot_bytes(session, subject)
        for suffix, bit_s in (("", FAST_BIT_S), ("-slow", SLOW_BIT_S)):
            session.link.set_rate(bit_s)
            try:
                figures.append(_compare(session, f"1{letter}{suffix}", subject, hot_bytes, bit_s))
            finally:
                session.link.set_rate(FAST_BIT_S)
    return figures


def _compare(session: Session, key: str, subject: Subject, hot_bytes: int, bit_s: int) -> Figure:
    link_s = hot_bytes * 8 / bit_s
    cold, cached = [], []
    filled = session.place.folder("filled-cache")
    start_hot(session, subject, cache=filled)
    for number in range(session.runs):
        cached.append(start_hot(session, subject, cache=filled))
        cold.append(start_hot(session, subject))
        session.say(
            f"{subject.program} {number + 1}: {cold[-1].total_s:.2f} s, cached {cached[-1].total_s:.2f} s, "
            f"{hot_bytes / 1e6:.1f} MB take {link_s:.2f} s"
        )
    return ratio(
        key, f"{subject.program}, {bit_s / 1e6:.0f} Mbit/s", 1.15, [start.total_s for start in cold],
        [max(start.total_s, link_s) for start in cached],
        cached_s=[start.total_s for start in cached], hot_s=[link_s] * len(cold),
        mount_s=[start.ready_s for start in cold], cached_mount_s=[start.ready_s for start in cached],
        daemon_cpu_s=[start.daemon_cpu_s for start in cold], fetched_mb=[start.fetched_bytes / 1e6 for start in cold],
    )  # fmt: skip


def _hot_bytes(session: Session, subject: Subject) -> int:
    image = hot_image(session, subject, session.near)
    words: list[str | Path] = [COMMAND, "inspect", "--insecure", "--json", image]
    shown = json.loads(run(words, timeout_s=_TIMEOUT_S, env=environment(session.place)).stdout)
    size: int = shown["images"][0]["hot"]["size"]
    return size
