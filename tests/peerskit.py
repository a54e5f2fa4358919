"""
A small real cluster for tests (benchmarks.kit.cluster), whose nodes read an image while something fails.

    with small_cluster(session, 4) as cluster, reading(cluster.nodes) as digests:  # session: tests/peers/conftest.py
        wait_received(cluster, cluster.nodes[0], SIZE // 3)
        cluster.nodes[0].kill()
        assert digests.of(cluster.nodes[1:]) == {right(session)}
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from benchmarks.kit.cluster import Cluster
from tests.mountkit import require_mounting
from tests.registrykit import require_registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benchmarks.kit.cluster import Node
    from benchmarks.session import Session
    from tests.pullkit import PullNode

SIZE = 16 << 20
RATE_BIT_S = 80_000_000          # a node needs 1.7 s for the image: a fault hits the middle of it
WAIT_S = 120.0                   # for what needs seconds, on a machine with other work
STALLED_BYTES = 400_000          # of all nodes together in a second: what a registry of 1 Mbit/s still gives
IMAGE = "peers-test"


def require_cluster() -> None:
    """Skip, saying why, where there can be none."""
    require_mounting()
    require_registry()
    for program in ("nsenter", "ip", "tc", "redis-server"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


@contextlib.contextmanager
def small_cluster(session: Session, count: int, *, discovery: str = "tracker", hang_s: float = 0.0,
                  **peers: str) -> Iterator[Cluster]:
    """
    Running, all nodes know each other, the image is mounted on all, nothing of its data was read. `hang_s`: of
    [daemon], where another than the default.
    """
    with Cluster(session, count, rate_bit_s=RATE_BIT_S, discovery=discovery) as cluster:
        image = cluster.image(IMAGE, SIZE)
        for node in cluster.nodes if hang_s else ():
            (node.place.top / "lazyfs.toml").write_text(f"[daemon]\nhang_s = {hang_s}\n")
        cluster.start(**peers)
        cluster.mount(image, prefetch=False)
        yield cluster


def right(session: Session) -> str:
    """The digest of the image's file."""
    return hashlib.sha256((session.place.top / f"{IMAGE}-tree" / "data").read_bytes()).hexdigest()


class Digests:
    """`sha256sum` of the image's file on each node, all at once; they have begun when this is made."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._running = {node.name: subprocess.Popen(["sha256sum", node.data], stdout=subprocess.PIPE,
                                                     stderr=subprocess.STDOUT, text=True) for node in nodes}

    def of(self, nodes: Sequence[Node]) -> set[str]:
        """Of these, when they are done: digests, or what went wrong."""
        deadline = time.monotonic() + WAIT_S
        found = set()
        for node in nodes:
            process = self._running[node.name]
            try:
                text, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                text = f"{node.name} hangs"
            found.add(text.split()[0] if process.returncode == 0 else text)
        return found

    def close(self, nodes: Sequence[Node]) -> None:
        """End those that are not done, their nodes first: a reader cannot die while a frozen worker has its read."""
        for node in nodes:
            process = self._running[node.name]
            if process.poll() is None:
                node.kill()
                process.kill()
            process.communicate()


@contextlib.contextmanager
def reading(nodes: Sequence[Node]) -> Iterator[Digests]:
    """All of them read; the nodes of those that are not done at the end are killed."""
    digests = Digests(nodes)
    try:
        yield digests
    finally:
        digests.close(nodes)


def wait_received(cluster: Cluster, node: Node | PullNode, size: int) -> None:
    """Until so many bytes have come over its link."""
    wait_for(lambda: cluster.rack.counted()[node.name].received >= size, f"{node.name} receives {size} bytes")


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def spoil(node: Node) -> None:
    """Other bytes in all that it has of the image in its cache."""
    found = [path for path in (node.place.top / "cache").rglob("*") if path.is_file() and path.stat().st_size >= SIZE]
    assert found
    for path in found:
        with path.open("r+b") as file:
            for at in range(0, path.stat().st_size, 64 << 10):
                file.seek(at)
                file.write(b"\xa5")


def wait_stalled(cluster: Cluster) -> None:
    """Until hardly anything comes to its nodes any more."""
    deadline, begin, before = time.monotonic() + WAIT_S, 0.0, float("-inf")
    while True:
        now = time.monotonic()
        assert now < deadline, "they go on"
        seen = cluster.rack.counted()
        received = sum(seen[node.name].received for node in cluster.nodes)
        if received - before > STALLED_BYTES:
            begin, before = now, received
        elif now - begin > 1.0:
            return
        time.sleep(0.05)
