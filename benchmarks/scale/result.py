"""What came of a simulated cluster. Pure; printed by `python -m benchmarks.scale`, kept by the rows of the suite."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True)
class Result:
    """
    Times in simulated seconds since the node began, of nodes that lived to the end.

    Attributes:
        done_s: when each had all of it; hot_s: when each had what its start needs.
        unfinished: nodes that lived and had not all of it when time was up.
        ideal_s: image over the slowest of the origin's link and a node's two.
        origin_images: bytes that the origin sent, in images.
        depth: pieces by the number of links they passed since the origin (the origin's own is 1).
        uploads: pieces that each living node has given.
        cross_zone_images: bytes between zones, in images.
        counters: sums over all nodes of what their swarms counted.

    """

    nodes: int
    done_s: Sequence[float]
    hot_s: Sequence[float]
    unfinished: int
    ideal_s: float
    origin_images: float
    depth: Counter[int]
    uploads: Sequence[int]
    cross_zone_images: float = 0.0
    counters: Counter[str] = field(default_factory=Counter)

    @property
    def slowest_ratio(self) -> float:
        """The slowest node against the ideal; infinite where one is unfinished."""
        return float("inf") if self.unfinished else max(self.done_s) / self.ideal_s

    @property
    def spread(self) -> float:
        """p99 of the nodes' times ÷ their p50."""
        return percentile(self.done_s, 99) / percentile(self.done_s, 50)

    @property
    def upload_skew(self) -> float:
        """The busiest node's uploads ÷ the mean."""
        return max(self.uploads) / max(statistics.fmean(self.uploads), 1e-9)

    def lines(self) -> list[str]:
        """For people."""
        hops = sorted(self.depth.elements())
        lines = [
            (f"all of it   {percentile(self.done_s, 50):8.2f} s p50  {percentile(self.done_s, 99):8.2f} s p99  "
             f"{max(self.done_s, default=0):8.2f} s slowest = {self.slowest_ratio:.2f} x ideal ({self.ideal_s:.2f} s)"),
            (f"lazy start  {percentile(self.hot_s, 50):8.2f} s p50  {percentile(self.hot_s, 99):8.2f} s p99  "
             f"{max(self.hot_s, default=0):8.2f} s slowest"),
            f"origin      {self.origin_images:8.3f} images; between zones {self.cross_zone_images:.2f}",
            (f"hops        {percentile(hops, 50):8.0f} p50  {percentile(hops, 99):10.0f} p99  "
             f"{max(hops, default=0):10d} most"),
            f"uploads     {self.upload_skew:8.2f} = busiest ÷ mean",
        ]
        if self.unfinished:
            lines.append(f"UNFINISHED  {self.unfinished} of {self.nodes} nodes")
        if self.counters:
            lines.append("swarms      " + ", ".join(f"{name} {count}" for name, count in sorted(self.counters.items())))
        return lines


def percentile(values: Iterable[float], percent: int) -> float:
    """The value that `percent` of them do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] if ordered else 0.0
