"""Row 1: eight real nodes start together, cold: the slowest against the time that a link needs for the image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, ratio
from benchmarks.peerrows.realcluster import MIB, RATE_BIT_S, ideal_s, start_together
from benchmarks.peerrows.simulated import model

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "8 real nodes, 200 MiB, every link 200 Mbit/s: slowest ÷ ideal"
_NODES, _SIZE = 8, 200 * MIB


def measure(session: Session) -> list[Figure]:
    """Figure 1 (Kraken 3.0, tuned, to 6.9; Dragonfly 3.3), 1-model: real ÷ what benchmarks.scale says."""
    found = [start_together(session, _NODES, _SIZE) for _ in range(session.runs)]
    slowest = [max(one.seconds) for one in found]
    expected = model(_NODES, _SIZE // MIB, RATE_BIT_S / 1e6)
    return [ratio("1-model", "slowest node, real ÷ simulated", None, slowest, [expected] * len(found)),
            ratio("1", "slowest node ÷ image over link", 1.3, slowest,
                  [ideal_s(_SIZE)] * len(found), fastest_s=[min(one.seconds) for one in found],
                  origin_images=[one.origin_bytes / _SIZE for one in found], cpu_s=[one.cpu_s for one in found],
                  upload_skew=[max(one.sent) * _NODES / sum(one.sent) for one in found])]
