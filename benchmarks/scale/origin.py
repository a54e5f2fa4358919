"""
The simulated registry: its link is shared by all bodies that it sends at a time, as TCP connections share one.

Called by benchmarks.scale.node and cluster. A node asks for one body at a time, as the real one does for whatever no
read waits for (fetch.constants.FetchLimits.background_streams), in the order of the image. State: the bodies under
way, and what each node has still to ask for.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from benchmarks.scale.network import Link

if TYPE_CHECKING:
    from benchmarks.scale.network import Fabric
    from benchmarks.scale.node import Node

_BYTE = 1.0                          # less is nothing: times are floats


@dataclass(slots=True)
class _Body:
    node: Node
    index: int
    size: int
    left: float


class Origin:
    """A link, and a delay before an answer begins. `count`: pieces that it was asked for."""

    def __init__(self, fabric: Fabric, rate: float, delay_s: float) -> None:
        """`rate`: bytes/s."""
        self._fabric, self._delay_s = fabric, delay_s
        self.up = Link(rate)
        self.count = 0
        self._wanted: dict[str, list[int]] = {}      # heaps, by node
        self._busy: set[str] = set()
        self._bodies: list[_Body] = []
        self._shared_at = 0.0
        self._turn = 0                               # the next end that was worked out, unless another one came

    def ask(self, node: Node, index: int) -> None:
        heapq.heappush(self._wanted.setdefault(node.member.id, []), index)
        self._next(node)

    def _next(self, node: Node) -> None:
        name = node.member.id
        if name not in self._busy and self._wanted.get(name) and node.alive:
            self._busy.add(name)
            self.count += 1
            index = heapq.heappop(self._wanted[name])
            self._fabric.timeline.at(trio.current_time() + self._delay_s, self._begin, node, index)

    def _begin(self, node: Node, index: int) -> None:
        self._share()
        size = node.resource.piece_bytes(index)
        self.up.bytes_count += size
        self._bodies.append(_Body(node, index, size, float(size)))
        self._plan()

    def _share(self) -> None:
        """What all have had since the last time."""
        now = trio.current_time()
        each = (now - self._shared_at) * self.up.rate / max(1, len(self._bodies))
        for body in self._bodies:
            body.left -= each
        self._shared_at = now

    def _plan(self) -> None:
        self._turn += 1
        if self._bodies:
            left = max(0.0, min(body.left for body in self._bodies))
            end = trio.current_time() + left * len(self._bodies) / self.up.rate
            self._fabric.timeline.at(end, self._end, self._turn)

    def _end(self, turn: int) -> None:
        if turn != self._turn:
            return
        self._share()
        done = [body for body in self._bodies if body.left < _BYTE]
        self._bodies = [body for body in self._bodies if body.left >= _BYTE]
        for body in done:
            self._sent(body)
        self._plan()

    def _sent(self, body: _Body) -> None:
        """At the far end: who sends slowly keeps nobody else's bytes from it. Each piece is a connection's."""
        node, size = body.node, body.size
        now, loss, rtt_s = trio.current_time(), self._fabric.loss, self._fabric.rtt_s
        carried = now + size / loss.rate(rtt_s) + loss.timer_s(rtt_s)
        self._fabric.timeline.at(max(node.down.deliver(now, size), carried), node.landed, body.index, 1)
        self._busy.discard(node.member.id)
        self._next(node)
