"""
When a swarm has done its work: who is told that a copy kept for others can go. Pure.

Layer: tracker. Who calls: tracker.service, for each beat. First some: nobody came for QUIET_S and most have all of it;
then only the keepers stay, a tenth of the complete members, at least KEEPERS_MIN in each zone. Then all: everybody has
all of it, and nobody came for IDLE_S. A copy that a node needs itself stays with it; what is asked for later comes from
there, or from the registry. A swarm that all have left is forgotten (tracker.state).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import xxhash

from lazyfs.peers.announce import COMPLETE
from lazyfs.tracker.state import Verdict

if TYPE_CHECKING:
    from lazyfs.tracker.state import Cluster, Swarm

QUIET_S = 60.0                   # a rollout in batches has longer pauses; then the keepers serve the next batch
IDLE_S = 600.0
COMPLETE_SHARE = 0.75
KEEPERS_SHARE = 0.1
KEEPERS_MIN = 3                  # one may die, one may be slow
LOOK_S = 5.0                     # between two looks at a whole swarm
SOME: Final = "some"
ALL: Final = "all"


def release(cluster: Cluster, swarm: Swarm, key: str, name: str, now: float) -> str:
    """What a member is told of its copy: "some", "all", or nothing (empty)."""
    standing = swarm.members.get(name)
    quiet_s = now - swarm.joined_at
    if standing is None or standing.need or standing.done < COMPLETE or quiet_s < QUIET_S:
        return ""
    verdict = swarm.verdict
    if verdict is None or verdict.made_at < max(swarm.joined_at, now - LOOK_S):
        verdict = swarm.verdict = _look(cluster, swarm, key, now)
    if quiet_s >= IDLE_S and verdict.complete == verdict.members:
        return ALL
    enough = verdict.complete >= COMPLETE_SHARE * verdict.members
    return SOME if enough and name not in verdict.keepers else ""


def _look(cluster: Cluster, swarm: Swarm, key: str, now: float) -> Verdict:
    zones: dict[str, list[str]] = {}
    for name, standing in swarm.members.items():
        if standing.done == COMPLETE:
            zones.setdefault(cluster.members[name].state.member.zone, []).append(name)
    keepers: list[str] = []
    for names in zones.values():
        count = max(KEEPERS_MIN, round(KEEPERS_SHARE * len(names)))
        keepers += sorted(names, key=lambda name: _order(key, name))[:count]
    return Verdict(now, sum(map(len, zones.values())), len(swarm.members), frozenset(keepers))


def _order(key: str, name: str) -> int:
    """Who keeps a copy is another one for each resource, and the same for all trackers."""
    return xxhash.xxh64_intdigest(f"{key} {name}".encode())
