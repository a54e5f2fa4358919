"""
A resource's swarm as this node knows it: its view, its place in each group's tree, and who turned out to have no part.

Layer: peers. Who calls: swarm, swarmfetch. Pure; times are trio's clock. Where nobody says who takes part in what (a
static list, DNS), everybody is in every view: who says that it lacks the resource is left out of the trees for a
time. Trees of views that differ make no rings (topology), so each node may do so by itself.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lazyfs.peers.model import View
from lazyfs.peers.topology import Place, Topology, group_seed

if TYPE_CHECKING:
    from lazyfs.peers.model import Member

PROBE_MISSES = 8        # heirs that had nothing, in a row: from then on only every eighth is asked
PROBE_MISSES_READ = 3   # the same where a read waits for the answer, and with it all that wait for this root; then
PROBE_READ_EVERY = 32
LEFT_OUT_S = 5.0        # the first time, then twice as long each time,
LEFT_OUT_MAX_S = 300.0
SETTLE_S = 0.1          # many turn out at the same time: the trees are made anew once


class Known:
    """A resource's swarm. `probe_misses`: heirs that had nothing, in a row; under an older view too."""

    def __init__(self, view: View, topology: Topology, probe_misses: int = 0) -> None:
        self.view = view
        self.topology = self._trees = topology    # of all; of those that are not left out
        self.probe_misses = probe_misses
        self._places: dict[int, Place] = {}
        self._up_rate: int | None = None
        self._lacking: dict[str, tuple[int, float]] = {}    # member: how often it said so, until when it is left out
        self._left_out: frozenset[str] = frozenset()
        self._look_at = math.inf
        self._by_address: dict[str, Member] | None = None

    def place(self, me: Member, key: str, group: int, now: float) -> Place:
        """Where a member of the view, this node, stands in a group's tree. `me`: as it counts itself."""
        if now >= self._look_at:
            self._leave_out(now)
        if me.up_rate != self._up_rate:
            self._up_rate = me.up_rate
            self._places.clear()
        place = self._places.get(group)
        if place is None:
            place = self._places[group] = self._trees.place(me.id, group_seed(key, group), me.up_rate)
        return place

    def at(self, address: str) -> Member | None:
        """The member of that address: nobody else is asked because a peer named it."""
        if self._by_address is None:
            self._by_address = {member.address: member for member in self.topology.members}
        return self._by_address.get(address)

    def member(self, member_id: str) -> Member | None:
        return self.topology.member(member_id)

    def probe_pays(self, *, read: bool) -> bool:
        """Whether to ask an heir before the origin. `read`: one waits for it."""
        if self.probe_misses < (PROBE_MISSES_READ if read else PROBE_MISSES):
            return True
        self.probe_misses += 1
        return self.probe_misses % (PROBE_READ_EVERY if read else PROBE_MISSES) == 0

    def lacks(self, member_id: str, now: float) -> None:
        """It was asked, and had nothing and could get nothing."""
        times, until = self._lacking.get(member_id, (0, 0.0))
        if until <= now:
            self._lacking[member_id] = times + 1, now + min(LEFT_OUT_MAX_S, LEFT_OUT_S * 2**min(times, 16))
            self._look_at = min(self._look_at, now + SETTLE_S)

    def _leave_out(self, now: float) -> None:
        out = frozenset(name for name, (_, until) in self._lacking.items() if until > now)
        if out != self._left_out:
            self._left_out = out
            self._places.clear()
            rest = tuple(member for member in self.topology.members if member.id not in out)
            self._trees = Topology(View(rest, self.view.complete - out, self.view.partial)) if out else self.topology
        self._look_at = min((self._lacking[name][1] for name in out), default=math.inf)
