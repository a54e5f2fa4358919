"""
What a tracker knows of one cluster: members, their swarms, who is isolated. Pure; all times are the store's clock.

Layer: tracker. Who calls: the stores change it (each instance has all of it in memory; with Redis it is a replica that
follows the log there), views and release read it. Invariants: a swarm has exactly the members whose state names it;
`Swarm.changes` grows whenever a row of its view may have become another one; an empty swarm is forgotten.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import msgspec

from lazyfs import shapes
from lazyfs.errors import BugError, FormatError
from lazyfs.peers.announce import COMPLETE, PARTIAL, SWARM_COUNT_MAX, Announced, Key, Seen, Standing

TTL_S = 15.0                     # of a member that is silent, in a small cluster: three beats, and a network's hiccup
BEATS_PER_S = 500.0              # that one tracker is to see of all: measured, benchmarks peers row 10
INTERVAL_S = 4.0                 # between beats of a member, where that many can be served
INTERVAL_MAX_S = 60.0
YOUNG_INTERVAL_S = 0.5           # while a swarm that it is in grows


class MemberState(msgspec.Struct, omit_defaults=True):
    """What is kept of a member: the part of a Beat that lasts."""

    member: Announced
    swarms: dict[Key, Standing] = {}


_decoder = shapes.json_decoder(MemberState)
_encoder = msgspec.json.Encoder()
_HASH_MAX = 2**64 - 1


def parse_state(data: bytes) -> MemberState:
    """Raises FormatError: it is none."""
    try:
        found = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"what is kept of a member is not understood: {error!s:.200}") from None
    if len(found.swarms) > SWARM_COUNT_MAX:
        raise FormatError(f"what is kept of a member names {len(found.swarms)} swarms, at most {SWARM_COUNT_MAX}")
    return found


def dump_state(state: MemberState) -> bytes:
    return _encoder.encode(state)


def _hash(row: Seen) -> int:
    """64 bits; the sum over a view does not depend on an order, and a change costs no look at the others."""
    return int.from_bytes(hashlib.blake2b(_encoder.encode(row), digest_size=8).digest())


def _shown(standing: Standing) -> tuple[bool, bool]:
    """Seen.complete, Seen.partial."""
    return standing.done == COMPLETE, standing.done >= PARTIAL


def interval_s(members: int, *, young: bool = False) -> float:
    """How long a member is to wait until it beats again, if there are so many in all clusters."""
    return min(INTERVAL_MAX_S, max(YOUNG_INTERVAL_S if young else INTERVAL_S, members / BEATS_PER_S))


def ttl_s(members: int) -> float:
    """After how long a silent member is gone, in a cluster of so many."""
    return max(TTL_S, 3 * interval_s(members) + 3)


@dataclass(slots=True)
class Snapshot:
    """The versions of a swarm's views (tracker.views), by cell; `size`: members when it was made."""

    made_at: float
    changes: int
    size: int
    versions: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class Verdict:
    """Who keeps a copy (tracker.release); `complete`, `members`: how many there were."""

    made_at: float
    complete: int
    members: int
    keepers: frozenset[str]


@dataclass(slots=True)
class Swarm:
    """
    Who takes part in a resource, of those in one network.

    Attributes:
        joined_at: when somebody came in last.
        born_at: when the first did.
        changes: see above.
        rows: of the view of all, those of isolated members left out; `fingerprint`: the sum of their hashes.
        snapshot: what views keep of it; `verdict`: what release does.

    """

    born_at: float
    joined_at: float
    members: dict[str, Standing] = field(default_factory=dict)
    changes: int = 0
    rows: dict[str, Seen] = field(default_factory=dict)
    fingerprint: int = 0
    snapshot: Snapshot | None = None
    verdict: Verdict | None = None

    def show(self, row: Seen) -> None:
        """A member's row is this one from now on."""
        self.hide(row.id)
        self.rows[row.id] = row
        self.fingerprint = (self.fingerprint + _hash(row)) & _HASH_MAX

    def hide(self, name: str) -> None:
        """A member is in no view any more."""
        row = self.rows.pop(name, None)
        if row is not None:
            self.fingerprint = (self.fingerprint - _hash(row)) & _HASH_MAX
        self.changes += 1

    @property
    def complete(self) -> int:
        return sum(one.done == COMPLETE for one in self.members.values())


