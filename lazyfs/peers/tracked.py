"""
Membership by trackers: what this node has is said to one of them, again and again; its answers hold the views.

Layer: peers, on trio. Who calls: node and mirror make one with open_membership. All of what a node says is in each
beat, so trackers need not remember anything, and any of them will do. While none answers, the node goes on with the
members that it knows. State: rows of the views in use, by version; what was said last.
"""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Any, Final

import msgspec
import trio

from lazyfs import shapes
from lazyfs.errors import LazyfsError, PeerError
from lazyfs.peers.announce import (
    COMPLETE,
    PREFIX,
    REPORT_COUNT_MAX,
    SWARM_COUNT_MAX,
    Announced,
    Beat,
    BeatAnswer,
    Seen,
    Standing,
    ViewPart,
)
from lazyfs.peers.membership import JITTER, DnsMembership, ListedMembership, listed_id
from lazyfs.peers.model import Member, View
from lazyfs.peers.tlsfiles import TlsFiles
from lazyfs.peers.trackerclient import TrackerClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs import config
    from lazyfs.peers.membership import Membership, Participant

NEWS_GAP_S: Final = 0.2          # between two beats, at least
AGAIN_FIRST_S: Final = 0.5       # after a failure; doubles
AGAIN_MAX_S: Final = 15.0        # a tracker that is back is found within that
LEAVE_S: Final = 1.0
_STEP: Final = COMPLETE // 10    # of done: each step is news for all trackers
_ROW_COUNT_MAX: Final = 500_000  # of all views in use
_log: Final = logging.getLogger("lazyfs.peers")
_encode = msgspec.json.Encoder().encode
_answer = shapes.json_decoder(BeatAnswer).decode
_part = shapes.json_decoder(ViewPart).decode


