"""What the rows with a real cluster share: all nodes mount an image at the same time and read all of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.kit.cluster import Cluster
from benchmarks.kit.reader import Reads, read_all

if TYPE_CHECKING:
    from benchmarks.session import Session

MIB = 1 << 20
RATE_BIT_S = 200_000_000
READ_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Together:
    """
    One cold start of all nodes.

    Attributes:
        seconds: of each node, from the order to mount until its last byte was read.
        reads: of each node.
        origin_bytes: that the registry's machine sent, headers included.
        sent: bytes of each node.
        cpu_s: of all daemons.

    """

    seconds: list[float]
    reads: list[Reads]
    origin_bytes: int
    sent: list[int]
    cpu_s: float


def ideal_s(size: int) -> float:
    return size * 8 / RATE_BIT_S


def start_together(session: Session, count: int, size: int) -> Together:
    """A new cluster with empty caches; every link has RATE_BIT_S. Raises ToolError."""
    with Cluster(session, count, rate_bit_s=RATE_BIT_S) as cluster:
        image = cluster.image(f"peers-{size // MIB}", size)
        cluster.start()
        before, cpu_s = cluster.rack.counted(), sum(node.daemon.cpu_s() for node in cluster.nodes)
        began = time.monotonic()
        cluster.mount(image)
        reads = read_all([node.data for node in cluster.nodes], READ_TIMEOUT_S)
        after = cluster.rack.counted()
        return Together([one[-1][0] - began for one in reads], reads,
                        after["registry"].sent - before["registry"].sent,
                        [after[node.name].sent - before[node.name].sent for node in cluster.nodes],
                        sum(node.daemon.cpu_s() for node in cluster.nodes) - cpu_s)
