"""Row 3: cold start with a list against the better of nydus with and without prefetch, 1 Gbit/s."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from benchmarks.compare.cases import CASES
from benchmarks.compare.nydus import Nydus
from benchmarks.compare.ours import Lazy
from benchmarks.figures import Figure, ratio
from benchmarks.kit.proc import ToolError

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "cold start with a list against the better of nydus with and without prefetch"
_TARGET = 0.6


def measure(session: Session) -> list[Figure]:
    ours = Lazy(listed=True)
    peers = [Nydus(listed=False), Nydus(listed=True)]
    missing = peers[0].missing()
    if missing is not None:
        raise ToolError(missing)
    figures = []
    for letter, name in (("a", "numpy"), ("b", "tensorflow")):
        case = CASES[name]
        times: dict[str, list[float]] = {peer.name: [] for peer in (ours, *peers)}
        for peer in (ours, *peers):
            peer.prepare(session, case)
        for number in range(session.runs):
            for peer in (ours, *peers):
                times[peer.name].append(peer.start(session, case).total_s)
            shown = ", ".join(f"{key} {found[-1]:.2f} s" for key, found in times.items())
            session.say(f"{name} {number + 1}: {shown}")
        best = min(peers, key=lambda peer: statistics.median(times[peer.name]))
        title = f"{name}, lazyfs / {best.name}"
        figures.append(ratio(f"3{letter}", title, _TARGET, times[ours.name], times[best.name], **times))
    return figures