class TrackedMembership:
    """See membership.Membership. `network`: Announced.network."""

    def __init__(self, me: Member, participant: Participant, client: TrackerClient, cluster: str,
                 network: str = "") -> None:
        self.leaves = True
        self._me = Announced(me.id, me.address, me.zone, me.up_rate, network)
        self._myself = me
        self._participant = participant
        self._client = client
        self._cluster = cluster
        self._path = f"{PREFIX}{cluster}/beat"
        self._news = trio.Event()
        self._said: dict[str, Standing] = {}
        self._views: dict[str, View] = {}                 # by version, those in use
        self._versions: dict[str, str] = {}               # by key
        self._isolated: tuple[str, ...] = ()
        self._cluster_members = 0                         # 0: no tracker has said it
        self._why = "no tracker was asked yet"
        self._lost_at: float | None = None
        self._words: dict[str, tuple[Callable[[], msgspec.Raw | None], Callable[[msgspec.Raw], object]]] = {}

    def on_word(self, word: str, say: Callable[[], msgspec.Raw | None], told: Callable[[msgspec.Raw], object]) -> None:
        """
        Have another part of the node speak in each beat with its counterpart in the tracker (Service.on_beat).

        Args:
            word: small letters.
            say: JSON for it, or None.
            told: what it said; untrusted. A LazyfsError is logged.

        """
        self._words[word] = (say, told)

    def news(self) -> None:
        self._news.set()

    def says(self, me: Member) -> None:
        self._me = msgspec.structs.replace(self._me, up_rate=me.up_rate)
        self._myself = me
        self.news()

    def describe(self) -> dict[str, Any]:
        members = {member.id for view in self._views.values() for member in view.members}
        return {"kind": "tracker", "cluster": self._cluster, "network": self._me.network, "tracker": self._client.last,
                "members": len(members), "cluster_members": self._cluster_members, "isolated": list(self._isolated),
                "lost_s": self.lost_s(), "why": self._why}

    def lost_s(self) -> float:
        """For how long no tracker has answered; 0.0: one does."""
        return 0.0 if self._lost_at is None else trio.current_time() - self._lost_at

    async def run(self) -> None:
        again_s = AGAIN_FIRST_S
        try:
            while True:
                try:
                    wait_s = await self._beat() * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - spreads
                    again_s = AGAIN_FIRST_S
                except LazyfsError as error:
                    self._lost(error)
                    await trio.sleep(again_s * random.uniform(0.5, 1.5))  # noqa: S311 - spreads
                    again_s = min(2 * again_s, AGAIN_MAX_S)
                    continue
                with trio.move_on_after(wait_s):
                    await trio.sleep(NEWS_GAP_S)
                    await self._news.wait()
        finally:
            with trio.CancelScope(deadline=trio.current_time() + LEAVE_S, shield=True):
                await self._leave()

    async def _beat(self) -> float:
        """Say all; take what comes. Returns the seconds until the next one is due. Raises LazyfsError."""
        self._news = trio.Event()
        standings = self._standings()
        reports = list(self._participant.reports())[:REPORT_COUNT_MAX]
        seen = {key: version for key, version in self._versions.items() if key in standings}
        extra = {word: said for word, (say, _) in self._words.items() if (said := say()) is not None}
        beat = Beat(self._me, standings, seen, reports=reports, extra=extra)
        reply = await self._client.request("POST", self._path, _encode(beat))
        try:
            answer = _answer(reply.body)
            parts = {part.version: part for part in map(_part, answer.views)}
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self._client.distrust(reply.tracker)
            raise PeerError(f"tracker {reply.tracker}: this is not an answer to a beat: {error!s:.200}") from None
        if self._lost_at is not None or self._why:
            _log.info("tracker answers", extra={"fields": {"tracker": reply.tracker, "cluster": self._cluster}})
        self._lost_at, self._why, self._said = None, "", standings
        self._take(answer, parts)
        return answer.seconds

    def _standings(self) -> dict[str, Standing]:
        """What there is to say; small steps are not worth it."""
        found: dict[str, Standing] = {}
        for key, now in self._participant.standings().items():
            said = self._said.get(key)
            done = now.done if now.done == COMPLETE else now.done - now.done % _STEP
            if said is None or (said.done, said.need) != (done, now.need):
                said = Standing(done, now.need, now.origin)
            found[key] = said
            if len(found) == SWARM_COUNT_MAX:
                break
        return found

    def _take(self, answer: BeatAnswer, parts: dict[str, ViewPart]) -> None:
        known = dict(self._views)
        for key, version in answer.swarms.items():
            if key not in self._said:
                continue
            view = known.get(version) or self._make(parts.get(version))
            if view is None:    # what it is added to is not here (any more): the next answer will hold all of it
                self._versions.pop(key, None)
                continue
            known[version] = view
            self._versions[key] = version
            self._participant.set_view(key, view)
        self._versions = {key: version for key, version in self._versions.items() if key in self._said}
        self._views = {version: known[version] for version in self._versions.values()}
        self._isolate(tuple(answer.isolated))
        self._cluster_members = answer.members
        for key, phase in answer.release.items():
            if key in self._said:
                self._participant.release(key, phase)
        for word, told in answer.extra.items():
            self._tell(word, told)

    def _make(self, part: ViewPart | None) -> View | None:
        """A view, of what came; None: it cannot be made."""
        if part is None or (part.since and part.since not in self._views):
            return None
        old = self._views[part.since] if part.since else View()
        if len(old.members) + len(part.add) > _ROW_COUNT_MAX:
            return None
        members = {member.id: member for member in old.members}
        complete, partial = set(old.complete), set(old.partial)
        for name in part.gone:
            members.pop(name, None)
            complete.discard(name)
            partial.discard(name)
        for row in part.add:
            members[row.id] = _member(row)
            (complete.add if row.complete else complete.discard)(row.id)
            (partial.add if row.partial else partial.discard)(row.id)
        members[self._me.id] = self._myself
        return View(tuple(members[name] for name in sorted(members)), frozenset(complete), frozenset(partial))

    def _isolate(self, isolated: tuple[str, ...]) -> None:
        if (self._me.id in isolated) != (self._me.id in self._isolated):
            _log.warning("this node is %s", "isolated: others have reported it" if self._me.id in isolated
                         else "no longer isolated")
        self._isolated = isolated

    def _tell(self, word: str, told: msgspec.Raw) -> None:
        if word in self._words:
            try:
                self._words[word][1](told)
            except LazyfsError as error:
                _log.warning("what the tracker said of %s is not understood: %s", word, error)

    def _lost(self, error: LazyfsError) -> None:
        if self._lost_at is None:
            self._lost_at = trio.current_time()
            _log.warning("%s; going on with the %d members that are known", error, self.describe()["members"])
        self._why = str(error)

    async def _leave(self) -> None:
        if self.leaves and self._lost_at is None and self._client.last:
            try:
                await self._client.request("POST", self._path, _encode(Beat(self._me, leave=True)), seconds=LEAVE_S)
            except LazyfsError as error:
                _log.info("no tracker was told that this node leaves: %s", error)
        await self._client.aclose()


def _member(row: Seen) -> Member:
    return Member(row.id, row.address, row.zone, row.up_rate)


def member_of(settings: config.Peers, name: str, address: str) -> Member:
    """
    This node (or its mirror) as others are to see it.

    Args:
        settings: [peers].
        name: its id, where there is a tracker; else all nodes make the id of the address.
        address: host:port of its peer server, as others reach it.

    """
    return Member(name if settings.tracker else listed_id(address), address, settings.zone, settings.upload_rate)


def tracker_client(settings: config.Peers) -> TrackerClient:
    """Of the trackers of [peers]. Raises ConfigError."""
    tls = TlsFiles("peers", settings.cert_file, settings.key_file, settings.ca_file) if settings.ca_file else None
    return TrackerClient(settings.tracker, tls, settings.tracker_token_file)


def open_membership(settings: config.Peers, me: Member, participant: Participant) -> Membership:
    """
    The membership that [peers] asks for; `me` of member_of. A tracker is stronger than a list, a list than DNS.

    Raises ConfigError: a file that it names cannot be used.
    """
    if settings.tracker:
        return TrackedMembership(me, participant, tracker_client(settings), settings.cluster, settings.network)
    if settings.static:
        return ListedMembership(me, participant, settings.static)
    return DnsMembership(me, participant, settings.dns)
