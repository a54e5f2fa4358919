"""
Whose chunk is fetched next: a lane an image, and fairness between them. Pure decisions. Who calls: fetch.scheduler.

Two bounds stand above each other. A *source* (a registry) has its state, its pauses and at most a share of the slots:
one that hangs holds up its own images only. A *lane* is one image's part of it: whoever has had the fewest bytes of
late comes first, so a container that reads everything is behind one that reads its first page, however long its queue.
State: of each lane its queues and running transfers; what an image has had is remembered for as long as the image is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from lazyfs.fetch.constants import BULK_ACTIVE_S, BULK_BYTES, SHARE_HALF_LIFE_S
from lazyfs.fetch.lane import FlightQueue
from lazyfs.fetch.sources import Sources

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazyfs.fetch.constants import FetchLimits
    from lazyfs.fetch.flight import Flight
    from lazyfs.fetch.sources import SourceState
    from lazyfs.fetch.transfer import Transfer
    from lazyfs.registry.place import ImageSource


class Share:
    """What an image has had of late: stored bytes, half of them forgotten each SHARE_HALF_LIFE_S."""

    __slots__ = ("_at", "_bytes")

    def __init__(self) -> None:
        self._bytes = 0.0
        self._at = float("-inf")

    def recent(self, now: float) -> float:
        return self._bytes * 0.5 ** ((now - self._at) / SHARE_HALF_LIFE_S) if self._bytes else 0.0

    def add(self, size: int, now: float) -> None:
        self._bytes = self.recent(now) + size
        self._at = now

    def is_active(self, now: float) -> bool:
        """Whether it has had anything just now."""
        return now - self._at < BULK_ACTIVE_S


@dataclass(slots=True, eq=False)
class Lane:
    """
    One image's queues.

    :state: of the source that it shares with other images.
    :running_count: foreground transfers under way.
    """

    source: ImageSource
    state: SourceState
    share: Share
    foreground: FlightQueue = field(default_factory=FlightQueue)
    background: FlightQueue = field(default_factory=FlightQueue)
    running_count: int = 0

    def is_idle(self, now: float) -> bool:
        return self.state.paused_until <= now and not (
            self.running_count or len(self.foreground) or len(self.background))

    def is_bulk(self, now: float) -> bool:
        """Whether it has had so much that others' first reads go before it."""
        return self.share.recent(now) > BULK_BYTES

    def promote(self, flight: Flight) -> None:
        """Somebody waits for it now."""
        if self.background.discard(flight):
            self.foreground.push(flight)


class Lanes:
    """Those with work; a lane without is removed, for it holds its source."""

    def __init__(self, bounds: FetchLimits) -> None:
        self.sources = Sources()
        self._bounds = bounds
        self._lanes: dict[int, Lane] = {}    # by id() of the source
        self._shares: WeakKeyDictionary[ImageSource, Share] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def get(self, source: ImageSource) -> Lane | None:
        return self._lanes.get(id(source))

    def of(self, source: ImageSource) -> Lane:
        """The lane of an image; made if it has none."""
        lane = self._lanes.get(id(source))
        if lane is None:
            share = self._shares.get(source)
            if share is None:
                share = self._shares[source] = Share()
            lane = self._lanes[id(source)] = Lane(source, self.sources.of(source), share)
        return lane

    def promote(self, flight: Flight) -> None:
        """Somebody waits for it now, wherever it is."""
        lane = self._lanes.get(id(flight.source))
        if lane is not None:
            lane.promote(flight)

    def sweep(self, now: float) -> None:
        for key in [key for key, lane in self._lanes.items() if lane.is_idle(now)]:
            del self._lanes[key]

    def clear(self) -> None:
        """Forget all, the sources' states too."""
        self._lanes.clear()
        self._shares.clear()
        self.sources = Sources()

    def admits(self, source: ImageSource, now: float) -> bool:
        """Whether something may be asked of a source now."""
        return self.sources.of(source).admits(now)

    def judge(self, transfer: Transfer, now: float) -> float | None:
        """What a transfer tells of its source. Returns when that is to be tried, if it is down now: trio's clock."""
        state = self.sources.of(transfer.source)
        bad = next((flight.bad for flight in transfer.flights if flight.bad is not None), None)
        error = transfer.error or bad
        if transfer.cancelled:
            state.abandoned()
        elif transfer.landed_count or error is None:
            state.succeeded()
        else:
            return state.failed(error, now)
        return None

    def next_foreground(self, running_count: int, now: float) -> Lane | None:
        """
        Whose oldest read is next; None: nobody's may start.

        Args:
            running_count: foreground transfers under way, of all lanes.
            now: trio's clock.

        """
        bounds = self._bounds
        if running_count >= bounds.foreground_total:
            return None
        # The last slots are for images that have none: their first reads need not wait for anybody's end.
        scarce = running_count >= bounds.foreground_total - min(bounds.foreground_reserve, bounds.foreground_total // 4)
        able = [lane for lane in self._lanes.values()
                if len(lane.foreground)
                and lane.running_count < self._slots(lane, now)
                and not (scarce and lane.running_count)
                and lane.state.running_count < bounds.foreground_per_server
                and lane.state.admits(now)]
        return min(able, key=lambda lane: lane.share.recent(now), default=None)

    def _slots(self, lane: Lane, now: float) -> int:
        """So many transfers of a lane at once: fewer of one that reads and reads, while others are there too."""
        if lane.is_bulk(now) and any(one is not lane.share and one.is_active(now) for one in self._shares.values()):
            return min(self._bounds.foreground_bulk, self._bounds.foreground_per_source)
        return self._bounds.foreground_per_source

    def next_background(self, now: float) -> Lane | None:
        """Whose read-ahead is next."""
        able = [lane for lane in self._lanes.values() if len(lane.background) and lane.state.admits(now)]
        return min(able, key=lambda lane: lane.share.recent(now), default=None)
