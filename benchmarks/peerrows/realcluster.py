"""What the rows with a real cluster share: all nodes mount an image at the same time and read all of it."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.kit.cluster import Cluster
from benchmarks.kit.reader import Reading, Reads
from benchmarks.kit.recycled import recycled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.kit.cluster import Node
    from benchmarks.session import Session

MIB = 1 << 20
RATE_BIT_S = 200_000_000
READ_TIMEOUT_S = 600.0
_NODE_BYTES = 200 * MIB              # of memory: its processes, and a share of the registry, Redis and the trackers


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


def ideal_s(size: int, rate_bit_s: int = RATE_BIT_S) -> float:
    return size * 8 / rate_bit_s


def start_together(session: Session, count: int, size: int, rate_bit_s: int = RATE_BIT_S) -> Together:
    """A new cluster with empty caches; `rate_bit_s`: of every link. Raises ToolError."""
    memory = count * (2 * size + _NODE_BYTES)     # each has it in its cache, and in the page cache of its mount
    with (recycled(session.place, memory) as fill, Cluster(session, count, rate_bit_s=rate_bit_s) as cluster,
          _readers(cluster.nodes) as readers):
        image = cluster.image(f"peers-{size // MIB}", size)
        cluster.start()
        fill()
        before, cpu_s = cluster.rack.counted(), sum(node.daemon.cpu_s() for node in cluster.nodes)

        def live(node: Node, reading: Reading) -> Reads:
            node.mount(image)
            reading.go()
            return reading.result(READ_TIMEOUT_S)

        began = time.monotonic()
        with ThreadPoolExecutor(count) as pool:
            reads = list(pool.map(live, cluster.nodes, readers))
        after = cluster.rack.counted()
        return Together([one[-1][0] - began for one in reads], reads,
                        after["registry"].sent - before["registry"].sent,
                        [after[node.name].sent - before[node.name].sent for node in cluster.nodes],
                        sum(node.daemon.cpu_s() for node in cluster.nodes) - cpu_s)


@contextlib.contextmanager
def _readers(nodes: list[Node]) -> Iterator[list[Reading]]:
    """One a node, which reads its whole file when it is told to."""
    readers = [Reading(node.data, held=True) for node in nodes]
    try:
        for reading in readers:
            reading.wait_ready()
        yield readers
    finally:
        for reading in readers:
            reading.close()
