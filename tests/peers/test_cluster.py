"""Real nodes in network namespaces that start together, and what fails in mid-transfer: right bytes, no hang."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
from typing import TYPE_CHECKING

import pytest

from benchmarks.kit.cluster import TRACKER_PORTS
from tests.peerskit import SIZE, reading, right, small_cluster, spoil, wait_for, wait_received

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.kit.cluster import Cluster, Node
    from benchmarks.session import Session

pytestmark = pytest.mark.mount

MIDDLE = SIZE // 3


def test_nodes_that_start_together_fetch_one_copy(session: Session) -> None:
    with small_cluster(session, 5) as cluster:
        before = cluster.origin_bytes()
        with reading(cluster.nodes) as digests:
            assert digests.of(cluster.nodes) == {right(session)}
        assert cluster.origin_bytes() - before <= 1.6 * SIZE     # 1.04 with headers; a slow machine hedges
        given = [node.peers()["uploads"]["bytes"] for node in cluster.nodes]
        assert sum(given) >= SIZE * (len(cluster.nodes) - 2)
        assert sum(map(bool, given)) >= 3


def kill(cluster: Cluster, node: Node) -> None:
    node.kill()


def freeze(cluster: Cluster, node: Node) -> None:
    node.freeze()


def cut_off(cluster: Cluster, node: Node) -> None:
    cluster.rack.cut(node.name)


def slow_down(cluster: Cluster, node: Node) -> None:
    cluster.rack.shape(node.name, 1_000_000)


@pytest.mark.parametrize("harm", [kill, freeze, cut_off, slow_down])
def test_a_peer_that_fails_in_mid_transfer_hurts_nobody_else(session: Session,
                                                            harm: Callable[[Cluster, Node], None]) -> None:
    with small_cluster(session, 3, discovery="static") as cluster, reading(cluster.nodes) as digests:
        victim, *others = cluster.nodes
        wait_received(cluster, victim, MIDDLE)
        harm(cluster, victim)
        assert digests.of(others) == {right(session)}


def test_a_peer_whose_disk_lies_gives_nobody_wrong_bytes(session: Session) -> None:
    with small_cluster(session, 3, discovery="static") as cluster:
        liar, *others = cluster.nodes
        with reading([liar]) as digests:
            assert digests.of([liar]) == {right(session)}
        spoil(liar)
        with reading(others) as digests:
            assert digests.of(others) == {right(session)}
        seen = [peer for node in others for peer in node.peers()["peers"] if peer["wrong_pieces"]]
        assert all(peer["away"] == "lied" for peer in seen)      # who has not asked, or was not lied to, knows nothing
        assert {peer["address"].partition(":")[0] for peer in seen} <= {liar.machine.address}


def test_the_registry_goes_and_the_peers_have_it_all(session: Session) -> None:
    with small_cluster(session, 3) as cluster:
        first, *others = cluster.nodes
        with reading([first]) as digests:
            assert digests.of([first]) == {right(session)}
        wait_for(lambda: all(_complete(node) for node in others), "the others hear that the first has it")
        cluster.rack.cut("registry")
        with reading(others) as digests:
            assert digests.of(others) == {right(session)}


def _complete(node: Node) -> int:
    return max((swarm["complete"] for swarm in node.peers()["swarms"].values()), default=0)


def test_swarms_go_on_without_trackers(session: Session) -> None:
    with small_cluster(session, 3) as cluster:
        before = cluster.origin_bytes()
        with reading(cluster.nodes) as digests:
            wait_received(cluster, cluster.nodes[0], MIDDLE)
            for tracker, number in zip(cluster.trackers, (signal.SIGKILL, signal.SIGSTOP), strict=True):
                os.kill(tracker.pid, number)
            assert digests.of(cluster.nodes) == {right(session)}
        assert cluster.origin_bytes() - before <= 2 * SIZE       # each alone from the middle on: 2.3


def test_swarms_go_on_without_redis_and_with_one_tracker_and_both_are_told_and_made_good(session: Session) -> None:
    with small_cluster(session, 3) as cluster:
        assert cluster.redis is not None
        before = cluster.origin_bytes()
        with reading(cluster.nodes) as digests:
            wait_received(cluster, cluster.nodes[0], MIDDLE)
            for server in (cluster.redis, cluster.trackers[0]):
                os.kill(server.pid, signal.SIGKILL)
            wait_for(lambda: "does not answer" in told(cluster, "/readyz"), "the tracker says that Redis is gone")
            assert digests.of(cluster.nodes) == {right(session)}
        assert cluster.origin_bytes() - before <= 2 * SIZE
        cluster.redis.close()
        cluster.start_redis()                                    # with nothing in it
        wait_for(lambda: '"ready":true' in told(cluster, "/readyz"), "the tracker says that Redis is back")
        wait_for(lambda: '"members":3' in told(cluster, "/v1/clusters/bench"), "all nodes have told it again")


def told(cluster: Cluster, path: str) -> str:
    """What the second tracker answers, error or not."""
    def ask() -> str:
        connection = http.client.HTTPConnection(cluster.control.address, TRACKER_PORTS[1], timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().read().decode()

    return cluster.control.reach(ask)
