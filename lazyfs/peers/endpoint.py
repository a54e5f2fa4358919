"""
One member of a cluster, put together: its swarm, what it serves and by which port, who the others are.

Layer: peers. Who calls: node.peering (layer devices) and the mirror (blobs and files), each with a store of its own and
a Party that says what it takes part in. Whatever fails here (a port that is taken, a tracker that is gone), `run` goes
on: peers are a better way to data, never a condition of it. State: that of its parts.
"""

from __future__ import annotations

import logging
import random
import re
import socket
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from lazyfs.config import split_address
from lazyfs.peers import questions
from lazyfs.peers.announce import Report
from lazyfs.peers.client import PeerClient
from lazyfs.peers.gate import OpenGate, TokenGate
from lazyfs.peers.health import Fault
from lazyfs.peers.ownrate import OwnRate
from lazyfs.peers.server import serve
from lazyfs.peers.swarm import Swarm, SwarmLimits
from lazyfs.peers.tlsfiles import TlsFiles
from lazyfs.peers.tracked import member_of, open_membership
from lazyfs.peers.uploads import UploadLimits, Uploads

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lazyfs import config
    from lazyfs.peers.announce import Standing
    from lazyfs.peers.model import Gate, Member, PieceRequest, Store, View
    from lazyfs.peers.questions import Desk

LISTEN_AGAIN_S: Final = 0.2      # the worker before us still has the port
COMPARE_S: Final = 1.0           # this node's own rate with the others'
BETTER_COUNT: Final = 2          # members named to who finds no room here
_NAME_CHARS_MAX: Final = 100
_WHYS: Final = {Fault.LIED: "lied", Fault.GONE: "dead", Fault.SLOW: "slow"}
_log: Final = logging.getLogger("lazyfs.peers")


class Party(Protocol):
    """What its owner says and is told. On the loop, quick; `key` is Resource.key."""

    def standings(self) -> Mapping[str, Standing]:
        """What it takes part in, and how much of it it has."""
        ...

    def viewed(self, key: str, view: View) -> None:
        """The swarm has that view of a resource now."""
        ...

    def release(self, key: str, phase: str) -> None:
        """See peers.membership.Participant."""
        ...


