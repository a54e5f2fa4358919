"""Trees of random clusters: no rings whatever the nodes know, load spread, and few moves when members come and go."""

from __future__ import annotations

from collections import Counter
from graphlib import TopologicalSorter

from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.peers.model import Member, View
from lazyfs.peers.topology import Topology, group_seed
from tests.swarmkit import members

RATES = st.sampled_from([0, 1 << 20, 1 << 27, 1 << 30])
CLUSTERS = st.lists(st.tuples(st.sampled_from(["", "a", "b"]), RATES), min_size=1, max_size=30).map(
    lambda rows: tuple(Member(f"m{index}", f"h{index}:1", zone, rate) for index, (zone, rate) in enumerate(rows)))


@settings(max_examples=60, deadline=None)
@given(CLUSTERS, st.integers(0, 1 << 30), st.data())
def test_requests_never_go_in_a_ring_though_all_views_differ(cluster: tuple[Member, ...], group: int,
                                                             data: st.DataObject) -> None:
    seed = group_seed("r", group)
    asks: dict[str, list[str]] = {}
    for member in cluster:
        known = data.draw(st.sets(st.sampled_from(cluster)))
        place = Topology(View(tuple({*known, member}))).place(member.id, seed)
        asks[member.id] = [parent.id for parent in place.parents]
    TopologicalSorter(asks).prepare()    # raises CycleError


@settings(max_examples=40, deadline=None)
@given(CLUSTERS, st.integers(0, 1 << 30))
def test_everybody_reaches_the_one_root(cluster: tuple[Member, ...], group: int) -> None:
    topology = Topology(View(cluster))
    found = {member.id: topology.place(member.id, group_seed("r", group)) for member in cluster}
    roots = [name for name, place in found.items() if place.is_root]
    assert len(roots) == 1
    for name in found:
        steps, at = 0, name
        while found[at].parents:
            at, steps = found[at].parents[0].id, steps + 1
        assert at == roots[0]
        assert steps <= 2 * len(cluster).bit_length()
    crossing = sum(place.parents[0].zone != next(m.zone for m in cluster if m.id == name)
                   for name, place in found.items() if place.parents)
    assert crossing == len({member.zone for member in cluster}) - 1


def test_the_busiest_uploader_sends_little_more_than_the_mean() -> None:
    """Of equal members; 400 groups, as an image of 400 MiB has."""
    for count, zones in ((8, 1), (40, 1), (30, 3)):
        topology = Topology(View(members(count, zones)))
        given_to: Counter[str] = Counter()
        for group in range(400):
            for member in topology.members:
                parents = topology.place(member.id, group_seed("r", group)).parents
                if parents:
                    given_to[parents[0].id] += 1
        assert max(given_to.values()) <= 1.3 * sum(given_to.values()) / count


def test_a_member_that_comes_or_goes_moves_few_roots() -> None:
    """What the origin is asked for again is what changes its root: 1/n of the groups."""
    count, groups = 50, 2000
    everyone = members(count + 1)
    before, after = Topology(View(everyone[:-1])), Topology(View(everyone))

    def roots(topology: Topology) -> list[str]:
        found = []
        for group in range(groups):
            seed = group_seed("r", group)
            order, _ = topology._order(slice(0, len(topology)), seed)
            found.append(topology.members[int(order[0])].id)
            assert topology.place(found[-1], seed).is_root
        return found

    old, new = roots(before), roots(after)
    moved = [index for index in range(groups) if old[index] != new[index]]
    assert all(new[index] == everyone[-1].id for index in moved)    # to who came, never between the others
    assert 0 < len(moved) <= 1.6 * groups / count
    for index in moved:    # and who came asks the one that was the root before
        assert after.place(everyone[-1].id, group_seed("r", index)).heirs[0].id == old[index]
