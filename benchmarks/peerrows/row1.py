"""Row 1: eight real nodes start together, cold: the slowest against the time that a link needs for the image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, ratio
from benchmarks.peerrows.realcluster import MIB, ideal_s, start_together

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "8 real nodes, 200 MiB, every link 200 Mbit/s: slowest ÷ ideal"
_NODES, _SIZE = 8, 200 * MIB


def measure(session: Session) -> list[Figure]:
    """Figure 1. Kraken 3.0 (tuned) to 6.9, Dragonfly 3.3."""
    found = [start_together(session, _NODES, _SIZE) for _ in range(session.runs)]
    return [ratio("1", "slowest node ÷ image over link", 1.3, [max(one.seconds) for one in found],
                  [ideal_s(_SIZE)] * len(found), fastest_s=[min(one.seconds) for one in found],
                  origin_images=[one.origin_bytes / _SIZE for one in found], cpu_s=[one.cpu_s for one in found],
                  upload_skew=[max(one.sent) * _NODES / sum(one.sent) for one in found])]
