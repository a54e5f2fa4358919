"""
Who is in the swarms of this node: one interface, and the ways without a tracker (a static list, DNS).

Layer: peers, on trio. Who calls: node and mirror make one (peers.tracked.open_membership) and run it beside their
swarm; what it finds out it says to their Participant. Whatever happens to trackers or DNS, `run` goes on, and the
participant keeps the views that it has. peers.tracked asks trackers; here are the two ways without.
"""

from __future__ import annotations

import logging
import random
import re
import socket
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from lazyfs.peers.model import Member, View

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lazyfs.peers.announce import Report, Standing

DNS_EVERY_S: Final = 10.0
DNS_COUNT_MAX: Final = 16_384
JITTER: Final = 0.15             # of an interval, to both sides: nodes that began together do not ask together
_log: Final = logging.getLogger("lazyfs.peers")


class Participant(Protocol):
    """This node's part. All are called on the loop, and quick; `key` is Resource.key."""

    def standings(self) -> Mapping[str, Standing]:
        """What it takes part in now, and how much of it it has."""
        ...

    def reports(self) -> Sequence[Report]:
        """Of others that did badly, since the last call."""
        ...

    def set_view(self, key: str, view: View) -> None:
        """Who else is in a swarm; Swarm.set_view. Only of keys of `standings`."""
        ...

    def release(self, key: str, phase: str) -> None:
        """A copy that this node does not need itself can go; `phase`: announce.BeatAnswer."""
        ...


class Membership(Protocol):
    """
    A way to know the others. `leaves`: say so at the end of `run`; False if another process goes on as this member.

    What `describe` gives, for people: kind, cluster, members, since when it is lost, why.
    """

    leaves: bool

    def news(self) -> None:
        """What `standings` gives has changed: say so soon."""
        ...

    def says(self, me: Member) -> None:
        """This node has another rate from now on: others are to hear it, where there is who tells them."""
        ...

    def describe(self) -> dict[str, Any]: ...

    async def run(self) -> None:
        """Until cancelled. Never raises an Exception."""
        ...


class ListedMembership:
    """All members are known by their addresses; nobody says who takes part in what, so everybody is in every swarm."""

    kind = "static"

    def __init__(self, me: Member, participant: Participant, addresses: Sequence[str]) -> None:
        self.leaves = False
        self._me = me
        self._participant = participant
        self._news = trio.Event()
        self._shown: dict[str, View] = {}
        self._view = self._view_of(addresses)

    def news(self) -> None:
        self._news.set()

    def says(self, me: Member) -> None:
        """Nobody tells the others: they hear it from this node itself, with what it gives them (wire.head)."""

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "members": len(self._view.members), "lost_s": 0.0, "why": ""}

    async def run(self) -> None:
        while True:
            self._show()
            await self._news.wait()
            self._news = trio.Event()

    def _show(self) -> None:
        keys = self._participant.standings().keys()
        for key in keys:
            if self._shown.get(key) is not self._view:
                self._participant.set_view(key, self._view)
        self._shown = dict.fromkeys(keys, self._view)

    def _view_of(self, addresses: Sequence[str]) -> View:
        members = {address: Member(listed_id(address), address) for address in addresses}
        members[self._me.address] = self._me
        return View(tuple(sorted(members.values(), key=lambda member: member.id)))


class DnsMembership(ListedMembership):
    """The addresses of one name, a headless service's: looked up again and again."""

    kind = "dns"

    def __init__(self, me: Member, participant: Participant, place: str) -> None:
        """`place`: name:port."""
        super().__init__(me, participant, ())
        self._name, _, port = place.rpartition(":")
        self._port = int(port)
        self._why = ""
        self._lost_at = 0.0

    def describe(self) -> dict[str, Any]:
        lost_s = trio.current_time() - self._lost_at if self._why else 0.0
        return {**super().describe(), "lost_s": lost_s, "why": self._why}

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(super().run)
            while True:
                await self._look()
                await trio.sleep(DNS_EVERY_S * random.uniform(1 - JITTER, 1 + JITTER))  # noqa: S311 - spreads

    async def _look(self) -> None:
        try:
            found = await trio.socket.getaddrinfo(self._name, self._port, type=socket.SOCK_STREAM)
        except OSError as error:
            if not self._why:
                self._lost_at = trio.current_time()
                _log.warning("peers.dns: %s cannot be looked up: %s; going on with the members that are known",
                             self._name, error)
            self._why = str(error)
            return
        self._why = ""
        addresses = sorted({_joined(str(entry[4][0]), self._port) for entry in found})[:DNS_COUNT_MAX]
        view = self._view_of(addresses)
        if view != self._view:
            self._view = view
            _log.info("peers", extra={"fields": {"dns": self._name, "members": len(view.members)}})
            self.news()


def listed_id(address: str) -> str:
    """The id of a member that is known by its address alone: what all nodes make of it."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", address)


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
