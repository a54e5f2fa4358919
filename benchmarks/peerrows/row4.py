"""Row 4: a full fetch of the slowest node against the time that a link needs: 16 real nodes, 500 simulated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, plain, ratio
from benchmarks.peerrows.realcluster import MIB, RATE_BIT_S, ideal_s
from benchmarks.peerrows.simulated import HALF_A_THOUSAND, model, results, seeds
from benchmarks.peerrows.sixteen import NODES, SIZE, sixteen
from benchmarks.scale.result import percentile

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = f"slowest node's full fetch ÷ ideal: {NODES} real, 500 simulated; p99 ÷ p50"


def measure(session: Session) -> list[Figure]:
    """Figures 4a (real), 4b (simulated), 4c (p99 ÷ p50, simulated), 4c-real, 4-model: real ÷ simulated, 16 nodes."""
    real = sixteen(session)
    simulated = results(seeds(HALF_A_THOUSAND, session.runs))
    return [
        ratio("4a", f"{NODES} real nodes", 1.4, [max(one.seconds) for one in real], [ideal_s(SIZE)] * len(real),
              cpu_s=[one.cpu_s for one in real]),
        ratio("4-model", f"slowest of {NODES} nodes, real ÷ simulated", None, [max(one.seconds) for one in real],
              [model(NODES, SIZE // MIB, RATE_BIT_S / 1e6)] * len(real)),
        plain("4b", "500 nodes, simulated", 1.3, "x", [one.slowest_ratio for one in simulated]),
        plain("4c", "500 nodes, simulated, p99 ÷ p50", 1.1, "x", [one.spread for one in simulated]),
        plain("4c-real", f"{NODES} real nodes, p99 ÷ p50", None, "x",
              [percentile(one.seconds, 99) / percentile(one.seconds, 50) for one in real]),
    ]
