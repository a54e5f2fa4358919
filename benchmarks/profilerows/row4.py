"""Row 4: requests to the registry during a start with a list, everything included."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, plain
from benchmarks.profilerows.starts import PROGRAMS, fast_starts

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "requests to the registry during a start with a list (ping, manifest, bootstrap, blobs)"


def measure(session: Session) -> list[Figure]:
    figures = []
    for letter, subject in PROGRAMS:
        counts = [float(start.request_count) for start in fast_starts(session, letter)]
        figures.append(plain(f"4{letter}", subject.program, 15.0, "requests", counts))
    return figures
