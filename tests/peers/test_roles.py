"""In mid-transfer fail, in a real cluster: the registry, trackers, Redis, workers, the bytes and the rate of a node."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.peerskit import RATE_BIT_S, SIZE, reading, right, small_cluster, spoil, wait_for, wait_received, wait_stalled

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.session import Session

pytestmark = pytest.mark.mount

MIDDLE = SIZE // 3


def test_a_registry_that_freezes_goes_slow_vanishes_and_dies_in_mid_transfer_ends_no_read(session: Session) -> None:
    with small_cluster(session, 3, discovery="static") as cluster:
        registry, began = cluster.registry.daemon.pid, cluster.origin_bytes()
        trouble: list[tuple[Callable[[], object], Callable[[], object]]] = [
            (lambda: os.kill(registry, signal.SIGSTOP), lambda: os.kill(registry, signal.SIGCONT)),
            (lambda: cluster.rack.shape("registry", 1_000_000), lambda: cluster.rack.shape("registry", RATE_BIT_S)),
            (lambda: cluster.rack.cut("registry"), lambda: cluster.rack.join("registry")),
            (lambda: os.kill(registry, signal.SIGKILL), cluster.restart_registry),
        ]
        with reading(cluster.nodes) as digests:
            for number, (harm, mend) in enumerate(trouble, 1):
                sent = began + number * SIZE // 5
                wait_for(lambda sent=sent: cluster.origin_bytes() >= sent, "the registry sends")    # type: ignore[misc]
                harm()
                wait_stalled(cluster)
                mend()
            assert digests.of(cluster.nodes) == {right(session)}
        assert cluster.origin_bytes() - began <= 2.4 * SIZE      # each alone: 3


def test_a_node_that_reaches_no_tracker_and_trackers_whose_redis_hangs_go_on(session: Session) -> None:
    with small_cluster(session, 3) as cluster:
        assert cluster.redis is not None
        before, (lone, *_) = cluster.origin_bytes(), cluster.nodes
        with reading(cluster.nodes) as digests:
            wait_received(cluster, lone, MIDDLE)
            cluster.rack.part(lone.name, "control")
            os.kill(cluster.redis.pid, signal.SIGSTOP)
            assert digests.of(cluster.nodes) == {right(session)}
        assert cluster.origin_bytes() - before <= 2 * SIZE       # each alone from the middle on: 2.3
        wait_for(lambda: lone.peers()["membership"]["lost_s"] > 0, "it knows that it has no tracker")


def test_workers_that_die_and_hang_in_mid_transfer_end_no_read_not_even_their_own(session: Session) -> None:
    with small_cluster(session, 3, discovery="static", hang_s=4) as cluster:
        dies, hangs, _ = cluster.nodes
        with reading(cluster.nodes) as digests:
            wait_received(cluster, dies, MIDDLE)
            os.kill(dies.daemon.worker, signal.SIGKILL)
            os.kill(hangs.daemon.worker, signal.SIGSTOP)
            assert digests.of(cluster.nodes) == {right(session)}


def test_a_peer_that_begins_to_lie_in_mid_transfer_is_found_and_left_alone(session: Session) -> None:
    with small_cluster(session, 3, discovery="static") as cluster:
        liar, *others = cluster.nodes
        with reading([liar]):
            wait_received(cluster, liar, SIZE // 2)
            spoil(liar)
            with reading(others) as digests:
                assert digests.of(others) == {right(session)}
        seen = [peer for node in others for peer in node.peers()["peers"] if peer["wrong_pieces"]]
        assert seen
        assert all(peer["away"] == "lied" for peer in seen)
        assert {peer["address"].partition(":")[0] for peer in seen} <= {liar.machine.address}
