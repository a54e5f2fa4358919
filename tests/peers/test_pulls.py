"""Ordinary pulls by real containerds, each through its node's mirror, while something fails in mid-transfer."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.containerdkit import VERSIONS
from tests.peerskit import SIZE, wait_for, wait_received, wait_stalled
from tests.pullkit import pull_nodes

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.session import Session

pytestmark = pytest.mark.mount

MIDDLE = SIZE // 3


def test_containerds_that_pull_together_fetch_about_one_copy(session: Session, tmp_path: Path) -> None:
    with pull_nodes(session, tmp_path, ["2.x", "1.6", "2.x"], rate_bit_s=200_000_000, discovery="tracker") as rig:
        name, image = rig.push("together", [SIZE, 100_000])
        before = rig.cluster.origin_bytes()
        assert rig.pull_all(name, rig.nodes) == ["", "", ""]
        assert all(node.has(image) for node in rig.nodes)
        assert rig.cluster.origin_bytes() - before <= 2.4 * SIZE     # each alone: 3; all at the same moment: 1.1
        assert sum(node.from_peers() for node in rig.nodes) >= SIZE / 2


@pytest.mark.parametrize("version", VERSIONS)
def test_a_mirror_that_is_killed_in_mid_pull_does_not_end_the_pull(session: Session, tmp_path: Path,
                                                                   version: str) -> None:
    with pull_nodes(session, tmp_path, [version]) as rig:
        (node,) = rig.nodes
        name, image = rig.push(f"killed{version[0]}", [SIZE])
        with node.pulling(name) as pull:
            wait_received(rig.cluster, node, MIDDLE)
            node.mirror.stop(signal.SIGKILL)
            assert pull.ended() == ""
        assert node.has(image)


def test_other_nodes_mirrors_that_die_and_freeze_in_mid_pull_do_not_end_the_pull(session: Session,
                                                                                 tmp_path: Path) -> None:
    with pull_nodes(session, tmp_path, ["2.x", "", ""]) as rig:
        node, dies, freezes = rig.nodes
        name, image = rig.push("fail", [SIZE])
        for other in (dies, freezes):
            other.fetch(name, image)
        with node.pulling(name) as pull:
            wait_for(lambda: node.from_peers() > 1 << 20, "they give")
            dies.mirror.stop(signal.SIGKILL)
            freezes.freeze_mirror()
            assert pull.ended() == ""
        assert node.has(image)


def test_a_registry_that_freezes_in_mid_pull_is_waited_for_and_not_missed_where_peers_have_it(
        session: Session, tmp_path: Path) -> None:
    with pull_nodes(session, tmp_path, ["2.x", ""]) as rig:
        node, other = rig.nodes
        registry = rig.cluster.registry.daemon.pid
        shared, shared_image = rig.push("freezes-shared", [SIZE])
        alone, alone_image = rig.push("freezes-alone", [SIZE])
        other.fetch(shared, shared_image)
        for name, image in ((shared, shared_image), (alone, alone_image)):
            before = rig.cluster.rack.counted()[node.name].received
            with node.pulling(name) as pull:
                wait_received(rig.cluster, node, before + MIDDLE)
                os.kill(registry, signal.SIGSTOP)
                if name == alone:
                    wait_stalled(rig.cluster)
                    os.kill(registry, signal.SIGCONT)
                assert pull.ended() == ""
            os.kill(registry, signal.SIGCONT)
            assert node.has(image)


@pytest.mark.parametrize("version", VERSIONS)
def test_another_nodes_mirror_that_gives_wrong_bytes_costs_a_retry_at_most(session: Session, tmp_path: Path,
                                                                           version: str) -> None:
    with pull_nodes(session, tmp_path, [version, ""]) as rig:
        node, liar = rig.nodes
        name, image = rig.push(f"wrong{version[0]}", [SIZE])
        liar.fetch(name, image)
        liar.spoil(SIZE // 2)
        with node.pulling(name) as pull:
            assert "unexpected commit digest" in pull.ended()    # they had been passed on before all of them were there
        assert node.mirror.figure("lazyfs_mirror_wrong_pieces_total") > 0
        assert rig.pull_all(name, [node]) == [""]
        assert node.has(image)
