"""Ordinary pulls by real containerds, each through its node's mirror, while something fails in mid-transfer."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from tests.containerdkit import VERSIONS
from tests.peerskit import SIZE, wait_for, wait_received
from tests.pullkit import pull_nodes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.session import Session
    from tests.pullkit import PullNode, Rig

    Harm = Callable[[Rig, PullNode], None]

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


def kill(_: Rig, node: PullNode) -> None:
    node.mirror.stop(signal.SIGKILL)


def freeze(_: Rig, node: PullNode) -> None:
    node.freeze_mirror()


def cut_off(rig: Rig, node: PullNode) -> None:
    rig.cluster.rack.cut(node.name)


def slow_down(rig: Rig, node: PullNode) -> None:
    rig.cluster.rack.shape(node.name, 1_000_000)


@pytest.mark.parametrize("harms", [(kill, freeze), (cut_off, slow_down)])
def test_other_nodes_mirrors_that_fail_in_mid_pull_do_not_end_the_pull(session: Session, tmp_path: Path,
                                                                       harms: tuple[Harm, Harm]) -> None:
    with pull_nodes(session, tmp_path, ["2.x", "", ""]) as rig:
        node, *victims = rig.nodes
        name, image = rig.push(f"fail-{harms[0].__name__}", [SIZE])
        for victim in victims:
            victim.fetch(name, image)
        with node.pulling(name) as pull:
            wait_for(lambda: node.from_peers() > 1 << 20, "they give")
            for harm, victim in zip(harms, victims, strict=True):
                harm(rig, victim)
            assert pull.ended() == ""
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
