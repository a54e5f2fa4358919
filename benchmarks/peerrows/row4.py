"""
Row 4: a full fetch of the slowest node against the time that a link needs: 16 real nodes, 500 simulated.

Sixteen nodes on one machine's two cores have no time for links of 200 Mbit/s: 4a says what this machine can do. With
links of a quarter of it the processors wait for the links, as they would on machines of their own: 4a-slow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, plain, ratio
from benchmarks.peerrows.realcluster import MIB, RATE_BIT_S, ideal_s, start_together
from benchmarks.peerrows.simulated import HALF_A_THOUSAND, model, results, seeds
from benchmarks.peerrows.sixteen import NODES, SIZE, sixteen
from benchmarks.scale.result import percentile

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = f"slowest node's full fetch ÷ ideal: {NODES} real, 500 simulated; p99 ÷ p50"

_SLOW_BIT_S = RATE_BIT_S // 4


def measure(session: Session) -> list[Figure]:
    """Figures 4a, 4a-slow, 4c-real (real), 4b, 4c (p99 ÷ p50; simulated), 4-model: real ÷ simulated, 16 nodes."""
    real = sixteen(session)
    slow = [start_together(session, NODES, SIZE, _SLOW_BIT_S) for _ in range(session.runs)]
    simulated = results(seeds(HALF_A_THOUSAND, session.runs))
    return [
        ratio("4a", f"{NODES} real nodes", 1.4, [max(one.seconds) for one in real], [ideal_s(SIZE)] * len(real),
              cpu_s=[one.cpu_s for one in real]),
        ratio("4a-slow", f"{NODES} real nodes, {_SLOW_BIT_S // 10**6} Mbit/s", 1.4,
              [max(one.seconds) for one in slow], [ideal_s(SIZE, _SLOW_BIT_S)] * len(slow),
              cpu_s=[one.cpu_s for one in slow], origin_images=[one.origin_bytes / SIZE for one in slow]),
        ratio("4-model", f"slowest of {NODES} nodes, real ÷ simulated", None, [max(one.seconds) for one in real],
              [model(NODES, SIZE // MIB, RATE_BIT_S / 1e6)] * len(real)),
        plain("4b", "500 nodes, simulated", 1.3, "x", [one.slowest_ratio for one in simulated]),
        plain("4c", "500 nodes, simulated, p99 ÷ p50", 1.1, "x", [one.spread for one in simulated]),
        plain("4c-real", f"{NODES} real nodes, p99 ÷ p50", None, "x",
              [percentile(one.seconds, 99) / percentile(one.seconds, 50) for one in real]),
    ]
