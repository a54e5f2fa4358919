"""
Row 8: lazy reads of eight nodes at once: p99 with peers against p99 with the registry alone.

Each node reads single chunks in the same order, drawn by chance, one after the other; without prefetch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, ratio
from benchmarks.kit.cluster import Cluster
from benchmarks.kit.reader import read_all
from benchmarks.peerrows.realcluster import MIB, RATE_BIT_S, READ_TIMEOUT_S
from benchmarks.scale.result import percentile

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "p99 of a lazy read, 8 nodes at once: through peers ÷ through the registry"
_NODES, _SIZE, _READS = 8, 200 * MIB, 120


def measure(session: Session) -> list[Figure]:
    """Figure 8."""
    found: dict[str, list[list[float]]] = {"tracker": [], "none": []}
    for number in range(session.runs):
        for discovery in sorted(found, reverse=bool(number % 2)):
            found[discovery].append(_latencies(session, discovery, number))
    return [ratio("8", "p99, seconds", 0.5, *([percentile(run, 99) for run in found[kind]] for kind in found),
                  peers_p50=[percentile(run, 50) for run in found["tracker"]],
                  registry_p50=[percentile(run, 50) for run in found["none"]])]


def _latencies(session: Session, discovery: str, seed: int) -> list[float]:
    with Cluster(session, _NODES, rate_bit_s=RATE_BIT_S, discovery=discovery) as cluster:
        image = cluster.image(f"peers-{_SIZE // MIB}", _SIZE)
        cluster.start()
        cluster.mount(image, prefetch=False)
        reads = read_all([node.data for node in cluster.nodes], READ_TIMEOUT_S, "--random", str(seed), "--count",
                         str(_READS), "--size", "4096")
        return [seconds for one in reads for _, seconds in one]
