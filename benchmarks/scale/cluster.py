"""
A simulated cluster from beginning to end: who is in it, who is slow, lies or dies, and when all have the image.

`simulate(Setting)` is the one door. The clock is trio's MockClock: it jumps to the next event when all tasks wait.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING

import trio
from trio.testing import MockClock

from benchmarks.scale.loss import Loss
from benchmarks.scale.network import Fabric
from benchmarks.scale.node import Node
from benchmarks.scale.origin import Origin
from benchmarks.scale.result import Result
from benchmarks.scale.setting import MBIT
from lazyfs.image.digest import Digest
from lazyfs.peers.announce import COMPLETE, PARTIAL
from lazyfs.peers.model import Kind, Member, Resource, View
from lazyfs.peers.ownrate import OwnRate
from lazyfs.peers.swarm import Swarm
from lazyfs.peers.topology import Topology

if TYPE_CHECKING:
    from benchmarks.scale.setting import Setting

_SLOW_TIMES = 10
_ORDERS_BYTES_MAX = 1 << 30
_JOIN_S = 0.01                       # to tell the tracker that one begins, and hear who is there
_TRACK_S = 0.25


def simulate(setting: Setting) -> Result:
    """Run it to the end, or to its limit."""
    cluster = _Cluster(setting)
    trio.run(cluster.run, clock=MockClock(autojump_threshold=0))
    return cluster.result()


class _Cluster:
    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._draw = random.Random(setting.seed)
        self._fabric = Fabric(setting.rtt_ms / 1e3, setting.zone_rtt_ms / 1e3,
                              Loss(setting.loss, random.Random(setting.seed)))
        self._origin = Origin(self._fabric, setting.origin_mbit * MBIT, setting.origin_ms / 1e3)
        self._resource = Resource(Kind.DEVICE, Digest.of(b"scale %d" % setting.seed), setting.image_mib << 20,
                                  setting.piece_kib << 10)
        order = iter(self._draw.sample(range(setting.nodes), setting.nodes))
        take = lambda share: set(islice(order, round(share * setting.nodes)))    # noqa: E731 - each from what is left
        self._dying, self._liars, self._slow, self._slow_disk = map(
            take, (setting.dying, setting.liars, setting.slow, setting.slow_disk))
        self._members = tuple(
            Member(f"n{number:05}", f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}:4300",
                   f"z{number % setting.zones}" if setting.zones > 1 else "",
                   int(min(self._rate(number), self._disk_rate(number))) if setting.declared else 0)
            for number in range(setting.nodes))
        self._nodes: list[Node] = []
        self._over = trio.Event()
        self._open_count = setting.nodes
        self._view = View()
        self._topology = Topology(self._view)

    def _rate(self, number: int) -> float:
        """A node's bytes/s, each way."""
        return self.setting.node_mbit * MBIT / (_SLOW_TIMES if number in self._slow else 1)

    def _disk_rate(self, number: int) -> float:
        """Bytes/s of what it gives."""
        return self._rate(number) / _SLOW_TIMES if number in self._slow_disk else math.inf

    def _make(self, number: int, member: Member) -> Node:
        setting = self.setting
        rate = self._rate(number)
        node = Node(member, self._resource, self._fabric, self._origin, up=rate, down=rate, window=setting.window,
                    hot=min(setting.hot_mib << 20, self._resource.size) // self._resource.piece_size,
                    disk=self._disk_rate(number),
                    work=setting.work_mb * 1e6, in_order=bool(setting.in_order), lies=number in self._liars,
                    ended=self._ended)
        self._fabric.hosts[member.id], self._fabric.zones[member.id] = node, member.zone
        self._nodes.append(node)
        return node

    async def run(self) -> None:
        setting = self.setting
        for number, member in enumerate(self._members):
            node = self._make(number, member)
            node.swarm = Swarm(member, node.port, make_topology=self._ready, rng=random.Random(number))
            node.own_rate = OwnRate(member, node.giving, node.swarm.health.rates)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._fabric.timeline.run)
            for node in self._nodes:
                await nursery.start(self._live, node)
            for number in sorted(self._dying):
                when = setting.spread_s + self._draw.uniform(0, setting.ideal_s)
                self._fabric.timeline.at(when, self._nodes[number].die, self._draw.random() < setting.silent)
            for node in self._nodes:
                self._fabric.timeline.at(self._draw.uniform(0, setting.spread_s), node.start)
            nursery.start_soon(self._track)
            with trio.move_on_after(setting.limit_s):
                await self._over.wait()
            nursery.cancel_scope.cancel()

    async def _live(self, node: Node, task_status: trio.TaskStatus[None]) -> None:
        """A node's life."""
        async with trio.open_nursery() as nursery:
            node.nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    async def _track(self) -> None:
        """The tracker's word: who has begun, who has all, who is not dead for long. All hear it at the same time."""
        await trio.sleep(_JOIN_S)
        while True:
            now = trio.current_time()
            there = [node for node in self._nodes
                     if node.has_begun and (node.alive or node.died_s + self.setting.noticed_s > now)]
            for node in there:
                if node.own_rate.look(now):
                    node.swarm.me = node.own_rate.own
            found = View(tuple(node.own_rate.said for node in there),
                         frozenset(node.member.id for node in there if node.complete),
                         frozenset(node.member.id for node in there if node.share >= PARTIAL / COMPLETE))
            if found != self._view:
                self._view = found
                self._topology = Topology(self._view, _ORDERS_BYTES_MAX)
                for node in self._nodes:
                    if node.alive and node.has_begun:
                        node.swarm.set_view(self._resource.key, self._view)
                        node.read()
            await trio.sleep(_TRACK_S)

    def _ended(self) -> None:
        """A node has all of it, or died before."""
        self._open_count -= 1
        if not self._open_count:
            self._over.set()

    def _ready(self, view: View) -> Topology:
        """One for all nodes, as all have the same view."""
        assert view is self._view
        return self._topology

    def result(self) -> Result:
        setting, size = self.setting, self._resource.size
        living = [node for node in self._nodes if node.alive]
        depth: Counter[int] = Counter()
        for node in living:
            depth.update(node.depth)
        del depth[0]
        honest_fast = [node for number, node in enumerate(self._nodes) if node.alive and number not in self._slow]
        done = [node for node in honest_fast if node.complete]
        return Result(
            nodes=len(living),
            done_s=[node.done_s - node.began_s for node in done],
            hot_s=[node.hot_s - node.began_s for node in done],
            unfinished=sum(not node.complete for node in honest_fast),
            ideal_s=setting.ideal_s,
            origin_images=self._origin.up.bytes_count / size,
            depth=depth,
            uploads=[node.uploads for node in living],
            counters=sum((node.swarm.counters for node in living), Counter[str]()),
            cross_zone_images=self._fabric.cross_zone_bytes / size,
        )
