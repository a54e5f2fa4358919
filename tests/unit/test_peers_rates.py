"""What a node can give, as it finds out itself, and as it is told by others: who is slow, who says so, who is not."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

import pytest
import trio

from lazyfs.peers.model import Member, View
from lazyfs.peers.ownrate import HEARD_S, KEPT_S, OwnRate
from lazyfs.peers.rates import STEP_MAX, Giving, Rates
from lazyfs.peers.topology import RATE_TYPICAL, Topology, group_seed
from tests.swarmkit import members

if TYPE_CHECKING:
    from trio.testing import MockClock

MIB = 1 << 20
ME = Member("me", "me:1")


async def give(giving: Giving, pieces: int, bytes_s: float, askers: int = 2) -> None:
    """Pieces of 1 MiB, all wanted at once by so many, one after the other on a link."""
    for number in range(pieces):
        giving.begin(f"a{number % askers}")
    for number in range(pieces):
        await trio.sleep(MIB / bytes_s)
        giving.gave(MIB, MIB / bytes_s)
        giving.end(f"a{number % askers}")


def told(steps: dict[str, int]) -> Rates:
    rates = Rates()
    for name, step in steps.items():
        rates.say(name, step, 0.0)
    return rates


@pytest.mark.parametrize(("bytes_s", "step"), [(125e6, 27), (12.5e6, 24), (1e6, 20), (1.25e9, 30)])
@pytest.mark.trio
async def test_a_node_finds_what_it_can_give(bytes_s: float, step: int, autojump_clock: MockClock) -> None:
    giving = Giving()
    await give(giving, 16, bytes_s)
    assert giving.step == step


@pytest.mark.trio
async def test_an_asker_that_waits_alone_says_nothing_about_the_node(autojump_clock: MockClock) -> None:
    giving = Giving()
    await give(giving, 16, 1e6, askers=1)
    assert giving.step == 0


@pytest.mark.trio
async def test_slow_askers_do_not_make_the_node_slow(autojump_clock: MockClock) -> None:
    giving = Giving()
    await give(giving, 16, 125e6)
    await give(giving, 24, 10e6)
    assert giving.step == 27
    await give(giving, 64, 10e6)    # it is so for long: then it is the node
    assert giving.step == 23


@pytest.mark.trio
async def test_one_piece_that_went_fast_to_one_asker_shows_what_the_node_can(autojump_clock: MockClock) -> None:
    """Beside a slow asker every window is slow: what single pieces went with is better known."""
    giving = Giving()
    for _ in range(8):
        giving.begin("slow")
        giving.begin("fast")
        await trio.sleep(MIB / 125e6)
        giving.gave(MIB, MIB / 125e6)
        giving.end("fast")
        giving.begin("other")
        await trio.sleep(MIB / 1e6)
        giving.gave(MIB, MIB / 1e6)
        giving.end("slow")
        giving.end("other")
    assert giving.step == 27


@pytest.mark.trio
async def test_what_is_found_does_not_move_with_each_measurement(autojump_clock: MockClock) -> None:
    giving = Giving()
    await give(giving, 32, 2.0**24.4)
    assert giving.step == 24
    await give(giving, 64, 2.0**24.7)
    assert giving.step == 24
    await give(giving, 64, 2.0**24.8)
    assert giving.step == 25
    await give(giving, 64, 2.0**24.4)
    assert giving.step == 25


@pytest.mark.parametrize("at_once", [2, 3, 6])
@pytest.mark.trio
async def test_pieces_that_share_the_link_and_end_together_are_not_taken_for_speed(
        at_once: int, autojump_clock: MockClock) -> None:
    """Most of their bytes left before the measurement began that the first of them had ended."""
    giving, steps = Giving(), set()
    size, rate = MIB, 2.0**22.6
    for _ in range(40):
        for number in range(at_once):
            giving.begin(f"a{number}")
        for number in range(at_once):
            await trio.sleep(at_once * size / rate if number == 0 else 0.01)
            giving.gave(size, at_once * size / rate + 0.01 * number)
            giving.end(f"a{number}")
            if giving.step:
                steps.add(giving.step)
    assert steps <= {22, 23}, steps


@pytest.mark.trio
async def test_pieces_that_are_wanted_side_by_side_for_a_moment_are_not_taken_for_speed(
        autojump_clock: MockClock) -> None:
    """The second is asked for when the first has nearly gone: once the whole first one counted for that moment."""
    giving = Giving()
    for _ in range(200):
        giving.begin("a")
        await trio.sleep(0.9 * MIB / 125e6)
        giving.begin("b")
        await trio.sleep(0.1 * MIB / 125e6)
        giving.gave(MIB, MIB / 125e6)
        giving.end("a")
        await trio.sleep(MIB / 125e6)
        giving.gave(MIB, MIB / 125e6)
        giving.end("b")
    assert giving.step in {0, 27}


def test_who_is_slow_is_told_by_what_the_best_quarter_gives() -> None:
    rates = told({f"n{number}": 27 if number < 10 else 24 for number in range(20)})
    assert rates.usual == 27
    assert rates.is_slow("n15", 1.0)
    assert not rates.is_slow("n5", 1.0)
    assert not rates.is_slow("nobody", 1.0)
    assert rates.steps_below(24) == 3
    assert rates.steps_below(26) == 0
    assert rates.steps_below(0) == 0


def test_a_slow_network_has_no_slow_nodes_and_two_nodes_no_opinion() -> None:
    uniform = told({f"n{number}": 24 for number in range(20)})
    assert not any(uniform.is_slow(f"n{number}", 1.0) for number in range(20))
    assert not told({"a": 27, "b": 20}).is_slow("b", 1.0)


def test_few_who_boast_make_nobody_slow() -> None:
    rates = told({f"n{number}": 24 for number in range(20)} | {f"x{number}": 255 for number in range(4)})
    assert rates.usual == 24
    assert max(rates.say(f"n{number}", 24, 0.0) for number in range(20)) is False


def test_what_was_said_is_believed_for_a_while_or_until_it_is_taken_back() -> None:
    rates = told({"a": 27, "b": 27, "c": 27, "slow": 20})
    assert rates.is_slow("slow", Rates.BELIEVED_S - 1)
    assert not rates.is_slow("slow", Rates.BELIEVED_S + 1)
    assert rates.say("slow", 0, 1.0)
    assert not rates.is_slow("slow", 1.0)
    rates.forget("a")
    rates.forget("a")
    assert not rates.say("b", 27, 1.0)
    assert rates.say("b", STEP_MAX + 9, 1.0)


async def slow_one(autojump_clock: MockClock) -> tuple[OwnRate, Giving, Rates]:
    giving, rates = Giving(), told({f"n{number}": 27 for number in range(5)})
    await give(giving, 16, 12.5e6)
    return OwnRate(ME, giving, rates), giving, rates


@pytest.mark.trio
async def test_a_slow_node_says_so_and_takes_its_new_place_when_all_have_heard(autojump_clock: MockClock) -> None:
    own, *_ = await slow_one(autojump_clock)
    now = trio.current_time()
    assert own.look(now)
    assert own.said == replace(ME, up_rate=RATE_TYPICAL >> 3)
    assert own.own == ME
    assert not own.look(now + HEARD_S - 1)
    assert own.look(now + HEARD_S)
    assert own.own == own.said


@pytest.mark.trio
async def test_who_is_as_fast_as_the_others_says_nothing(autojump_clock: MockClock) -> None:
    giving, rates = Giving(), told({f"n{number}": 24 for number in range(5)})
    await give(giving, 16, 12.5e6)
    own = OwnRate(ME, giving, rates)
    assert not own.look(1.0)
    assert own.said is ME


@pytest.mark.trio
async def test_small_steps_are_not_said_and_large_ones_are(autojump_clock: MockClock) -> None:
    own, giving, _ = await slow_one(autojump_clock)
    own.look(1.0)
    await give(giving, 64, 2.0**25)
    assert giving.step == 25
    assert not own.look(2.0)
    await give(giving, 64, 125e6)
    assert own.look(3.0)
    assert own.said == own.own == ME


@pytest.mark.trio
async def test_after_a_while_a_slow_node_is_given_another_chance(autojump_clock: MockClock) -> None:
    own, giving, _ = await slow_one(autojump_clock)
    own.look(1.0)
    assert own.look(1.0 + KEPT_S + 1)
    assert own.said == own.own == ME
    assert giving.step == 0


@pytest.mark.trio
async def test_what_is_configured_is_the_most_that_is_said(autojump_clock: MockClock) -> None:
    own, giving, rates = await slow_one(autojump_clock)
    own = OwnRate(replace(ME, up_rate=1 << 25), giving, rates)
    own.look(1.0)
    assert own.said.up_rate == 1 << 22


@pytest.mark.parametrize("seed", range(20))
def test_views_that_differ_about_who_is_slow_make_no_rings(seed: int) -> None:
    """Some have heard of a demotion, some have not; who is demoted counts itself as it was until all have."""
    draw = Random(seed)
    everyone = members(24, zones=draw.choice([1, 1, 3]))
    slow = {member.id for member in draw.sample(everyone, 8)}
    topologies = {}
    for member in everyone:
        heard = {name for name in slow if draw.random() < 0.5}
        topologies[member.id] = Topology(View(tuple(
            replace(one, up_rate=RATE_TYPICAL >> 3) if one.id in heard else one for one in everyone)))
    for group in range(20):
        asks = {name: {parent.id for parent in topology.place(name, group_seed("r", group), 0).parents}
                for name, topology in topologies.items()}
        done: set[str] = set()
        while len(done) < len(asks):
            ends = {name for name, parents in asks.items() if name not in done and parents <= done}
            assert ends, "a ring"
            done |= ends


def test_who_counts_itself_as_fast_stands_where_it_would_stand() -> None:
    everyone = members(30)
    believed = Topology(View((*everyone[1:], replace(everyone[0], up_rate=1))))
    before = Topology(View(everyone))
    for group in range(30):
        seed = group_seed("r", group)
        assert believed.place(everyone[0].id, seed, 0) == before.place(everyone[0].id, seed)
