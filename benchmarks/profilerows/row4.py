"""Row 4: requests to the registry during a start with a list, everything included."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, plain
from benchmarks.profilerows.starts import PROGRAMS, start_hot

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "requests to the registry during a start with a list (ping, manifest, bootstrap, blobs)"


def measure(session: Session) -> list[Figure]:
    figures = []
    for letter, subject in PROGRAMS:
        starts = [start_hot(session, subject) for _ in range(session.runs)]
        counts = [float(start.request_count) for start in starts]
        figures.append(plain(f"4{letter}", subject.program, 15.0, "requests", counts))
    return figures
