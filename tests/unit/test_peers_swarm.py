"""The swarm on a clock of its own: one copy from the origin; peers that die, stall, lie or are busy."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from lazyfs.errors import DiskFullError, PeerLacksError
from lazyfs.peers.health import Fault
from lazyfs.peers.known import LEFT_OUT_S, PROBE_MISSES, PROBE_MISSES_READ, PROBE_READ_EVERY
from lazyfs.peers.lateness import DEAF_S, GONE_READ_S
from lazyfs.peers.model import HOPS_MAX, Member, Piece, Priority, View
from lazyfs.peers.pace import URGENT_S
from lazyfs.peers.swarm import SwarmLimits
from tests.swarmkit import Cluster, Node, members, resource

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trio.testing import MockClock

PIECES = 48
MBIT = 125_000.0


def cluster(count: int, *, zones: int = 1, pieces: int = PIECES, bounds: SwarmLimits | None = None,
            link: float = 200 * MBIT) -> Cluster:
    """Pieces of 256 KiB, so that each is a group."""
    return Cluster(members(count, zones), resource(pieces, 1 << 18), link=link, origin_link=link, bounds=bounds)


async def fetch_all(net: Cluster, names: Iterable[str] | None = None, *,
                    priority: Priority = Priority.PREFETCH, window: int = 64) -> dict[str, float]:
    """All pieces on all of these nodes at once; seconds that each took."""
    began, took = trio.current_time(), {}

    async def one(node: Node) -> None:
        await net.want(node, range(net.what.piece_count), deadline=began + 60, priority=priority,
                       window=window)
        took[node.member.id] = trio.current_time() - began

    async with trio.open_nursery() as nursery:
        for name in names if names is not None else list(net.nodes):
            nursery.start_soon(one, net.nodes[name])
    for name in took:
        assert net.nodes[name].have == set(range(net.what.piece_count))
        assert all(health.running == 0 for _, health in net.nodes[name].swarm.health.known())
    return took


def chain(net: Cluster, name: str, index: int) -> list[str]:
    place = net.nodes[name].swarm.place(net.what, index)
    assert place is not None
    return [member.id for member in place.parents]


def root_of(net: Cluster, index: int) -> str:
    return next(name for name in net.nodes if not chain(net, name, index))


def child_and_parent(net: Cluster, index: int = 0) -> tuple[Node, Node]:
    """A node whose parent is not the root, nor asked by the root what it has, and that parent."""
    root = root_of(net, index)
    place = net.nodes[root].swarm.place(net.what, index)
    assert place is not None
    others = {root, *(member.id for member in place.heirs)}
    name = next(name for name in net.nodes if (above := chain(net, name, index)) and above[0] not in others)
    return net.nodes[name], net.nodes[chain(net, name, index)[0]]


async def read(net: Cluster, node: Node, index: int = 0, within: float = 30.0) -> float:
    """One foreground piece; how long it took."""
    began = trio.current_time()
    await net.want(node, [index], deadline=began + within, priority=Priority.FOREGROUND)
    assert index in node.have
    return trio.current_time() - began


@pytest.mark.parametrize(("count", "zones"), [(1, 1), (2, 1), (8, 1), (20, 3)])
@pytest.mark.trio
async def test_a_cluster_that_starts_together_fetches_the_image_once(count: int, zones: int,
                                                                     autojump_clock: MockClock) -> None:
    net = cluster(count, zones=zones)
    took = await fetch_all(net)
    assert sorted(index for _, index in net.origin_pieces) == list(range(PIECES))
    ideal = net.what.size / (200 * MBIT)
    assert max(took.values()) <= 1.8 * ideal    # so few pieces: the depth counts


@pytest.mark.trio
async def test_who_comes_late_takes_nothing_from_the_origin(autojump_clock: MockClock) -> None:
    net = cluster(9)
    late = net.nodes["n0004"]
    net.set_view(View(tuple(node.member for node in net.nodes.values() if node is not late)))
    await fetch_all(net, [name for name in net.nodes if name != "n0004"])
    net.origin_pieces.clear()
    net.set_view(View(members(9)))
    await fetch_all(net, ["n0004"])
    assert net.origin_pieces == []    # of those it is the root for, it asked who was the root before


@pytest.mark.trio
async def test_a_few_complete_ones_are_enough_for_all(autojump_clock: MockClock) -> None:
    net = cluster(12)
    seeds = ("n0003", "n0007")
    for name in seeds:
        net.nodes[name].have = set(range(PIECES))
    net.set_view(View(members(12), frozenset(seeds)))
    await fetch_all(net)
    assert net.origin_pieces == []


@pytest.mark.trio
async def test_heirs_are_not_asked_for_ever_by_the_first_of_all(autojump_clock: MockClock) -> None:
    """A root that finds again and again that nobody has it yet stops asking before it goes to the origin."""
    net = cluster(2, pieces=200)
    own = sum(not chain(net, "n0000", index) for index in range(200))
    await fetch_all(net, ["n0000"], window=4)
    assert own > 50
    assert net.asked["n0000", "n0001"] <= (200 - own) + PROBE_MISSES + own // PROBE_MISSES + 1


@pytest.mark.trio
async def test_reads_of_the_first_of_all_hardly_wait_for_heirs(autojump_clock: MockClock) -> None:
    """Whoever waits for this root waits as well; and that others have become complete, or came, is no reason anew."""
    net = cluster(4, pieces=200)
    net.set_view(View(members(3)))
    first = net.nodes["n0000"]
    own = [index for index in range(200) if not chain(net, "n0000", index)]
    assert len(own) > 50
    for index in own[:25]:
        await read(net, first, index)
    net.set_view(View(members(4)))
    for index in [index for index in own[25:] if not chain(net, "n0000", index)]:
        await read(net, first, index)
    assert sum(net.asked.values()) <= PROBE_MISSES_READ + len(own) // PROBE_READ_EVERY + 1


@pytest.mark.trio
async def test_a_reader_whose_parent_is_killed_goes_on_at_once(autojump_clock: MockClock) -> None:
    net = cluster(12)
    net.origin_delay_s = 0.3
    child, parent = child_and_parent(net)
    took: list[float] = []

    async def reading() -> None:
        took.append(await read(net, child))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reading)
        await trio.sleep(0.1)    # the request is with the parent, which waits for its own
        net.kill(parent.member.id)
    assert took[0] < 0.5
    assert len(net.origin_pieces) == 1
    assert child.swarm.take_reports()[0].fault is Fault.GONE


@pytest.mark.trio
async def test_where_pieces_usually_take_long_a_read_waits_no_longer_than_links_explain(
        autojump_clock: MockClock) -> None:
    net = cluster(12)
    child, parent = child_and_parent(net)
    for _ in range(16):
        child.swarm.pace.add(Priority.BACKGROUND, 0.8)      # 1.5 times that is longer than the silence of a dead parent
    child.swarm.health.rates.usual = 25                     # 32 MiB/s

    async def fetch_ahead() -> None:
        await net.want(child, [0], deadline=trio.current_time() + 30, priority=Priority.BACKGROUND)

    net.freeze(parent.member.id)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch_ahead)
        await trio.sleep(0.1)
        child.swarm.urge(net.what.key, 0)
        await trio.sleep(0.55)
        assert child.swarm.counters["hurried"] == 1


@pytest.mark.trio
async def test_a_read_that_comes_to_wait_for_what_is_fetched_ahead_waits_less_than_a_second(
        autojump_clock: MockClock) -> None:
    net = cluster(12)
    child, parent = child_and_parent(net)
    took: list[float] = []

    async def fetch_ahead() -> None:
        began = trio.current_time()
        await net.want(child, [0], deadline=began + 30, priority=Priority.BACKGROUND)
        took.append(trio.current_time() - began)

    net.freeze(parent.member.id)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch_ahead)
        await trio.sleep(0.1)
        child.swarm.urge(net.what.key, 0)
        child.swarm.urge(net.what.key, 1)    # nobody fetches that
    assert took[0] < 1.0
    assert child.swarm.counters["hurried"] == 1
    assert len(net.origin_pieces) == 1


@pytest.mark.trio
async def test_a_read_that_waits_goes_on_in_the_foreground_when_who_was_asked_dies(autojump_clock: MockClock) -> None:
    net = cluster(12)
    net.origin_delay_s = 0.1
    child, parent = child_and_parent(net)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(net.want, child, [0], deadline=30.0, priority=Priority.BACKGROUND))
        await trio.sleep(URGENT_S[0] / 2)
        child.swarm.urge(net.what.key, 0)
        net.kill(parent.member.id)
    assert child.swarm.counters["hurried"] == 1
    assert child.swarm.counters["requests"] == 2


@pytest.mark.trio
async def test_reads_that_wait_for_what_is_about_to_come_ask_for_nothing_twice(autojump_clock: MockClock) -> None:
    net = cluster(8)
    node = net.nodes["n0004"]
    async with trio.open_nursery() as nursery:
        for other in net.nodes.values():
            nursery.start_soon(partial(net.want, other, range(4), deadline=30.0, priority=Priority.BACKGROUND))
        await trio.testing.wait_all_tasks_blocked()
        for index in range(4):
            node.swarm.urge(net.what.key, index)
    assert node.have == set(range(4))
    assert not node.swarm.counters["hurried"]


@pytest.mark.trio
async def test_a_reader_whose_parent_is_frozen_waits_less_than_a_second(autojump_clock: MockClock) -> None:
    net = cluster(12)
    child, parent = child_and_parent(net)
    net.freeze(parent.member.id)
    assert await read(net, child) < 1.0
    assert child.swarm.counters["hedges"] == 1
    assert len(net.origin_pieces) == 1


def next_of(net: Cluster, index: int) -> Node:
    """Who has only the root before it."""
    return next(node for name, node in net.nodes.items() if len(chain(net, name, index)) == 1)


@pytest.mark.parametrize(("priority", "within"), [(Priority.FOREGROUND, 0.9), (Priority.PREFETCH, 1.2)])
@pytest.mark.trio
async def test_a_frozen_root_is_given_up_by_the_next_in_the_order_alone(
        priority: Priority, within: float, autojump_clock: MockClock) -> None:
    """It was two seconds, for each of its groups anew."""
    net = cluster(12)
    net.freeze(root_of(net, 0))
    living = [node for node in net.nodes.values() if node.state == "up"]
    took = {}

    async def one(node: Node) -> None:
        await net.want(node, [0], deadline=trio.current_time() + 30, priority=priority)
        took[node.member.id] = trio.current_time()

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for node in living:
            nursery.start_soon(one, node)
    assert max(took.values()) - began < within + 0.3    # down the tree
    assert net.origin_pieces == [(next_of(net, 0).member.id, 0)]
    assert took[net.origin_pieces[0][0]] - began < within


@pytest.mark.trio
async def test_a_read_waits_less_for_a_frozen_root_of_which_it_was_asked_ahead(autojump_clock: MockClock) -> None:
    net = cluster(12)
    net.freeze(root_of(net, 0))
    node, took = next_of(net, 0), []

    async def fetch_ahead(index: int) -> None:
        began = trio.current_time()
        await net.want(node, [index], deadline=began + 30, priority=Priority.BACKGROUND)
        took.append(trio.current_time() - began)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch_ahead, 0)
        await trio.sleep(0.1)
        node.swarm.urge(net.what.key, 0)
    assert took[0] < 0.8
    assert net.origin_pieces == [(node.member.id, 0)]


@pytest.mark.trio
async def test_a_read_does_not_go_to_the_origin_while_the_root_says_that_it_waits(autojump_clock: MockClock) -> None:
    net = cluster(12)
    net.origin_delay_s = 5.0
    node = next_of(net, 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(net.want, node, [0], deadline=30.0, priority=Priority.BACKGROUND))
        await trio.sleep(0.1)
        node.swarm.urge(net.what.key, 0)
    assert [name for name, _ in net.origin_pieces] == [root_of(net, 0)]


@pytest.mark.trio
async def test_who_was_silent_is_asked_one_thing_at_first_and_hardly_waited_for(autojump_clock: MockClock) -> None:
    """Frozen for long: after each pause all that it was to give waited for it again."""
    net = cluster(6)
    frozen = net.nodes["n0003"]
    node = net.nodes["n0001"]
    net.freeze(frozen.member.id)
    waits = []
    for index in range(PIECES):
        waits.append(await read(net, node, index))
        await trio.sleep(0.5)
    assert max(waits) < 0.9
    assert sum(wait > 0.3 for wait in waits) <= 8    # each of five finds it out for itself
    assert net.asked["n0001", "n0003"] < PIECES / 4
    assert [report.fault for report in node.swarm.take_reports()].count(Fault.GONE) <= 1


@pytest.mark.trio
async def test_who_is_heard_again_is_asked_again(autojump_clock: MockClock) -> None:
    net = cluster(3, pieces=120)
    node, other = net.nodes["n0001"], net.nodes["n0002"]
    net.freeze(other.member.id)
    for index in range(20):
        await read(net, node, index)
    other.state = "up"
    await trio.sleep(1.0)
    for index in range(20, 120):
        await read(net, node, index)
    assert node.swarm.health.of(other.member.id).gone_in_a_row == 0
    assert node.swarm.health.of(other.member.id).pieces > 10


@pytest.mark.trio
async def test_a_loop_that_was_late_itself_takes_nobody_for_silent(mock_clock: MockClock) -> None:
    """What came meanwhile lies in the sockets."""
    net = cluster(4)
    node = next_of(net, 0)
    net.freeze(root_of(net, 0))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, net, node)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(GONE_READ_S + 0.5)
        await trio.testing.wait_all_tasks_blocked()
        assert not net.origin_pieces
        waited = 0.0
        while not net.origin_pieces:
            mock_clock.jump(DEAF_S / 2)
            waited += DEAF_S / 2
            await trio.testing.wait_all_tasks_blocked()
        assert GONE_READ_S - DEAF_S < waited < GONE_READ_S + DEAF_S
        mock_clock.rate = 1000.0


@pytest.mark.trio
async def test_when_the_roots_are_dead_the_origin_is_still_asked_once(autojump_clock: MockClock) -> None:
    """The next in the order asks it, the others ask that one: no stampede."""
    net = cluster(24, pieces=16)
    dead = {root_of(net, index) for index in range(16)}
    for name in dead:
        net.kill(name)
    await fetch_all(net, [name for name in net.nodes if name not in dead])
    assert len(net.origin_pieces) <= 1.3 * 16


@pytest.mark.trio
async def test_a_slow_origin_is_not_asked_by_those_who_wait_for_the_root(autojump_clock: MockClock) -> None:
    net = cluster(20, pieces=8)
    net.origin_delay_s = 15.0
    await fetch_all(net, priority=Priority.FOREGROUND)
    assert len(net.origin_pieces) == 8


@pytest.mark.trio
async def test_nodes_that_die_meanwhile_cost_the_others_little(autojump_clock: MockClock) -> None:
    net = cluster(24)
    dying = [f"n{index:04}" for index in (3, 17)]

    async def die() -> None:
        for name in dying:
            await trio.sleep(0.2)
            net.kill(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(die)
        await fetch_all(net, [name for name in net.nodes if name not in dying])
    assert len(net.origin_pieces) <= 1.3 * PIECES


@pytest.mark.trio
async def test_views_that_differ_end_all_the_same(autojump_clock: MockClock) -> None:
    net = cluster(16)
    everyone = members(16)
    for position, node in enumerate(net.nodes.values()):
        known = tuple(member for index, member in enumerate(everyone) if (index * 7 + position) % 3)
        node.swarm.set_view(net.what.key, View(known))
    took = await fetch_all(net)
    assert max(took.values()) < 5
    assert len(net.origin_pieces) <= 8 * PIECES


@pytest.mark.trio
async def test_who_has_no_part_in_it_is_left_out_of_the_trees(autojump_clock: MockClock) -> None:
    """Members by a list or DNS: nobody knows which of them have the image."""
    net = cluster(60)
    taking = ["n0007", "n0021", "n0033", "n0048"]
    for name, node in net.nodes.items():
        node.state = "up" if name in taking else "absent"
    await fetch_all(net, taking, window=8)
    assert len(net.origin_pieces) <= 2 * PIECES    # not four
    requests = sum(net.nodes[name].swarm.counters["requests"] for name in taking)
    for name in taking:
        net.nodes[name].have.clear()
    net.origin_pieces.clear()
    await fetch_all(net, taking, window=8)
    assert len(net.origin_pieces) <= 1.2 * PIECES
    again = sum(net.nodes[name].swarm.counters["requests"] for name in taking) - requests
    assert again <= 1.5 * len(taking) * PIECES

    late = net.nodes["n0000"]    # comes later: it is asked again by and by
    late.state = "up"
    late.have = set(range(PIECES))
    for _ in range(12):
        await trio.sleep(LEFT_OUT_S)
        for name in taking:
            net.nodes[name].have.clear()
        await fetch_all(net, taking, window=8)
    assert any(net.asked[name, "n0000"] > 2 for name in taking)


@pytest.mark.trio
async def test_a_liar_is_found_left_alone_and_reported(autojump_clock: MockClock) -> None:
    net = cluster(8)
    net.nodes["n0005"].state = "lying"
    honest = [name for name in net.nodes if name != "n0005"]
    await fetch_all(net, honest)
    believed = [node.swarm for name, node in net.nodes.items() if name != "n0005"]
    lied = [swarm.health.of("n0005") for swarm in believed]
    assert any(health.wrong_pieces for health in lied)
    for swarm in believed:
        if swarm.health.of("n0005").wrong_pieces:
            assert swarm.health.is_away("n0005", net.what.key, trio.current_time() + 300)
            assert [(report.member, report.fault) for report in swarm.take_reports()] == [("n0005", Fault.LIED)]
            assert swarm.take_reports() == []


@pytest.mark.trio
async def test_a_slow_member_is_asked_last_after_a_while(autojump_clock: MockClock) -> None:
    net = cluster(8, pieces=200)
    net.nodes["n0002"].disk.bytes_s = 20 * MBIT
    took = await fetch_all(net, [name for name in net.nodes if name != "n0002"])
    ideal = net.what.size / (200 * MBIT)
    assert max(took.values()) < 4 * ideal    # all that goes through it would take 8 times as long
    slow = [node.swarm.health.is_slow("n0002", trio.current_time()) for node in net.nodes.values()]
    assert any(slow)
    assert not any(node.swarm.health.is_slow(name, trio.current_time())
                   for node in net.nodes.values() for name in net.nodes if name != "n0002")


@pytest.mark.parametrize("position", [1, 2, 4])
@pytest.mark.trio
async def test_a_root_that_was_found_slow_is_waited_for_not_doubled_by_the_origin(
    position: int, autojump_clock: MockClock
) -> None:
    net = cluster(8)
    order = sorted(net.nodes, key=lambda name: len(chain(net, name, 0)))
    root, asker = order[0], net.nodes[order[position]]
    for node in net.nodes.values():
        node.swarm.health.was_slow(root, trio.current_time(), "test")
    await net.want(asker, [0], deadline=trio.current_time() + 30)
    assert [name for name, index in net.origin_pieces] == [root]


@pytest.mark.trio
async def test_a_busy_peer_names_a_better_one_and_only_members_are_asked(autojump_clock: MockClock) -> None:
    net = cluster(12)
    child, parent = child_and_parent(net)
    better = next(node for name, node in net.nodes.items() if name not in chain(net, child.member.id, 0)
                  and node is not child)
    better.have = {0}
    parent.busy_until = trio.current_time() + 100
    parent.better = ("evil.example:80", better.member.address)
    await read(net, child)
    assert better.sent == net.what.piece_bytes(0)
    assert net.origin_pieces == []


@pytest.mark.trio
async def test_busy_peers_are_asked_again_by_who_can_wait(autojump_clock: MockClock) -> None:
    net = cluster(2)
    index = next(index for index in range(PIECES) if chain(net, "n0000", index))
    child, parent = net.nodes["n0000"], net.nodes["n0001"]
    parent.have = {index}
    parent.busy_until = trio.current_time() + 0.5
    await net.want(child, [index], deadline=trio.current_time() + 30)
    assert net.origin_pieces == []
    other = next(one for one in range(PIECES) if chain(net, "n0000", one) and one != index)
    parent.have.add(other)
    parent.busy_until = trio.current_time() + 100
    assert await read(net, child, other) < 1.0    # a reader goes to the origin
    assert net.origin_pieces == [("n0000", other)]


async def _never(piece: Piece, member: Member) -> bool:
    raise AssertionError(f"{piece.index} of {member.id}")


@pytest.mark.trio
async def test_it_ends_at_its_deadline_with_what_is_missing(autojump_clock: MockClock) -> None:
    net = cluster(8)
    net.origin_delay_s = 100.0
    node = net.nodes["n0000"]
    mine = [index for index in range(PIECES) if not chain(net, "n0000", index)]
    began = trio.current_time()
    left = await node.swarm.fetch(net.what, range(PIECES), priority=Priority.PREFETCH, deadline=began + 5, hops=0,
                                  deliver=_never)
    assert trio.current_time() - began == pytest.approx(5)
    assert left == list(range(PIECES))
    assert mine
    assert await node.swarm.fetch(net.what, [3, 1], priority=Priority.PREFETCH, deadline=began, hops=0,
                                  deliver=_never) == [1, 3]


@pytest.mark.trio
async def test_what_the_origin_must_give_is_said_at_once(autojump_clock: MockClock) -> None:
    """Two nodes, each the root of half: if each waited for its call to end, both would wait for ever."""
    net = cluster(2)
    given: dict[str, set[int]] = {}

    async def everything(node: Node) -> None:
        async def deliver(piece: Piece, _member: Member) -> bool:
            node.have.add(piece.index)
            return True

        def origin(indexes: list[int]) -> None:
            given.setdefault(node.member.id, set()).update(indexes)
            node.have.update(indexes)

        left = await node.swarm.fetch(net.what, range(PIECES), priority=Priority.PREFETCH, hops=0, origin=origin,
                                      deadline=trio.current_time() + 20, deliver=deliver)
        assert left == []
        assert node.have == set(range(PIECES))

    async with trio.open_nursery() as nursery:
        for node in net.nodes.values():
            nursery.start_soon(everything, node)
    assert trio.current_time() < 10
    assert given["n0000"] | given["n0001"] == set(range(PIECES))
    assert not given["n0000"] & given["n0001"]


@pytest.mark.trio
async def test_a_request_that_was_passed_on_too_often_ends(autojump_clock: MockClock) -> None:
    net = cluster(3)
    with pytest.raises(PeerLacksError):
        await net.nodes["n0000"].swarm.fetch(net.what, [0], priority=Priority.COPY, deadline=10, hops=HOPS_MAX + 1,
                                             deliver=_never)


@pytest.mark.trio
async def test_what_deliver_raises_comes_out_as_it_is(autojump_clock: MockClock) -> None:
    net = cluster(2)
    index = next(index for index in range(PIECES) if chain(net, "n0000", index))
    net.nodes["n0001"].have = {index}

    async def full(piece: Piece, member: Member) -> bool:
        raise DiskFullError("no space")

    with pytest.raises(DiskFullError):
        await net.nodes["n0000"].swarm.fetch(net.what, [index], priority=Priority.COPY, deadline=10, hops=0,
                                             deliver=full)
    assert net.nodes["n0000"].swarm.health.of("n0001").running == 0


@pytest.mark.trio
async def test_who_is_cancelled_leaves_no_request_behind(autojump_clock: MockClock) -> None:
    net = cluster(8)
    net.origin_delay_s = 50.0
    swarm = net.nodes["n0000"].swarm
    with trio.move_on_after(1) as scope:
        await swarm.fetch(net.what, range(PIECES), priority=Priority.PREFETCH, deadline=50, hops=0, deliver=_never)
    assert scope.cancelled_caught
    assert swarm.counters["requests"] > 0
    assert not any(health.running for _, health in swarm.health.known())


@pytest.mark.parametrize("size", [1, (1 << 18) + 1])
@pytest.mark.trio
async def test_a_piece_of_another_size_is_never_delivered(size: int, autojump_clock: MockClock,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    net = cluster(2)
    index = next(index for index in range(PIECES) if chain(net, "n0000", index))
    net.nodes["n0001"].have = {index}
    monkeypatch.setattr("tests.swarmkit.Piece", lambda at, _data: Piece(at, bytes(size)))
    left = await net.nodes["n0000"].swarm.fetch(net.what, [index], priority=Priority.COPY, deadline=10, hops=0,
                                                deliver=_never)
    assert left == [index]
    assert net.nodes["n0000"].swarm.health.of("n0001").wrong_pieces == 1


@pytest.mark.trio
async def test_a_download_limit_holds_for_all_peers_but_no_reader_waits_for_it(autojump_clock: MockClock) -> None:
    rate = 10 * MBIT
    net = cluster(4, link=0.0, bounds=SwarmLimits(download_rate=rate))
    for name in ("n0001", "n0002", "n0003"):
        net.nodes[name].have = set(range(PIECES))
    took = await fetch_all(net, ["n0000"])
    peers = net.nodes["n0000"].swarm.counters["bytes"]
    assert took["n0000"] == pytest.approx(peers / rate, abs=0.6)
    net.nodes["n0000"].have.clear()
    assert await read(net, net.nodes["n0000"]) < 0.1


@pytest.mark.trio
async def test_nobody_is_asked_where_no_swarm_is_known(autojump_clock: MockClock) -> None:
    net = cluster(3)
    swarm = net.nodes["n0000"].swarm
    swarm.forget(net.what.key)
    assert swarm.view(net.what.key) is None
    assert await swarm.fetch(net.what, [2, 0], priority=Priority.COPY, deadline=10, hops=0, deliver=_never) == [0, 2]
    swarm.set_view(net.what.key, View((swarm.me,)))
    assert await swarm.fetch(net.what, [0], priority=Priority.COPY, deadline=10, hops=0, deliver=_never) == [0]
    assert not net.asked


@pytest.mark.trio
async def test_it_tells_who_what_and_how_fast(autojump_clock: MockClock) -> None:
    net = cluster(4)
    net.kill("n0003")
    await fetch_all(net, ["n0000", "n0001", "n0002"])
    told = net.nodes["n0000"].swarm.describe()
    assert told["swarms"] == {net.what.key: {"members": 4, "complete": 0}}
    peers = {peer["id"]: peer for peer in told["peers"]}
    assert peers["n0003"]["failures"] > 0
    assert "broke off" in peers["n0003"]["last_error"]
    assert peers["n0001"]["bytes"] > 0
    assert told["counters"]["bytes"] == sum(peer["bytes"] for peer in peers.values())
