"""
The network in memory: events in order of time, links as FIFO queues, questions and answers that need time.

Called by benchmarks.scale.node and cluster; all on trio's clock, in one thread. One task fires the events: a task for
each of a million transfers would be most of the work. The model: an answer leaves its node's up link piece by piece,
foreground before all else, whole pieces (a real node's connections share the link); it then passes the asker's down
link, and needs half a round trip, or longer where packets are lost (benchmarks.scale.loss). Links keep exact times;
events are fired up to QUANTUM_S late, many at once.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

import outcome
import trio

from lazyfs.errors import PeerError
from lazyfs.peers.model import SILENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from benchmarks.scale.loss import Loss
    from lazyfs.peers.model import Member, Piece, PieceRequest

QUANTUM_S = 50e-6


class Timeline:
    """Calls at their time. `run` fires them, until it is cancelled."""

    def __init__(self) -> None:
        self._events: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._count = 0
        self._sleep: trio.CancelScope | None = None

    def at(self, when: float, call: Callable[..., object], *arguments: Any) -> None:
        """Call it then; of the same time, in the order of being told."""
        self._count += 1
        heapq.heappush(self._events, (when, self._count, call, arguments))
        if self._sleep is not None and when + QUANTUM_S < self._sleep.deadline:
            self._sleep.deadline = when + QUANTUM_S

    async def run(self) -> None:
        events = self._events
        while True:
            limit = trio.current_time()
            while events and events[0][0] <= limit:
                _, _, call, arguments = heapq.heappop(events)
                call(*arguments)
            due = events[0][0] + QUANTUM_S if events else float("inf")
            with trio.CancelScope(deadline=due) as self._sleep:
                await trio.sleep_forever()


@dataclass(slots=True)
class Link:
    """One direction of a node's link. `bytes_count`: that have passed it."""

    rate: float                      # bytes/s
    free_at: float = 0.0
    bytes_count: int = 0

    def carry(self, ready: float, size: int) -> float:
        """When the last byte has passed, of bytes that are ready then."""
        self.free_at = max(ready, self.free_at) + size / self.rate
        self.bytes_count += size
        return self.free_at

    def deliver(self, sent: float, size: int) -> float:
        """The same for the far end: it receives while the near one sends."""
        self.free_at = max(sent, self.free_at + size / self.rate)
        self.bytes_count += size
        return self.free_at


class Host(Protocol):
    """Who answers: benchmarks.scale.node."""

    up: Link
    down: Link
    work: Link | None                # its processor, where that is simulated
    alive: bool
    died_s: float                    # when, of one that is not alive
    silent: bool                     # dead so that nobody says so: the machine is gone, not the process

    def asked(self, answer: Answer) -> None: ...

    def left(self, answer: Answer) -> None: ...


class Fabric:
    """All hosts, and how far they are from each other."""

    def __init__(self, rtt_s: float, zone_rtt_s: float, loss: Loss) -> None:
        self.timeline = Timeline()
        self.loss = loss
        self.hosts: dict[str, Host] = {}
        self.zones: dict[str, str] = {}
        self.rtt_s, self._zone_rtt_s = rtt_s, zone_rtt_s
        self.cross_zone_bytes = 0

    def half_rtt_s(self, one: str, other: str) -> float:
        return (self.rtt_s if self.zones[one] == self.zones[other] else self._zone_rtt_s) / 2


@dataclass
class Answer:
    """One question on its way, and what comes back: Exchange.ask's context manager and iterator, for one task."""

    fabric: Fabric
    asker: str
    server: str
    request: PieceRequest
    open: bool = True
    outstanding: int = 0             # pieces that the server still owes
    _carried_at: float = 0.0         # when its connection has carried what was sent
    _inbox: deque[Piece] = field(default_factory=deque)
    _error: PeerError | None = None
    _waiting: trio.lowlevel.Task | None = None

    async def __aenter__(self) -> Self:
        way_s = self.fabric.half_rtt_s(self.asker, self.server)
        self.outstanding = len(self.request.indexes)
        way_s += self.fabric.loss.timer_s(2 * way_s)
        self.fabric.timeline.at(trio.current_time() + way_s, self._arrived)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: TracebackType | None) -> None:
        self.open = False
        self.fabric.hosts[self.server].left(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        while True:
            if self._inbox:
                return self._inbox.popleft()
            if self._error is not None:
                raise self._error
            if not self.outstanding:
                raise StopAsyncIteration
            self._waiting = trio.lowlevel.current_task()

            def leave(_: object) -> trio.lowlevel.Abort:
                self._waiting = None
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(leave)

    def _wake(self) -> None:
        if self._waiting is not None:
            task, self._waiting = self._waiting, None
            trio.lowlevel.reschedule(task, outcome.Value(None))

    def _arrived(self) -> None:
        """The question is there."""
        host = self.fabric.hosts[self.server]
        if host.alive:
            host.asked(self)
        elif host.silent:
            self.fail(PeerError(f"{self.server} is silent"), after_s=SILENCE_S)
        else:
            self.fail(PeerError(f"{self.server} refuses the connection"))

    def carry(self, began: float, arrived: float, size: int) -> float:
        """When a piece is with the asker that was sent from `began` on, and has passed both links at `arrived`."""
        rtt_s = 2 * self.fabric.half_rtt_s(self.asker, self.server)
        loss = self.fabric.loss
        self._carried_at = max(arrived, max(began, self._carried_at) + size / loss.rate(rtt_s)) + loss.timer_s(rtt_s)
        return self._carried_at + rtt_s / 2

    def land(self, piece: Piece) -> None:
        """A piece is there."""
        if not self.open:
            return
        self.outstanding -= 1
        self._inbox.append(piece)
        self._wake()

    def fail(self, error: PeerError, after_s: float = 0.0) -> None:
        """Half a round trip after that it ends so."""
        way_s = self.fabric.half_rtt_s(self.asker, self.server) + after_s
        self.fabric.timeline.at(trio.current_time() + way_s, self._broken, error)

    def _broken(self, error: PeerError) -> None:
        self._error = error
        self._wake()


@dataclass(frozen=True)
class Port:
    """The Exchange of one node."""

    fabric: Fabric
    name: str

    def ask(self, member: Member, request: PieceRequest) -> Answer:
        return Answer(self.fabric, self.name, member.id, request)

    def heard_at(self, member: Member) -> float:
        """Beats come between the pieces: of who lives, something has just come."""
        host = self.fabric.hosts[member.id]
        return trio.current_time() if host.alive else host.died_s + self.fabric.half_rtt_s(self.name, member.id)
