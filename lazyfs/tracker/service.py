"""
The tracker's own routes: beats of members, what it knows, its health. Others add routes and words of a beat to it.

Layer: tracker. Who calls: tracker.run makes one; extensions (tokens, preheat) call `routes.add` and `on_beat` before it
serves. No state but what can be made anew: views that were given, counters. Any number of trackers serve the same
clusters, each beat may go to another one.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from lazyfs import shapes
from lazyfs.errors import FormatError, NotFoundError
from lazyfs.peers.announce import CLUSTER, REPORT_COUNT_MAX, Announced, Beat, BeatAnswer, Report
from lazyfs.peers.packed import ENCODING, PACK_BYTES_MIN, pack
from lazyfs.registry.addresses import Reach, reach_of
from lazyfs.tracker.moved import Moved
from lazyfs.tracker.release import release
from lazyfs.tracker.state import MemberState, dump_state, interval_s
from lazyfs.tracker.views import Views
from lazyfs.tracker.web import Answer, refusal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from lazyfs.tracker.state import Cluster, Entry, Swarm
    from lazyfs.tracker.store import Store
    from lazyfs.tracker.web import Request, Routes

    Hook = Callable[[str, str, msgspec.Raw | None], Awaitable[msgspec.Raw | None]]

YOUNG_S = 5.0                    # so long after somebody joined, a swarm's members beat more often
JOIN_WAIT_S = 1.5                # at most: who joins gets a view that those who join with it get too
_SHOWN_COUNT_MAX = 1000          # swarms, members, in answers for people; more: `?after=NAME`
_encode = msgspec.json.Encoder().encode
_HERE = msgspec.Raw(b"null")     # where views are to be


class _Skimmed(msgspec.Struct):
    """A Beat whose larger parts are looked at only if they have changed."""

    member: msgspec.Raw
    swarms: msgspec.Raw = msgspec.Raw(b"{}")
    seen: dict[str, str] = {}
    leave: bool = False
    reports: list[msgspec.Raw] = []
    extra: dict[str, msgspec.Raw] = {}


_skim = shapes.json_decoder(_Skimmed).decode
_whole = shapes.json_decoder(Beat).decode
_who = shapes.json_decoder(Announced).decode
_report = shapes.json_decoder(Report).decode


class Service:
    """
    Answers. `counters`: beats, changes, joins, leaves, reports, view_bytes, releases.

    Attributes:
        store: for extensions too: members (`cluster`), and what they keep (`put`, `get`, `all`, `drop`).
        routes: where extensions add theirs.

    """

    def __init__(self, store: Store, routes: Routes) -> None:
        self.store = store
        self.routes = routes
        self.counters: Counter[str] = Counter()
        self._views = Views()
        self._hooks: dict[str, Hook] = {}
        self._moved = Moved()
        routes.add("POST", "/v1/clusters/{cluster}/beat", self._beat)
        routes.add("GET", "/v1/clusters", self._list)
        routes.add("GET", "/v1/clusters/{cluster}", self._show)
        routes.add("GET", "/v1/clusters/{cluster}/members", self._members)
        routes.add("GET", "/healthz", self._alive, guarded=False)
        routes.add("GET", "/readyz", self._ready, guarded=False)

    def on_beat(self, word: str, hook: Hook) -> None:
        """
        Have `hook` asked in each beat: (cluster, member's id, what it said under that word) -> what it is told.

        It should be quick; what it raises is the beat's answer.
        """
        self._hooks[word] = hook

    @property
    def member_count(self) -> int:
        """Of all clusters."""
        return sum(len(cluster.members) for cluster in self.store.clusters.values())

    async def _beat(self, request: Request) -> Answer:
        self.counters["beats"] += 1
        name = _cluster_name(request)
        try:
            said = _skim(request.body)
            member = _who(said.member)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(f"this is not a beat: {error!s:.200}") from None
        if said.leave:
            self.counters["leaves"] += 1
            await self.store.leave(name, member.id)
            return Answer(200, _encode(BeatAnswer(interval_s(self.member_count))))
        cluster = await self.store.cluster(name)
        entry = cluster.members.get(member.id)
        raw = b"".join((said.member, b"\n", said.swarms, request.peer.encode() if member.address[0] == ":" else b""))
        if entry is None or entry.raw != raw:
            cluster = await self._changed(name, request, raw)
        else:
            await self.store.heard(name, member.id)
        if said.reports:
            await self._reported(name, member.id, said.reports)
        answer, lacks = self._answer(cluster, member, said.seen)
        for word, hook in self._hooks.items():
            told = await hook(name, member.id, said.extra.get(word))
            if told is not None:
                answer.extra[word] = told
        if (ENCODING in request.header("accept-encoding") and sum(map(len, answer.views)) >= PACK_BYTES_MIN):
            return self._packed(answer, lacks)
        return Answer(200, _encode(answer))

    def _packed(self, answer: BeatAnswer, lacks: list[tuple[str, str]]) -> Answer:
        """Each view as a frame that is made once for all, between frames of the rest."""
        answer.views = [_HERE]
        before, _, after = _encode(answer).partition(b'"views":[%b]' % bytes(_HERE))
        views = pack(b",").join(self._views.packed(version, seen) for version, seen in lacks)
        body = b"".join((pack(before + b'"views":['), views, pack(b"]" + after)))
        return Answer(200, body, headers=(("Content-Encoding", ENCODING),))

    async def _changed(self, name: str, request: Request, raw: bytes) -> Cluster:
        """Keep what a member says; who joins a swarm waits for others that do."""
        self.counters["changes"] += 1
        try:
            said = _whole(request.body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(f"this is not a beat: {error!s:.200}") from None
        if said.member.address.startswith(":"):
            host = f"[{request.peer}]" if ":" in request.peer else request.peer
            said.member.address = host + said.member.address
        _check_address(said.member, request.peer)
        cluster = await self.store.cluster(name)
        known = cluster.members.get(said.member.id)
        new = said.swarms.keys() - (known.state.swarms.keys() if known is not None else set())
        if known is not None:
            self._moved.note(name, known.state.member, said.member)
        state = MemberState(said.member, said.swarms)
        if known is None or known.state != state:    # else another tracker was told
            await self.store.update(name, said.member.id, dump_state(state))
        else:
            await self.store.heard(name, said.member.id)
        cluster = await self.store.cluster(name)
        if new:
            self.counters["joins"] += len(new)
        if new and not _is_alone(cluster, known):
            due = max((self._views.due_at(swarm) for key in new
                       if (swarm := cluster.swarm(said.member.network, key)) is not None), default=0.0)
            await trio.sleep(min(JOIN_WAIT_S, max(0.0, due - self.store.now())))
            cluster = await self.store.cluster(name)
        entry = cluster.members.get(said.member.id)
        if entry is not None:
            entry.raw = raw
        return cluster

    async def _reported(self, name: str, by: str, raws: list[msgspec.Raw]) -> None:
        try:
            reports = [_report(raw) for raw in raws[:REPORT_COUNT_MAX]]
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(f"this is not a report: {error!s:.200}") from None
        self.counters["reports"] += len(reports)
        await self.store.report(name, by, sorted({one.id for one in reports}))

    def _answer(self, cluster: Cluster, member: Announced,
                seen: dict[str, str]) -> tuple[BeatAnswer, list[tuple[str, str]]]:
        """Of a member that is known: its views, as far as it does not have them; and which: version, and since when."""
        now = self.store.now()
        answer = BeatAnswer(1.0, {}, [], {}, sorted(cluster.isolated), {}, len(cluster.members))
        entry = cluster.members.get(member.id)
        young = False
        sent: dict[str, str] = {}
        for key in entry.state.swarms if entry is not None else ():
            swarm = cluster.swarm(member.network, key)
            if swarm is None:
                continue
            version = self._views.version(swarm, member.id, now)
            answer.swarms[key] = version
            if seen.get(key) != version and version not in sent:
                sent[version] = seen.get(key, "")
                part = self._views.part(version, sent[version])
                self.counters["view_bytes"] += len(part)
                answer.views.append(part)
            young = young or swarm.joined_at > now - YOUNG_S
            told = release(cluster, swarm, key, member.id, now)
            if told:
                self.counters["releases"] += 1
                answer.release[key] = told
        answer.seconds = interval_s(self.member_count, young=young)
        return answer, list(sent.items())

    async def _list(self, _request: Request) -> Answer:
        await trio.lowlevel.checkpoint()
        return Answer(200, _encode([{"cluster": name, "members": len(cluster.members), "swarms": len(cluster.swarms),
                                     "isolated": len(cluster.isolated)}
                                    for name, cluster in sorted(self.store.clusters.items())]))

    async def _show(self, request: Request) -> Answer:
        cluster = await self._known(request)
        now = self.store.now()
        zones = Counter(entry.state.member.zone for entry in cluster.members.values())
        places = _page(request, sorted(cluster.swarms, key=lambda place: (place[1], place[0])), lambda place: place[1])
        swarms = [{"resource": key, "network": network, **_progress(cluster.swarms[network, key])}
                  for network, key in places]
        isolated = [{"id": name, "seconds": round(until - now, 1)} for name, until in sorted(cluster.isolated.items())]
        return Answer(200, _encode({"cluster": cluster.name, "members": len(cluster.members), "zones": dict(zones),
                                    "swarms": swarms, "isolated": isolated}))

    async def _members(self, request: Request) -> Answer:
        cluster = await self._known(request)
        now = self.store.now()
        found: list[dict[str, Any]] = []
        for name in _page(request, sorted(cluster.members), str):
            entry = cluster.members[name]
            found.append({**msgspec.to_builtins(entry.state.member), "swarms": len(entry.state.swarms),
                          "heard_s": round(now - entry.heard_at, 1), "isolated": name in cluster.isolated})
        return Answer(200, _encode(found))

    async def _known(self, request: Request) -> Cluster:
        """Raises NotFoundError: nobody has been heard of that cluster."""
        cluster = await self.store.cluster(_cluster_name(request))
        if not cluster.members:
            raise NotFoundError(f"cluster {cluster.name} has no members")
        return cluster

    async def _alive(self, _request: Request) -> Answer:
        await trio.lowlevel.checkpoint()
        return Answer(200, b'{"alive":true}\n')

    async def _ready(self, _request: Request) -> Answer:
        await trio.lowlevel.checkpoint()
        problem = self.store.problem()
        return refusal(503, problem) if problem else Answer(200, b'{"ready":true}\n')


def _check_address(member: Announced, peer: str) -> None:
    """Raises FormatError: others who go there come to themselves, or to their cloud's metadata, or nowhere."""
    host, _, port = member.address.rpartition(":")
    is_here = reach_of(peer) is Reach.MACHINE       # all of them on one machine
    if not 0 < int(port) < 65536 or (reach_of(host.strip("[]")) is Reach.MACHINE and not is_here):
        raise FormatError(f"member {member.id} says that it is at {member.address}: no other node reaches it there",
                          hint="peers.address and peers.advertise of that node: its address in the others' network")


def _is_alone(cluster: Cluster, known: Entry | None) -> bool:
    """Whether nobody can join with it: it is the only member, and has been since before: others begin when it does."""
    return known is not None and len(cluster.members) == 1


def _progress(swarm: Swarm) -> dict[str, Any]:
    """`origin_copies`: how many times the whole of it has come from the registry, so far as members say."""
    return {"members": len(swarm.members), "complete": swarm.complete,
            "origin_copies": sum(one.origin for one in swarm.members.values()) / 1000}


def _cluster_name(request: Request) -> str:
    name = request.names["cluster"]
    if CLUSTER.fullmatch(name) is None:
        raise FormatError(f"{name!r:.140} is not the name of a cluster", hint="letters, digits, dot, dash, underscore")
    return name


def _page(request: Request, things: list[Any], name_of: Callable[[Any], str]) -> list[Any]:
    after = request.query.removeprefix("after=") if request.query.startswith("after=") else ""
    return [one for one in things if name_of(one) > after][:_SHOWN_COUNT_MAX]
