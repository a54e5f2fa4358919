"""Row 2: bytes over the link until the program ends, against the compressed size of the chunks it touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, ratio
from benchmarks.rows.starts import start_lazy
from benchmarks.session import NUMPY, TENSORFLOW

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "bytes over the link against the compressed size of the chunks touched"


def measure(session: Session) -> list[Figure]:
    figures = []
    for key, subject, target in (("2", TENSORFLOW, 1.05), ("2-numpy", NUMPY, None)):
        starts = [start_lazy(session, subject, "lazy") for _ in range(session.runs)]
        link = [start.link_bytes / 1e6 for start in starts]
        touched = [start.touched_bytes / 1e6 for start in starts]
        fetched = [start.fetched_bytes / 1e6 for start in starts]
        title = f"{subject.program}: MB over the link / MB touched"
        figures.append(ratio(key, title, target, link, touched, fetched_mb=fetched))
    return figures
