"""Who asks whom: the shape of one group's tree, zones, slow members, who may have a piece already."""

from __future__ import annotations

from collections import Counter

import pytest

from lazyfs.peers.model import Member, View
from lazyfs.peers.topology import ANCESTORS_MAX, HEADS, HEIRS, HOLDERS, Place, Topology, group_pieces, group_seed
from tests.swarmkit import members, resource


def places(topology: Topology, group: int) -> dict[str, Place]:
    return {member.id: topology.place(member.id, group_seed("r", group)) for member in topology.members}


def depth(found: dict[str, Place], name: str) -> int:
    steps = 0
    while found[name].parents:
        name, steps = found[name].parents[0].id, steps + 1
    return steps


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100, 1000])
def test_a_group_has_one_root_and_a_binary_tree(count: int) -> None:
    found = places(Topology(View(members(count))), 5)
    assert sum(place.is_root for place in found.values()) == 1
    children = Counter(place.parents[0].id for place in found.values() if place.parents)
    assert max(children.values(), default=0) <= 2
    assert max(depth(found, name) for name in found) == count.bit_length() - 1


def test_groups_of_a_pair_have_opposite_orders() -> None:
    ready = Topology(View(members(9)))
    for pair in range(50):
        one, other = (ready._order(slice(0, 9), group_seed("device/a", 2 * pair + half))[0] for half in (0, 1))
        assert list(one) == list(reversed(other))


def test_what_a_member_gives_is_even_over_few_groups() -> None:
    """Eight groups of eight members; by orders that are drawn one by one the busiest gave 14 where the mean is 7."""
    ready = Topology(View(members(8)))
    for first in range(0, 400, 8):
        gives = Counter(place.parents[0].id for group in range(first, first + 8) for member in ready.members
                        if (place := ready.place(member.id, group_seed("device/a", group))).parents)
        assert max(gives.values()) <= 8
        assert min(gives.values()) >= 4


def test_who_stands_in_comes_after_the_parents_and_the_chain_is_short() -> None:
    found = places(Topology(View(members(500))), 1)
    for name, place in found.items():
        assert len(place.parents) <= ANCESTORS_MAX + HEADS
        assert len({member.id for member in place.parents} | {name}) == len(place.parents) + 1
        for parent, above in zip(place.parents[:ANCESTORS_MAX], place.parents[1:ANCESTORS_MAX], strict=False):
            assert found[parent.id].is_root or found[parent.id].parents[0] == above


def test_when_a_root_is_gone_its_heir_alone_has_nobody_left_to_ask() -> None:
    """So that one node asks the origin, and the others ask that one."""
    found = places(Topology(View(members(200))), 3)
    root = next(name for name, place in found.items() if place.is_root)
    heir = found[root].heirs[0]
    alone = [name for name, place in found.items() if {member.id for member in place.parents} <= {root}]
    assert set(alone) == {root, heir.id}


def test_a_root_that_has_just_come_asks_those_first_that_have_something() -> None:
    """Of many that came with it nobody has."""
    everyone = members(60)
    partial = frozenset({"n0007", "n0021"})
    for group in range(20):
        before = places(Topology(View(everyone)), group)
        found = places(Topology(View(everyone, partial=partial)), group)
        for name, place in found.items():
            assert place.parents == before[name].parents
            heirs = [member.id for member in place.heirs]
            assert len(heirs) == (HEIRS if place.is_root else 0)
            if place.is_root:
                some = partial - {name}
                assert set(heirs[:len(some)]) == some
                rest = [one.id for one in before[name].heirs if one.id not in some]
                assert heirs[len(some):] == rest[:HEIRS - len(some)]


def test_a_zone_is_entered_once_a_group() -> None:
    everyone = members(120, zones=4)
    zone_of = {member.id: member.zone for member in everyone}
    for group in range(50):
        found = places(Topology(View(everyone)), group)
        crossing = [name for name, place in found.items()
                    if place.parents and place.parents[0].zone != zone_of[name]]
        assert len(crossing) == 3
        assert sum(place.is_root for place in found.values()) == 1
        assert len({zone_of[name] for name in crossing}) == 3


def test_a_zones_stand_in_asks_the_other_zones_before_the_origin() -> None:
    everyone = members(40, zones=2)
    found = places(Topology(View(everyone)), 0)
    entry = next(name for name, place in found.items()
                 if place.parents and place.parents[0].zone != next(m.zone for m in everyone if m.id == name))
    heirs = [place for place in found.values() if place.parents and place.parents[0].id == entry]
    assert heirs
    assert any(member.zone != heirs[0].parents[0].zone for member in heirs[0].parents)


def test_slow_members_are_leaves() -> None:
    everyone = members(100, rates=[1 << 27] * 50 + [1 << 24] * 50)
    topology = Topology(View(everyone))
    given: Counter[str] = Counter()
    for group in range(300):
        given.update(place.parents[0].id for place in places(topology, group).values() if place.parents)
    slow = sum(given[member.id] for member in everyone[50:])
    assert slow < 0.05 * sum(given.values())


def test_who_is_complete_is_asked_before_the_origin_its_own_zone_first() -> None:
    everyone = members(30, zones=3)
    complete = frozenset({"n0000", "n0003", "n0006", "n0001"})    # three in z0, one in z1
    found = places(Topology(View(everyone, complete)), 2)
    for name, place in found.items():
        zone = f"z{int(name[1:]) % 3}"
        holders = {member.id for member in place.holders}
        assert name not in holders
        assert len(holders) <= HOLDERS
        if zone == "z0":
            assert holders <= {"n0000", "n0003", "n0006"}
        first = {member.id for member in place.parents[:1]}    # who is asked anyway
        if zone == "z1" and name != "n0001":
            assert holders == {"n0001"} - first
        if zone == "z2":
            assert holders


def test_it_does_not_matter_in_which_order_members_are_named() -> None:
    everyone = members(50, zones=2)
    one, other = Topology(View(everyone)), Topology(View(tuple(reversed(everyone))))
    for group in range(20):
        assert places(one, group) == places(other, group)


def test_a_member_that_says_an_absurd_rate_harms_nobody() -> None:
    everyone = (*members(10), Member("x", "x:1", up_rate=1 << 62), Member("y", "y:1", up_rate=-5))
    found = places(Topology(View(everyone)), 0)
    assert sum(place.is_root for place in found.values()) == 1


@pytest.mark.parametrize(("pieces", "piece_size", "expected"), [
    (1, 1 << 20, 1), (3000, 1 << 20, 1), (10_000, 1 << 20, 3), (100, 1 << 16, 4), (1 << 20, 1 << 16, 256),
])
def test_groups_are_small_but_not_more_than_can_be_ordered(pieces: int, piece_size: int, expected: int) -> None:
    assert group_pieces(resource(pieces, piece_size)) == expected


def test_few_orders_are_kept() -> None:
    topology = Topology(View(members(100)), orders_bytes_max=8 * 100 * 3)
    for group in range(50):
        places(topology, group)
    assert len(topology._orders) == 3
