"""Both stores keep the same: whatever members say, in memory, in Redis, and in the replica of another tracker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyfs.peers.announce import Announced, Standing
from lazyfs.tracker import redisstore
from lazyfs.tracker.redisstore import RedisStore
from lazyfs.tracker.state import Cluster, MemberState, dump_state
from lazyfs.tracker.store import MemoryStore
from tests.trackerkit import KEY, OTHER, redis_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazyfs.tracker.store import Store
    from tests.trackerkit import Redis

NAMES = st.sampled_from(["a", "b", "c", "d", "e"])
STANDINGS = st.builds(Standing, st.sampled_from([0, 500, 1000]), st.booleans())
STATES = st.builds(
    lambda name, network, port, swarms: MemberState(Announced(name, f"h:{port}", "", 0, network), swarms),
    NAMES, st.sampled_from(["", "vpc"]), st.integers(1, 2), st.dictionaries(st.sampled_from([KEY, OTHER]), STANDINGS))
STEPS = st.lists(st.one_of(
    st.tuples(st.just("update"), STATES),
    st.tuples(st.just("leave"), NAMES),
    st.tuples(st.just("heard"), NAMES),
    st.tuples(st.just("report"), NAMES, st.lists(NAMES, max_size=3)),
    st.tuples(st.just("put"), NAMES, st.binary(max_size=8)),
    st.tuples(st.just("drop"), NAMES),
), max_size=25)


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    with redis_server() as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redisstore, "GATHER_S", 0.0)
        patch.setattr(redisstore, "POLL_S", 0.005)
        yield


async def act(store: Store, step: tuple[Any, ...]) -> None:
    word, name, *rest = step
    if word == "update":
        await store.update("prod", name.member.id, dump_state(name))
    elif word == "leave":
        await store.leave("prod", name)
    elif word == "heard":
        await store.heard("prod", name)
    elif word == "report":
        await store.report("prod", name, rest[0])
    elif word == "put":
        await store.put("jobs", name, rest[0], 1000.0)
    else:
        await store.drop("jobs", name)


def shown(cluster: Cluster) -> dict[str, Any]:
    return {"members": {name: entry.state for name, entry in cluster.members.items()},
            "swarms": {place: dict(swarm.members) for place, swarm in cluster.swarms.items()},
            "isolated": sorted(cluster.isolated)}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_memory_and_redis_and_a_replica_keep_the_same(redis: Redis, steps: list[tuple[Any, ...]]) -> None:
    async def run() -> None:
        client = redisstore.redis.Redis.from_url(redis.url)
        client.flushall()
        client.close()
        memory, here, there = MemoryStore(), RedisStore(redis.url), RedisStore(redis.url)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here.run)
            nursery.start_soon(there.run)
            await there.cluster("prod")
            for step in steps:
                await memory.cluster("prod")
                await here.cluster("prod")
                await act(memory, step)
                await act(here, step)
            expected = shown(await memory.cluster("prod"))
            assert shown(await here.cluster("prod")) == expected
            with trio.move_on_after(20.0):
                while shown(await there.cluster("prod")) != expected:    # noqa: ASYNC110 - it follows by and by
                    await trio.sleep(0.005)
            assert shown(await there.cluster("prod")) == expected
            assert await memory.all("jobs") == await here.all("jobs") == await there.all("jobs")
            for name in await memory.all("jobs"):
                assert await memory.get("jobs", name) == await here.get("jobs", name)
            fresh = RedisStore(redis.url)
            nursery.start_soon(fresh.run)
            assert shown(await fresh.cluster("prod")) == expected
            nursery.cancel_scope.cancel()

    trio.run(run)


@given(states=st.lists(STATES, max_size=40), leaving=st.lists(NAMES, max_size=10))
def test_swarms_are_what_members_say(states: list[MemberState], leaving: list[str]) -> None:
    """The invariant of Cluster, after any changes: no swarm without a member that names it, none that is missing."""
    cluster = Cluster("prod")
    model: dict[str, MemberState] = {}
    for number, state in enumerate(states):
        cluster.update(state, float(number))
        model[state.member.id] = state
        if number < len(leaving):
            cluster.gone(leaving[number])
            model.pop(leaving[number], None)
        expected: dict[tuple[str, str], dict[str, Standing]] = {}
        for name, kept in model.items():
            for key, standing in kept.swarms.items():
                expected.setdefault((kept.member.network, key), {})[name] = standing
        assert {place: swarm.members for place, swarm in cluster.swarms.items()} == expected
