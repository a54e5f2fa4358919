"""Row 2: cold start with a list over 1 Gbit/s against containerd's full pull and run of the gzip image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, ratio
from benchmarks.profilerows.starts import PROGRAMS, start_hot
from benchmarks.rows.starts import start_whole

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "cold start with a list over 1 Gbit/s against containerd's pull and run"
_TARGETS = {"a": 0.15, "b": 0.36}


def measure(session: Session) -> list[Figure]:
    figures = []
    for letter, subject in PROGRAMS:
        whole, hot = [], []
        for number in range(session.runs):
            whole.append(start_whole(session, subject))
            hot.append(start_hot(session, subject))
            session.say(
                f"{subject.program} {number + 1}: containerd {whole[-1].total_s:.2f} s, lazyfs {hot[-1].total_s:.2f} s"
            )
        figures.append(
            ratio(
                f"2{letter}", subject.program, _TARGETS[letter],
                [start.total_s for start in hot], [start.total_s for start in whole],
                pull_s=[start.ready_s for start in whole], mount_s=[start.ready_s for start in hot],
                link_mb=[start.link_bytes / 1e6 for start in hot],
                whole_link_mb=[start.link_bytes / 1e6 for start in whole],
            )
        )  # fmt: skip
    return figures
