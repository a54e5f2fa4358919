"""
The daemon's worker as a member of its cluster: which devices it takes part in, what it has of them, who the others are.

Layer: node. Who calls: node.daemonworker makes one and runs it, where [peers] is configured; node.observing describes
it. On the loop. Nothing here is on the way of a mount or a read: while the others are not known, or nothing of this
works, chunks come from the registry as without peers. State: complete devices in the cache that are not in use, looked
for every LOOK_S; those of them that the tracker has said can go.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, Final

import trio

from lazyfs.cache import inventory
from lazyfs.errors import ConfigError
from lazyfs.fetch.peering import FIRST_VIEW_S
from lazyfs.node.peerstore import PeerStore
from lazyfs.peers.announce import COMPLETE, Standing
from lazyfs.peers.endpoint import Endpoint, find_member
from lazyfs.peers.jobs import WORD, Agent
from lazyfs.peers.tracked import TrackedMembership

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs import config
    from lazyfs.cache.store import CacheDir
    from lazyfs.fetch.device import FetchDevice
    from lazyfs.fetch.engine import Fetcher
    from lazyfs.peers.jobs import Doing
    from lazyfs.peers.model import Gate, Member, View

LOOK_S: Final = 60.0             # at the cache: what is there besides what is in use
TELL_S: Final = 1.0              # so soon it is said that a device is complete
ALONE_VIEW_S: Final = 0.1        # instead of FIRST_VIEW_S, where nobody else was in the cluster a moment ago
CACHED_COUNT_MAX: Final = 1024   # devices that are announced without being in use; a beat holds twice as many
_log: Final = logging.getLogger("lazyfs.peers")


class NodePeers:
    """Of one worker. See the module; a Party of its Endpoint."""

    def __init__(self, settings: config.Peers, cache: CacheDir, fetcher: Fetcher,
                 make_gate: Callable[[Member], Gate] | None = None) -> None:
        """`make_gate`: of tokens; None: there are none."""
        self._settings = settings
        self._cache = cache
        self._peering = fetcher.peering
        self._make_gate = make_gate
        self.store = PeerStore(cache, fetcher.peering)
        self.endpoint: Endpoint | None = None
        self.cached: set[str] = set()       # keys of complete devices, as of the last look
        self._released: set[str] = set()
        self._complete: set[str] = set()    # of those in use, as said
        self._why = "starting"
        self.preheat: Doing | None = None   # does the tasks of preheat jobs; set before `run`

    async def run(self) -> None:
        """Until cancelled. Never raises an Exception: peers are not needed."""
        try:
            me = await trio.to_thread.run_sync(find_member, self._settings, abandon_on_cancel=True)
            endpoint = Endpoint(self._settings, me, self.store, self, listen_at=self._settings.address,
                                make_gate=self._make_gate)
        except (ConfigError, OSError) as error:
            self._why = str(error)
            _log.error("this node goes on without peers: %s", error)
            return
        self.endpoint, self._why = endpoint, ""
        self.store.room = endpoint.uploads.has_room
        endpoint.swarm.coming = self.store.coming
        self._peering.begin(endpoint.swarm)
        self._peering.changed = self._changed
        self._changed()
        try:
            async with trio.open_nursery() as nursery:
                if self.preheat is not None and isinstance(endpoint.membership, TrackedMembership):
                    agent = Agent(self.preheat, endpoint.membership.news)
                    endpoint.membership.on_word(WORD, agent.say, agent.told)
                    nursery.start_soon(agent.run)
                nursery.start_soon(endpoint.run)
                nursery.start_soon(self.store.run)
                nursery.start_soon(self._look)
                nursery.start_soon(self._tell)
        finally:
            self._peering.changed = lambda: None

    def ends(self, *, leaves: bool) -> None:
        """Before it is cancelled. `leaves`: nobody goes on in its place, so the others are told."""
        if self.endpoint is not None:
            self.endpoint.membership.leaves = self.endpoint.membership.leaves and leaves

    # --- for the endpoint: see peers.endpoint.Party ---------------------------------------------------------------

    def standings(self) -> dict[str, Standing]:
        found = {key: _standing(devices[0]) for key, devices in self._peering.in_use.items()}
        for key in self.cached - self._released - found.keys():
            found[key] = Standing(COMPLETE, need=False)
        return found

    def viewed(self, key: str, view: View) -> None:
        if key in self._peering.in_use:
            assert self.endpoint is not None
            self._peering.view_came(key, others=any(one.id != self.endpoint.me.id for one in view.members))

    def release(self, key: str, phase: str) -> None:
        """A copy that nobody here uses is announced no longer; it stays until the cache needs its room."""
        if key not in self._peering.in_use and key not in self._released:
            _log.info("%s: its swarm is complete, it is given to others no longer", key,
                      extra={"fields": {"phase": phase}})
            self._released.add(key)

    # --- what changes -----------------------------------------------------------------------------------------------

    def _changed(self) -> None:
        """Other devices are in use."""
        if self.endpoint is None:
            return
        known = self.endpoint.membership.describe()
        for key in self._peering.in_use:
            self._released.discard(key)
            view = self.endpoint.swarm.view(key)
            if view is not None:
                self.viewed(key, view)
            elif not known["lost_s"]:
                self._peering.await_view(key, ALONE_VIEW_S if known.get("cluster_members") == 1 else FIRST_VIEW_S)
        self.endpoint.membership.news()

    async def _tell(self) -> None:
        """Say soon what has become complete."""
        assert self.endpoint is not None
        while True:
            await trio.sleep(TELL_S)
            complete = {key for key, devices in self._peering.in_use.items() if devices[0].cached.complete}
            if complete - self._complete:
                self.endpoint.membership.news()
            self._complete = complete

    async def _look(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                self.cached = await trio.to_thread.run_sync(_complete_devices, self._cache, abandon_on_cancel=True)
            self._released &= self.cached
            assert self.endpoint is not None
            self.endpoint.membership.news()
            await trio.sleep(LOOK_S)

    def describe(self) -> dict[str, Any]:
        """JSON, for `lazyfs peers` and metrics: Endpoint.describe() and what was given away, in chunks."""
        counts = self.store.counts
        given = {"from_cache": counts.from_cache, "fetched": counts.fetched, "lacking": counts.lacking}
        if self.endpoint is None:
            return {"cluster": self._settings.cluster, "why": self._why, "given": given}
        return {"cluster": self._settings.cluster, "why": "", "given": given, **self.endpoint.describe()}


def _standing(device: FetchDevice) -> Standing:
    count = device.table.chunk_count
    if device.cached.complete:
        done = COMPLETE
    else:
        done = min(COMPLETE - 1, device.cached.present_count * COMPLETE // max(1, count))
    return Standing(done, origin=device.origin_chunks * COMPLETE // max(1, count))


def _complete_devices(cache: CacheDir) -> set[str]:
    """Keys of devices of which all is in the cache. Blocking."""
    names = inventory.device_names(cache.path)[:CACHED_COUNT_MAX]
    return {f"device/sha256:{name}" for name in names
            if inventory.present_share(cache.path, name, cache.boot_id) == 1.0}
