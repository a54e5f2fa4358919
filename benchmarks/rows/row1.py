"""Row 1: cold start over 1 Gbit/s against containerd's full pull and run of the gzip image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, ratio
from benchmarks.rows.recording import record_list
from benchmarks.rows.starts import start_lazy, start_whole
from benchmarks.session import NUMPY, TENSORFLOW

if TYPE_CHECKING:
    from benchmarks.session import Session, Subject

TITLE = "cold start over 1 Gbit/s against containerd's pull and run"


def measure(session: Session) -> list[Figure]:
    return [
        *_measure_one(session, "1a", NUMPY, 0.30),
        *_measure_one(session, "1b", TENSORFLOW, 0.50),
    ]


def _measure_one(session: Session, key: str, subject: Subject, target: float) -> list[Figure]:
    hot = str(record_list(session, subject))
    whole, lazy, listed = [], [], []
    for number in range(session.runs):
        whole.append(start_whole(session, subject))
        lazy.append(start_lazy(session, subject, "lazy"))
        listed.append(start_lazy(session, subject, "lazy-hot", "--prefetch", hot))
        session.say(
            f"{subject.program} {number + 1}: containerd {whole[-1].total_s:.2f} s, "
            f"lazyfs {lazy[-1].total_s:.2f} s, with a prefetch list {listed[-1].total_s:.2f} s"
        )
    theirs = [start.total_s for start in whole]
    pull = [start.ready_s for start in whole]
    figures = []
    for suffix, starts, text, wanted in (
        ("", lazy, "no prefetch list", target),
        ("-hot", listed, "with a prefetch list", None),
    ):
        figures.append(
            ratio(
                key + suffix, f"{subject.program}, {text}", wanted, [start.total_s for start in starts], theirs,
                pull_s=pull,
                mount_s=[start.ready_s for start in starts],
                link_mb=[start.link_bytes / 1e6 for start in starts],
                touched_mb=[start.touched_bytes / 1e6 for start in starts],
                whole_link_mb=[start.link_bytes / 1e6 for start in whole],
            )
        )  # fmt: skip
    return figures
