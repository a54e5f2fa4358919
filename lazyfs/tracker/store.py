"""
Where a tracker's state is: the contract, and the store in memory. tracker.redisstore is the other one.

Layer: tracker. Who calls: tracker.service and extensions; tracker.run makes one. Both stores behave alike (a property
test compares them). The clock of a store is `now()`: seconds, the same for all trackers of one store. What cannot be
had in time is a SourceError: the tracker answers 503, and nodes go on with what they know.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

import trio

from lazyfs.errors import PeerBusyError, UsageError
from lazyfs.tracker.state import Cluster, parse_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

CLUSTER_COUNT_MAX = 1000         # of one tracker
MEMBER_COUNT_MAX = 65_536        # of one cluster
ITEM_BYTES_MAX = 1 << 20         # of what extensions keep: a preheat job of 10,000 nodes is kept a node at a time
ITEM_COUNT_MAX = 65_536          # in memory
SWEEP_S = 1.0
REPORT_WINDOW_S = 60.0           # reports of one member count together for so long
ISOLATE_S = 120.0                # then it is asked again; who is still bad is reported again
ACCUSED_COUNT_MAX = 8            # who reports more members than that within the window is not believed: it is the
                                 # one that cannot reach anybody
ISOLATED_SHARE = 0.2             # of a cluster, at most: a broken network must not take it apart
SMALL_CLUSTER = 8                # members; two reporters are enough in it


def quorum(members: int) -> int:
    """How many different members must report one before it is isolated. Never one."""
    return 2 if members < SMALL_CLUSTER else 3


def isolated_max(members: int) -> int:
    """How many may be isolated at a time."""
    return max(1, int(ISOLATED_SHARE * members))


class Items(Protocol):
    """Small things that other parts keep with a time to live (jobs, proofs): bytes by collection and name."""

    async def put(self, collection: str, name: str, value: bytes, seconds: float) -> None: ...

    async def get(self, collection: str, name: str) -> bytes | None: ...

    async def all(self, collection: str) -> Mapping[str, bytes]: ...

    async def drop(self, collection: str, name: str) -> None: ...


class Store(Items, Protocol):
    """The state of all clusters."""

    @property
    def clusters(self) -> Mapping[str, Cluster]:
        """Those that this tracker has been asked for lately, as it knows them."""
        ...

    def now(self) -> float: ...

    def problem(self) -> str:
        """What is wrong with it now, in a line; empty: nothing."""
        ...

    async def cluster(self, name: str) -> Cluster:
        """Raises SourceError; PeerBusyError: there are too many clusters."""
        ...

    async def update(self, cluster: str, name: str, state: bytes) -> None:
        """A member is new or says something new; then `cluster` knows. Raises SourceError, FormatError."""
        ...

    async def heard(self, cluster: str, name: str) -> None:
        """A member says what it said before. Raises SourceError."""
        ...

    async def leave(self, cluster: str, name: str) -> None: ...

    async def report(self, cluster: str, by: str, of: Iterable[str]) -> None:
        """A member says of others that they do badly; enough of them, and one is isolated."""
        ...

    async def run(self) -> None:
        """What it does beside: until cancelled."""
        ...


class Reports:
    """Who has reported whom lately, in one cluster: the rule, for the store in memory. Redis has it as a script."""

    def __init__(self) -> None:
        self._of: dict[str, dict[str, float]] = {}      # reported -> reporter -> when
        self._by: dict[str, dict[str, float]] = {}      # reporter -> reported -> when

    def add(self, cluster: Cluster, by: str, of: str, now: float) -> bool:
        """Note a report; True: `of` is to be isolated now."""
        if by == of or by not in cluster.members or of not in cluster.members or by in cluster.isolated:
            return False
        accused = self._lately(self._by, by, now)
        accused[of] = now
        if len(accused) > ACCUSED_COUNT_MAX:
            return False
        reporters = self._lately(self._of, of, now)
        reporters[by] = now
        return (of not in cluster.isolated and len(reporters) >= quorum(len(cluster.members))
                and len(cluster.isolated) < isolated_max(len(cluster.members)))

    def sweep(self, now: float) -> None:
        """Forget what is over."""
        for table in (self._of, self._by):
            for name in list(table):
                if not self._lately(table, name, now):
                    del table[name]

    @staticmethod
    def _lately(table: dict[str, dict[str, float]], name: str, now: float) -> dict[str, float]:
        found = {other: at for other, at in table.get(name, {}).items() if at > now - REPORT_WINDOW_S}
        table[name] = found
        return found


class MemoryStore:
    """For one tracker alone: its restart forgets all, and members' next beats tell it again."""

    def __init__(self) -> None:
        self.clusters: dict[str, Cluster] = {}
        self._reports: dict[str, Reports] = {}
        self._items: dict[str, OrderedDict[str, tuple[float, bytes]]] = {}

    def now(self) -> float:
        return trio.current_time()

    def problem(self) -> str:
        return ""

    async def cluster(self, name: str) -> Cluster:
        await trio.lowlevel.checkpoint()
        return self._cluster(name)

    async def update(self, cluster: str, name: str, state: bytes) -> None:
        await trio.lowlevel.checkpoint()
        found = self._cluster(cluster)
        if name not in found.members and len(found.members) >= MEMBER_COUNT_MAX:
            raise PeerBusyError(f"cluster {cluster} has {MEMBER_COUNT_MAX} members", retry_after_s=60.0)
        found.update(parse_state(state), self.now())

    async def heard(self, cluster: str, name: str) -> None:
        await trio.lowlevel.checkpoint()
        self._cluster(cluster).heard(name, self.now())

    async def leave(self, cluster: str, name: str) -> None:
        await trio.lowlevel.checkpoint()
        self._cluster(cluster).gone(name)

    async def report(self, cluster: str, by: str, of: Iterable[str]) -> None:
        await trio.lowlevel.checkpoint()
        found = self._cluster(cluster)
        for name in of:
            if self._reports.setdefault(cluster, Reports()).add(found, by, name, self.now()):
                found.isolate(name, self.now() + ISOLATE_S)

    async def put(self, collection: str, name: str, value: bytes, seconds: float) -> None:
        await trio.lowlevel.checkpoint()
        check_item(collection, name, value)
        kept = self._items.setdefault(collection, OrderedDict())
        kept[name] = (self.now() + seconds, value)
        kept.move_to_end(name)
        while len(kept) > ITEM_COUNT_MAX:
            kept.popitem(last=False)

    async def get(self, collection: str, name: str) -> bytes | None:
        await trio.lowlevel.checkpoint()
        until, value = self._items.get(collection, OrderedDict()).get(name, (0.0, b""))
        return value if until > self.now() else None

    async def all(self, collection: str) -> Mapping[str, bytes]:
        await trio.lowlevel.checkpoint()
        now = self.now()
        return {name: value for name, (until, value) in self._items.get(collection, OrderedDict()).items()
                if until > now}

    async def drop(self, collection: str, name: str) -> None:
        await trio.lowlevel.checkpoint()
        self._items.get(collection, OrderedDict()).pop(name, None)

    async def run(self) -> None:
        while True:
            await trio.sleep(SWEEP_S)
            self.sweep()

    def sweep(self) -> None:
        """Forget what is over."""
        now = self.now()
        for name, cluster in list(self.clusters.items()):
            for member in cluster.sweep(now):
                cluster.gone(member)
            if not cluster.members:
                del self.clusters[name]
                self._reports.pop(name, None)
            elif name in self._reports:
                self._reports[name].sweep(now)
        for collection, kept in list(self._items.items()):
            for name in [name for name, (until, _) in kept.items() if until <= now]:
                del kept[name]
            if not kept:
                del self._items[collection]

    def _cluster(self, name: str) -> Cluster:
        found = self.clusters.get(name)
        if found is None:
            if len(self.clusters) >= CLUSTER_COUNT_MAX:
                raise PeerBusyError(f"there are {CLUSTER_COUNT_MAX} clusters already", retry_after_s=60.0)
            found = self.clusters[name] = Cluster(name)
        return found


def check_item(collection: str, name: str, value: bytes) -> None:
    """Raises UsageError: it is too large to be kept."""
    if len(value) > ITEM_BYTES_MAX or len(name) > 256:
        raise UsageError(f"{collection} {name:.100}: expected at most {ITEM_BYTES_MAX} bytes, found {len(value)}")
