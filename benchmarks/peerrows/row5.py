"""
Row 5: the published test of others (TensorFlow, 3 GB; registry 10 Gbit/s, nodes 6 Gbit/s), simulated.

The lazy start is the time until the hot part is there (50 MB, as of the tensorflow image of suite `profile`); the
program's own seconds are not in it. A node's processor gives and receives 400 MB/s in all: row 7's target, so slower
than the links.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks.figures import Figure, plain
from benchmarks.peerrows.simulated import results
from benchmarks.scale.setting import Setting

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "TensorFlow, 3 GB, simulated: 50, 100, 200, 500 nodes"
_COUNTS = (50, 100, 200, 500)
_CLUSTER = Setting(image_mib=2864, piece_kib=4096, node_mbit=6000.0, origin_mbit=10_000.0, work_mb=400.0, window=32,
                   hot_mib=48)


def measure(session: Session) -> list[Figure]:
    """Figures 5a (flat), 5b (lazy start), 5c (all of it), at 500 nodes; one draw: minutes."""
    found = results([replace(_CLUSTER, nodes=count) for count in _COUNTS])
    for count, one in zip(_COUNTS, found, strict=True):
        session.say(f"{count} nodes: lazy start {max(one.hot_s):.2f} s, all {max(one.done_s):.2f} s")
    lazy = [max(one.hot_s) for one in found]
    whole = [max(one.done_s) for one in found]
    return [
        plain("5a", "500 nodes ÷ 50 nodes, all of it", 1.3, "x", [whole[-1] / whole[0]]),
        plain("5b", "lazy start, 500 nodes", 10.0, "s", [lazy[-1]], by_count=lazy),
        plain("5c", "all of it, 500 nodes", 20.0, "s", [whole[-1]], by_count=whole),
    ]
