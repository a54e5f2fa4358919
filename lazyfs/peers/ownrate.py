"""
What this node says of its own rate: nothing, until it finds that it gives much less than others say that they give.

Layer: peers. Who calls: peers.endpoint, benchmarks.scale. Pure; times are trio's clock. Said is what is relative: a
quarter of what is usual here counts like a quarter of topology.RATE_TYPICAL, whatever the network's speed. So rows of
views change only where somebody is slow. A node that says that it is slow is a leaf in the others' trees as soon as
they hear of it; itself it takes its new place only when all have, so that differing views make no ring (topology).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from lazyfs.peers.topology import RATE_TYPICAL

if TYPE_CHECKING:
    from lazyfs.peers.model import Member
    from lazyfs.peers.rates import Giving, Rates

HEARD_S: Final = 150.0           # by then everybody has heard it: beats come every 60 s at most, and trackers follow
KEPT_S: Final = 900.0            # then it is forgotten and found anew: what is a leaf is asked for little
CHANGE_STEPS: Final = 2          # less is not said anew


class OwnRate:
    """
    Of one node, as it was configured: `me`.

    :said: what others are to see. :own: what it counts itself as.
    """

    def __init__(self, me: Member, giving: Giving, rates: Rates) -> None:
        self.said = self.own = self._me = me
        self._giving, self._rates = giving, rates
        self._below = 0
        self._at = 0.0

    def look(self, now: float) -> bool:
        """Compare; True: `said` or `own` has changed."""
        before = self.said, self.own
        if self._below and now - self._at > KEPT_S:
            self._giving.forget()
            self._say(0, now)
        elif self._giving.step and self._rates.usual:
            below = self._rates.steps_below(self._giving.step)
            if (below > 0) != (self._below > 0) or abs(below - self._below) >= CHANGE_STEPS:
                self._say(below, now)
        if self.own != self.said and now - self._at >= HEARD_S:
            self.own = self.said
        return (self.said, self.own) != before

    def _say(self, below: int, now: float) -> None:
        rate = self._me.up_rate or RATE_TYPICAL
        faster = below < self._below
        self._below, self._at = below, now
        self.said = replace(self._me, up_rate=max(1, rate >> below)) if below else self._me
        if faster:
            self.own = self.said
