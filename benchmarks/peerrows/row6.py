"""Row 6: how evenly a simulated cluster of 500 shares its uploads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, plain
from benchmarks.peerrows.simulated import HALF_A_THOUSAND, results, seeds

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "upload by the busiest node ÷ mean, simulated, 500 nodes"


def measure(session: Session) -> list[Figure]:
    """Figure 6."""
    skews = [one.upload_skew for one in results(seeds(HALF_A_THOUSAND, session.runs))]
    return [plain("6", "busiest ÷ mean", 1.3, "x", skews)]
