"""Row 2: a second container of the same image, prepared and started, against overlayfs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, ratio
from benchmarks.kit.node import SNAPSHOTTER, Node
from benchmarks.session import NUMPY

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "second container of the same image, prepared and started, against overlayfs"
_STARTS_PER_RUN = 5


def measure(session: Session) -> list[Figure]:
    lazy = session.lazy(NUMPY, session.near)
    plain = session.source(NUMPY, session.near)
    with Node(session.place) as node:
        return _compare(session, node, lazy, plain)


def _compare(session: Session, node: Node, lazy: str, plain: str) -> list[Figure]:
    node.pull(lazy)
    node.containerd.pull(plain)
    figures = []
    for key, command, target in (("2", ["true"], 1.1), ("2-numpy", NUMPY.command, None)):
        node.containerd.run(lazy, command, SNAPSHOTTER)
        node.containerd.run(plain, command)
        ours, theirs = [], []
        for _ in range(session.runs * _STARTS_PER_RUN):
            theirs.append(node.containerd.run(plain, command))
            ours.append(node.containerd.run(lazy, command, SNAPSHOTTER))
        figures.append(ratio(key, " ".join(command[:1]), target, ours, theirs))
    return figures