class Endpoint:
    """
    See the module. `me`: as others see it; `port`: that it listens on (0: not yet).

    Raises ConfigError: a file that [peers] names cannot be used.
    """

    def __init__(self, settings: config.Peers, me: Member, store: Store, party: Party, *, listen_at: str,
                 make_gate: Callable[[Member], Gate] | None = None, desk: Desk | None = None) -> None:
        """
        :me: of find_member().
        :listen_at: host:port.
        :make_gate: of tokens; None: there are none, everybody is admitted.
        :desk: answers small questions of others; None: there are none.
        """
        self._desk = desk
        self._listen_at = listen_at
        self._store = store
        self._party = party
        self.me = me
        self.gate: Gate = make_gate(self.me) if make_gate is not None else OpenGate()
        self._tls = (TlsFiles("peers", settings.cert_file, settings.key_file, settings.ca_file)
                     if settings.cert_file else None)
        if self._tls is not None:
            self._tls.load()
        self.client = PeerClient(self.gate, tls=self._tls)
        self.swarm = Swarm(self.me, self.client, SwarmLimits(download_rate=settings.download_rate))
        self.uploads = Uploads(UploadLimits(rate=settings.upload_rate, concurrent=settings.upload_concurrent))
        self.membership = open_membership(settings, self.me, self)
        self.own_rate = OwnRate(me, self.uploads.giving, self.swarm.health.rates)
        self.client.told_rate = self.swarm.told_rate
        self.port = 0
        self._views: dict[str, View] = {}

    async def run(self) -> None:
        """Serve and stay in touch, until cancelled. Never raises an Exception of its own."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.client.run)
            nursery.start_soon(self.membership.run)
            if isinstance(self.gate, TokenGate):
                nursery.start_soon(self.gate.run)
            nursery.start_soon(self._serve)
            nursery.start_soon(self._compare)

    async def _serve(self) -> None:
        listeners = await self._listen()
        self.port = listeners[0].socket.getsockname()[1]
        _log.info("peers: listening", extra={"fields": {"address": self._listen_at, "member": self.me.id,
                                                        "as": self.me.address}})
        await serve(listeners, self._store, self.gate, self.uploads, better=self._better, tls=self._tls,
                    desk=self._desk, refer=self.swarm.refer)

    async def question(self, member: Member, words: str, key: str) -> bytes:
        """
        Ask a member something small; `key`: of the resource whose token is shown. The caller has a deadline.

        Raises:
            PeerError, SourceError: as of questions.ask, and Gate.token.

        """
        return await questions.ask(member, words, token=await self.gate.token(key, member.id), tls=self._tls)

    async def _compare(self) -> None:
        """Say to all what is found of this node's own rate."""
        while True:
            await trio.sleep(COMPARE_S)
            before = self.own_rate.said
            if self.own_rate.look(trio.current_time()):
                self.swarm.me = self.own_rate.own
                self.membership.says(self.own_rate.said)
                if self.own_rate.said != before:
                    _log.info("peers: this node's rate beside the others'", extra={"fields": self._rates()})

    def _rates(self) -> dict[str, Any]:
        """Bytes/s: that this node was found to give, that are usual, that it says to all; 0: not known, or nothing."""
        step, usual = self.uploads.giving.step, self.swarm.health.rates.usual
        return {"gives": 1 << step if step else 0, "usual": 1 << usual if usual else 0,
                "says": self.own_rate.said.up_rate}

    async def _listen(self) -> list[trio.SocketListener]:
        said = False
        host, port = split_address(self._listen_at)
        while True:
            try:
                return await trio.open_tcp_listeners(port, host=host)
            except OSError as error:
                if not said:
                    _log.warning("peers.address %s cannot be used, and is tried again: %s", self._listen_at, error)
                said = True
                await trio.sleep(LISTEN_AGAIN_S)

    def _better(self, request: PieceRequest) -> tuple[str, ...]:
        """Others who have all of it."""
        view = self._views.get(request.resource.key)
        if view is None or not view.complete:
            return ()
        others = [member.address for member in view.members
                  if member.id in view.complete and member.id != self.me.id]
        return tuple(random.sample(others, min(BETTER_COUNT, len(others))))

    # --- for the membership: see peers.membership.Participant -----------------------------------------------------

    def standings(self) -> Mapping[str, Standing]:
        found = self._party.standings()
        for key in self._views.keys() - found.keys():
            del self._views[key]
            self.swarm.forget(key)
        return found

    def reports(self) -> Sequence[Report]:
        return [Report(report.member, _WHYS[report.fault]) for report in self.swarm.take_reports()]

    def set_view(self, key: str, view: View) -> None:
        self._views[key] = view
        self.swarm.set_view(key, view)
        self._party.viewed(key, view)

    def release(self, key: str, phase: str) -> None:
        self._party.release(key, phase)

    def describe(self) -> dict[str, Any]:
        """JSON: who it is, who the others are, what came and went; counters since the start."""
        sent = self.uploads.counters
        return {
            "id": self.me.id, "address": self.me.address, "zone": self.me.zone, "listens": bool(self.port),
            "membership": self.membership.describe(), **self.swarm.describe(),
            "connections": self.client.connections, "rates": self._rates(),
            "tokens": self.gate.describe() if isinstance(self.gate, TokenGate) else {},
            "uploads": {"requests": sent.requests, "refused": sent.refused_busy, "pieces": sent.pieces,
                        "bytes": sent.plain_bytes, "wire_bytes": sent.wire_bytes},
        }


def find_member(settings: config.Peers, suffix: str = "", listen_at: str = "") -> Member:
    """
    This node as others are to see it. Blocking: names are looked up.

    :suffix: of the member's id, where trackers are asked: `.mirror`.
    :listen_at: host:port; empty: [peers] address.
    """
    name = (settings.node or re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:_NAME_CHARS_MAX]) + suffix
    return member_of(settings, name, advertised(settings, listen_at or settings.address))


def advertised(settings: config.Peers, listen_at: str) -> str:
    """host:port by which others reach a server that listens there, as far as this node can know. Blocking: a name."""
    if settings.advertise:
        return settings.advertise
    host, port = split_address(listen_at)
    if host not in {"0.0.0.0", "::"}:    # noqa: S104 - compared
        return listen_at
    for place in settings.static:    # this node's own entry: only its own addresses can be bound
        other, other_port = split_address(place)
        if other_port == port and _is_own(other):
            return place
    found = _address_towards(_first_place(settings))
    return f"[{found}]:{port}" if ":" in found else f"{found}:{port}"


def _first_place(settings: config.Peers) -> tuple[str, int]:
    from urllib.parse import urlsplit  # noqa: PLC0415 - with trackers only

    if settings.tracker:
        return urlsplit(settings.tracker[0]).hostname or "", 1
    return split_address(settings.static[0] if settings.static else settings.dns)


def _is_own(host: str) -> bool:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def _address_towards(place: tuple[str, int]) -> str:
    """The address that this node's traffic to a place leaves with; its host name where that is not known."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(*place, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)    # of UDP: nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()
