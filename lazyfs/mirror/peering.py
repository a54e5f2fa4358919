"""
The mirror as a member of its cluster, beside the node's daemon: `NAME.mirror`, with a port of its own.

Layer: mirror. Who calls: mirror.serving, where [peers] is configured. On the loop. What it takes part in is what it has
in pieces: under way, or whole on its disk. Nothing here is a condition of serving: while the others are not known,
bytes come from where they come from. State: what is whole on disk (looked for every LOOK_S), what was let go.

Where there is no tracker, mirrors find each other at the hosts of [peers] static or dns, with the port of
[mirror] peers_address: it is the same on all nodes.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import trio

from lazyfs.config import split_address
from lazyfs.errors import AuthError, ConfigError, NotFoundError, PeerRefusedError
from lazyfs.limits import KIB
from lazyfs.mirror.blaming import Blaming
from lazyfs.mirror.blobs import RegistryBlob
from lazyfs.mirror.outage import Wanted, from_anybody, others
from lazyfs.mirror.pieces import PieceStore
from lazyfs.peers.announce import COMPLETE, Standing
from lazyfs.peers.authority import make_gate
from lazyfs.peers.endpoint import Endpoint, find_member
from lazyfs.peers.jobs import MIRROR, WORD, Agent
from lazyfs.peers.tokenwire import Proof
from lazyfs.peers.tracked import TrackedMembership
from lazyfs.registry.client import RegistryClient
from lazyfs.registry.proving import show_right

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazyfs import config
    from lazyfs.mirror.download import Download
    from lazyfs.mirror.hearsay import Hearsay
    from lazyfs.mirror.pieces import Blobs
    from lazyfs.peers.jobs import Doing
    from lazyfs.peers.model import Deliver, Member, Origin, Priority, Resource, View
    from lazyfs.registry.options import RegistryOptions
    from lazyfs.registry.reference import RegistryReference

LOOK_S: Final = 60.0
VIEW_S: Final = 2.5              # a view is waited for so long: else all who begin together go to the registry
ALONE_BYTES_MAX: Final = 64 * KIB    # no peer is asked for less: a request to a registry that is there is as quick
_ANNOUNCED_MAX: Final = 1024     # that are whole, and not in use; a beat holds twice as many
_PROOF_S: Final = 8.0
_log: Final = logging.getLogger("lazyfs.mirror")


def settings_of(peers: config.Peers, address: str) -> config.Peers:
    """[peers] as the mirror's own server goes by it: the same hosts, its port."""
    port = split_address(address)[1]

    def moved(place: str) -> str:
        return f"{place.rpartition(':')[0]}:{port}" if place else ""

    return replace(peers, address=address, advertise=moved(peers.advertise), dns=moved(peers.dns),
                   static=tuple(map(moved, peers.static)))


