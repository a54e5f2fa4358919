"""Row 9: the longest stall of a reader when a node that gives to it is killed in mid-transfer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.figures import Figure, plain
from benchmarks.kit.cluster import Cluster
from benchmarks.kit.reader import Reading
from benchmarks.peerrows.realcluster import MIB, RATE_BIT_S, READ_TIMEOUT_S, ideal_s

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "reader's stall when its parent is killed in mid-transfer, 8 nodes"
_NODES, _SIZE = 8, 200 * MIB


def measure(session: Session) -> list[Figure]:
    """Figure 9: the longest read that was under way at the kill or began later, of all readers."""
    worst, before = [], []
    for _ in range(session.runs):
        with Cluster(session, _NODES, rate_bit_s=RATE_BIT_S) as cluster:
            image = cluster.image(f"peers-{_SIZE // MIB}", _SIZE)
            cluster.start()
            cluster.mount(image)
            victim, *others = cluster.nodes
            readers = [Reading(node.data) for node in others]
            try:
                time.sleep(ideal_s(_SIZE) / 2)     # the middle: not a wait for anything
                killed = time.monotonic()
                victim.kill()
                reads = [read for reader in readers for read in reader.result(READ_TIMEOUT_S)]
            finally:
                for reader in readers:
                    reader.close()
        worst.append(max((seconds for end, seconds in reads if end >= killed), default=0.0))
        before.append(max((seconds for end, seconds in reads if end < killed), default=0.0))
    return [plain("9", "longest read after the kill", 1.0, "s", worst, longest_before=before)]