@dataclass(slots=True)
class Entry:
    """A member. `raw`: the bytes that it was made of, to see at a glance that nothing is new."""

    state: MemberState
    heard_at: float
    raw: bytes = b""


class Cluster:
    """One cluster."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.members: dict[str, Entry] = {}
        self.swarms: dict[tuple[str, str], Swarm] = {}    # by network and Resource.key
        self.isolated: dict[str, float] = {}              # until when
        self.asked_at = 0.0

    def update(self, state: MemberState, now: float) -> None:
        """A member is here, or says something new."""
        name = state.member.id
        old = self.members.get(name)
        if old is None:
            self.members[name] = Entry(state, now)
        else:
            old.heard_at, old.raw = max(now, old.heard_at), b""
        before = old.state if old is not None else MemberState(state.member)
        if old is not None:
            old.state = state
        moved = before.member != state.member
        if before.member.network != state.member.network:
            self._leave(before, set(before.swarms))
        else:
            self._leave(before, set(before.swarms) - set(state.swarms))
        for key, standing in state.swarms.items():
            self._enter(state.member, key, standing, now, moved=moved)

    def heard(self, name: str, now: float) -> None:
        """It is still there."""
        entry = self.members.get(name)
        if entry is not None and entry.heard_at < now:
            entry.heard_at = now

    def gone(self, name: str) -> None:
        """It has left, or is silent for too long."""
        entry = self.members.pop(name, None)
        if entry is not None:
            self._leave(entry.state, set(entry.state.swarms))

    def isolate(self, name: str, until: float) -> None:
        """It is in no view until then."""
        self.isolated[name] = until
        self._touch(name)

    def sweep(self, now: float) -> list[str]:
        """End isolations whose time is over. Returns who is silent for too long: the store decides."""
        for name in [name for name, until in self.isolated.items() if until <= now]:
            del self.isolated[name]
            self._touch(name)
        limit = now - ttl_s(len(self.members))
        return [name for name, entry in self.members.items() if entry.heard_at < limit]

    def swarm(self, network: str, key: str) -> Swarm | None:
        return self.swarms.get((network, key))

    def _enter(self, member: Announced, key: str, standing: Standing, now: float, *, moved: bool) -> None:
        swarm = self.swarms.get((member.network, key))
        if swarm is None:
            swarm = self.swarms[member.network, key] = Swarm(now, now)
        before = swarm.members.get(member.id)
        swarm.members[member.id] = standing
        if before is None:
            swarm.joined_at = max(now, swarm.joined_at)
        if before is None or moved or _shown(before) != _shown(standing):
            self._show(swarm, member, standing)

    def _show(self, swarm: Swarm, member: Announced, standing: Standing) -> None:
        if member.id in self.isolated:
            swarm.hide(member.id)
        else:
            swarm.show(Seen(member.id, member.address, member.zone, member.up_rate, *_shown(standing)))

    def _leave(self, state: MemberState, keys: set[str]) -> None:
        for key in keys:
            place = (state.member.network, key)
            swarm = self.swarms.get(place)
            if swarm is None or swarm.members.pop(state.member.id, None) is None:
                raise BugError(f"{state.member.id} was not in the swarm of {key}")
            swarm.hide(state.member.id)
            if not swarm.members:
                del self.swarms[place]

    def _touch(self, name: str) -> None:
        """A member was isolated, or no longer is."""
        entry = self.members.get(name)
        if entry is not None:
            member = entry.state.member
            for key, standing in entry.state.swarms.items():
                self._show(self.swarms[member.network, key], member, standing)