class MirrorPeers:
    """See the module. A Party of its Endpoint; the download.Fetching of its blobs; the hearsay.Members of its tags."""

    def __init__(self, settings: config.Peers, blobs: Blobs, options: RegistryOptions, do: Doing,
                 hearsay: Hearsay) -> None:
        """`settings`: of settings_of(). `options`: of registries, for proofs. `do`: preheat tasks."""
        self._settings, self._blobs, self._do, self._hearsay = settings, blobs, do, hearsay
        self._prover = MirrorProver(blobs, options)
        self.endpoint: Endpoint | None = None
        self._whole: dict[str, Resource] = {}
        self._places: set[str] = set()                  # hearsay.place_key, of what it has pulled from
        self._asking: Counter[str] = Counter()          # likewise, of what is asked about just now
        self._released: set[str] = set()
        self._viewed: dict[str, trio.Event] = {}
        self._why = "starting"

    async def run(self) -> None:
        """Until cancelled. Never raises an Exception."""
        settings = self._settings
        try:
            me = await trio.to_thread.run_sync(find_member, settings, MIRROR, settings.address, abandon_on_cancel=True)
            endpoint = Endpoint(settings, me, PieceStore(self._blobs), self, listen_at=settings.address,
                                make_gate=lambda member: make_gate(settings, member.id, self._prover),
                                desk=self._hearsay.tell)
        except (ConfigError, OSError) as error:
            self._why = str(error)
            _log.error("this mirror goes on without peers: %s", error)
            return
        self.endpoint, self._why = endpoint, ""
        self._hearsay.members = self
        self._blobs.swarm = self
        self._blobs.on_open = self._opened
        self._blobs.blame = Blaming(endpoint.swarm).blame
        self._blobs.on_close = lambda _: endpoint.membership.news()
        async with trio.open_nursery() as nursery:
            if isinstance(endpoint.membership, TrackedMembership):
                agent = Agent(self._do, endpoint.membership.news)
                endpoint.membership.on_word(WORD, agent.say, agent.told)
                nursery.start_soon(agent.run)
            nursery.start_soon(endpoint.run)
            nursery.start_soon(self._look)

    # --- for downloads ---------------------------------------------------------------------------------------------

    async def fetch(self, resource: Resource, indexes: Sequence[int], *, priority: Priority, deadline: float, hops: int,
                    deliver: Deliver, origin: Origin | None = None, request: str = "") -> list[int]:
        """See peers.swarm.Swarm.fetch. Who begins waits for the others that begin: for VIEW_S at most."""
        endpoint = self.endpoint
        is_down = self._is_origin_down(resource.key)
        if endpoint is None or (resource.size <= ALONE_BYTES_MAX and not is_down):
            return list(indexes)
        await self._wait_for_view(endpoint, resource.key)
        if is_down:
            wanted = Wanted(resource, indexes, priority, deadline, request)
            return await from_anybody(endpoint.swarm, wanted, deliver)
        return await endpoint.swarm.fetch(resource, indexes, priority=priority, deadline=deadline, hops=hops,
                                          deliver=deliver, origin=origin, request=request)

    async def _wait_for_view(self, endpoint: Endpoint, key: str) -> None:
        viewed = self._viewed.get(key)
        if viewed is not None and not viewed.is_set() and not endpoint.membership.describe()["lost_s"]:
            with trio.move_on_after(VIEW_S):
                await viewed.wait()
            viewed.set()

    def _is_origin_down(self, key: str) -> bool:
        origins = (one.origin for one in self._blobs.under_way() if one.resource.key == key)
        return any(isinstance(one, RegistryBlob) and one.upstream.is_down(one.reference) for one in origins)

    # --- for hearsay: see hearsay.Members --------------------------------------------------------------------------

    async def having(self, key: str) -> list[Member]:
        endpoint = self.endpoint
        assert endpoint is not None
        self._asking[key] += 1
        try:
            if endpoint.swarm.view(key) is None:
                self._viewed.setdefault(key, trio.Event())
                endpoint.membership.news()
                await self._wait_for_view(endpoint, key)
            return others(endpoint.swarm, key)
        finally:
            self._asking[key] -= 1
            if not self._asking[key]:
                del self._asking[key]

    async def question(self, member: Member, words: str, key: str) -> bytes:
        assert self.endpoint is not None
        return await self.endpoint.question(member, words, key)

    def admit(self, token: str, key: str) -> None:
        assert self.endpoint is not None
        self.endpoint.gate.admit(token, key)

    def _opened(self, resource: Resource) -> None:
        assert self.endpoint is not None
        self._released.discard(resource.key)
        if resource.key not in self._viewed:
            self._viewed[resource.key] = trio.Event()
        self.endpoint.membership.news()

    # --- for the endpoint: see peers.endpoint.Party ------------------------------------------------------------------

    def standings(self) -> dict[str, Standing]:
        found = {one.resource.key: _standing(one) for one in self._blobs.under_way() if one.shared}
        for key in self._whole.keys() - self._released - found.keys():
            found[key] = Standing(COMPLETE, need=False)
        found |= dict.fromkeys(self._places | self._asking.keys(), Standing())
        self._viewed = {key: event for key, event in self._viewed.items() if key in found}
        return found

    def viewed(self, key: str, view: View) -> None:  # noqa: ARG002 - that there is one
        if key in self._viewed:
            self._viewed[key].set()

    def release(self, key: str, phase: str) -> None:
        """A copy that nobody reads is announced no longer; it stays until its room is needed."""
        if key not in self._released and all(one.resource.key != key for one in self._blobs.under_way()):
            _log.info("%s: its swarm is complete, it is given to others no longer", key,
                      extra={"fields": {"phase": phase}})
            self._released.add(key)

    async def _look(self) -> None:
        assert self.endpoint is not None
        while True:
            with contextlib.suppress(OSError):
                held = [one.resource for one in await self._blobs.held() if one.whole]
                self._whole = {resource.key: resource for resource in held[:_ANNOUNCED_MAX]}
            self._places = await self._hearsay.places()
            self._released &= self._whole.keys()
            self.endpoint.membership.news()
            await trio.sleep(LOOK_S)

    def describe(self) -> dict[str, Any]:
        """JSON for everybody on this machine: so no digests, which are the names by which peers give things."""
        if self.endpoint is None:
            return {"cluster": self._settings.cluster, "why": self._why}
        told = self.endpoint.describe()
        shown = ("id", "address", "zone", "listens", "connections", "uploads")
        return {"cluster": self._settings.cluster, "why": "", **{name: told[name] for name in shown},
                "membership": told["membership"], "swarms": len(told["swarms"]),
                "away": sorted(one["id"] for one in told["peers"] if one["away"]),
                "lied": sorted(one["id"] for one in told["peers"] if one["away"] == "lied")}


class MirrorProver:
    """authority.Prover: the repository that a blob is being pulled from, and the credential that it takes for it."""

    def __init__(self, blobs: Blobs, options: RegistryOptions) -> None:
        self._blobs, self._options = blobs, options

    async def proofs(self, keys: Sequence[str]) -> Sequence[tuple[Proof, Sequence[str]]]:
        """See authority.Prover. Of files behind URLs nobody can prove anything."""
        found: dict[str, tuple[RegistryReference, RegistryBlob, list[str]]] = {}
        for one in self._blobs.under_way():
            if one.resource.key in keys and isinstance(one.origin, RegistryBlob):
                reference = one.origin.reference
                found.setdefault(reference.identity, (reference, one.origin, []))[2].append(one.resource.key)
        return [(await trio.to_thread.run_sync(self._prove, reference, origin, abandon_on_cancel=True), covered)
                for reference, origin, covered in found.values()]

    def _prove(self, reference: RegistryReference, origin: RegistryBlob) -> Proof:
        """Blocking. Raises PeerRefusedError: the registry refuses us. SourceError: it does not answer."""
        client = RegistryClient(reference.host, reference.repository, self._options, through_mirrors=False)
        try:
            shown = show_right(client, origin.digest, time.monotonic() + _PROOF_S)
        except (AuthError, NotFoundError) as error:
            raise PeerRefusedError(f"no proof of a right: {error}") from None
        finally:
            client.close()
        return Proof(f"docker://{reference.host}/{reference.repository}", authorization=shown.reveal())


def _standing(download: Download) -> Standing:
    count = download.resource.piece_count
    done = COMPLETE if download.file.is_whole else min(COMPLETE - 1, download.file.present_count * COMPLETE // count)
    return Standing(done, origin=download.origin_pieces * COMPLETE // count)
