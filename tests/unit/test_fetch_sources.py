"""A source's state: when it counts as down, how it is tried again, how many repetitions it gets, what is told of it."""

from __future__ import annotations

import time

import pytest
import trio
import trio.testing

from lazyfs.errors import AuthError, IntegrityError, NotFoundError, RateLimitedError, ResourceError, SourceError
from lazyfs.fetch import sources
from lazyfs.fetch.engine import FetchLimits
from lazyfs.fetch.lanes import Lanes
from lazyfs.fetch.sources import OPEN_FAILURE_COUNT, SourceState, State
from tests.fetchbench import bench
from tests.fetchkit import CHUNK, MemorySource, Request, make_sample

GONE = SourceError("connection refused")


def failed(state: SourceState, times: int, now: float = 0.0, error: SourceError = GONE) -> float | None:
    probe_at = None
    for _ in range(times):
        state.begin()
        probe_at = state.failed(error, now)
    return probe_at


def test_failures_in_a_row_open_the_breaker_and_one_probe_at_a_time_tries_it():
    state = SourceState("registry")
    assert failed(state, OPEN_FAILURE_COUNT - 1) is None
    assert state.admits(0.0)
    assert state.state(0.0) is State.FAILING
    probe_at = failed(state, 1)
    assert probe_at is not None
    assert not state.admits(0.0)
    assert state.state(0.0) is State.DOWN
    assert state.admits(probe_at)
    assert state.begin() == sources.PROBE_TIME_FIRST_S
    assert not state.admits(probe_at), "a probe is under way"
    assert state.state(probe_at) is State.PROBING
    state.succeeded()
    assert state.admits(probe_at)
    assert state.begin() is None
    assert (state.state(0.0), state.why, state.since) == (State.OK, "", None)


def test_probes_become_rarer_and_longer_within_bounds():
    state = SourceState("registry")
    now = 0.0
    probe_at = failed(state, OPEN_FAILURE_COUNT)
    waits, times = [], []
    for _ in range(12):
        assert probe_at is not None
        waits.append(probe_at - now)
        now = probe_at
        times.append(state.begin())
        probe_at = state.failed(GONE, now)
    assert waits[0] <= 1.5 * sources.PROBE_FIRST_S
    assert max(waits) <= 1.5 * sources.PROBE_PAUSE_MAX_S
    assert min(waits[-3:]) >= 0.5 * sources.PROBE_PAUSE_MAX_S
    assert times == sorted(times)
    assert times[-1] == sources.PROBE_TIME_MAX_S


def test_a_source_that_fails_nearly_always_is_down_too():
    state = SourceState("registry")
    for number in range(100):
        state.begin()
        if number % 4 == 0:
            state.succeeded()
        elif state.failed(GONE, 0.0) is not None:
            break
    assert state.down


def test_one_that_fails_now_and_then_is_not():
    state = SourceState("registry")
    for number in range(400):
        state.begin()
        if number % 3 == 0:
            assert state.failed(GONE, 0.0) is None
        else:
            state.succeeded()


@pytest.mark.parametrize(("error", "shown"), [
    (NotFoundError("gone"), State.REFUSING), (AuthError("revoked"), State.REFUSING),
    (IntegrityError("wrong"), State.LYING), (RateLimitedError("later", retry_after_s=5), State.FAILING),
])
def test_a_source_that_answers_is_not_down_whatever_it_says(error, shown):
    state = SourceState("registry")
    assert failed(state, 50, error=error) is None
    assert state.state(0.0) is shown
    assert state.describe(0.0)["why"] == str(error)
    assert abs(state.describe(0.0)["since"] - time.time()) < 60


def test_what_this_machine_lacks_is_no_fault_of_the_source():
    state = SourceState("registry")
    assert failed(state, 50, error=ResourceError("no descriptor")) is None
    assert state.state(0.0) is State.OK
    assert state.describe(0.0)["failures"] == 0


def test_one_mirror_of_several_does_not_speak_for_the_source():
    state = SourceState("registry")
    error = SourceError("drips")
    error.elsewhere = True
    assert failed(state, 50, error=error) is None
    assert state.state(0.0) is State.OK


def test_since_and_why_are_those_of_the_whole_streak(monkeypatch):
    state = SourceState("registry")
    monkeypatch.setattr(sources.time, "time", lambda: 1000.0)
    failed(state, 1)
    monkeypatch.setattr(sources.time, "time", lambda: 2000.0)
    failed(state, 1, error=SourceError("timed out"))
    told = state.describe(0.0)
    assert (told["since"], told["why"], told["last_ok"]) == (1000.0, "timed out", None)
    state.succeeded()
    told = state.describe(0.0)
    assert (told["since"], told["why"], told["last_ok"]) == (None, "", 2000.0)


def test_repetitions_beyond_the_budget_wait_for_their_turn():
    state = SourceState("registry")
    free = sum(state.retry_wait_s(0.0) == 0.0 for _ in range(100))
    assert free == sources.RETRY_STOCK_MAX
    assert state.retry_wait_s(0.0) == sources.RETRY_WAIT_MAX_S
    healthy = SourceState("other")
    waits = []
    for number in range(2000):    # one in ten fails: no repetition waits
        healthy.begin()
        if number % 10 == 0:
            waits.append(healthy.retry_wait_s(0.0))
    assert max(waits) == 0.0


def test_sources_are_forgotten_in_the_end():
    known = sources.Sources()
    for number in range(2 * sources.SOURCE_COUNT_MAX):
        known.of(MemorySource({}, name=f"memory:{number}"))
    assert len(known.describe(0.0)) == sources.SOURCE_COUNT_MAX


# --- whose read is next -----------------------------------------------------------------------------------------------


def queued(lanes: Lanes, name: str, count: int, tmp_path, cache):
    """A source with so many chunks that wait, no two of them neighbours."""
    from lazyfs.fetch.flight import Flight  # noqa: PLC0415

    sample = make_sample(2 * count + 1, seed=hash(name) % 1000)
    source = MemorySource({sample.blob: sample.stored}, name=name)
    device = sample.device(cache, source)
    lane = lanes.of(source)
    for index in range(count):
        lane.foreground.push(Flight(device, 2 * index, 0.0))
    device.cached.release()
    return lane


@pytest.fixture
def cache(tmp_path):
    from lazyfs.cache.store import CacheDir  # noqa: PLC0415

    with CacheDir.open(tmp_path / "cache") as made:
        yield made


def test_who_has_had_least_of_late_is_next(tmp_path, cache):
    lanes = Lanes(FetchLimits())
    greedy = queued(lanes, "greedy", 50, tmp_path, cache)
    greedy.share.add(1 << 30, 0.0)
    modest = queued(lanes, "modest", 3, tmp_path, cache)
    order = []
    for _ in range(6):
        lane = lanes.next_foreground(0, 0.0)
        assert lane is not None
        order.append(lane)
        (flight,) = lane.foreground.pop_run(1)
        lane.share.add(flight.stored_size, 0.0)
    assert order == [modest] * 3 + [greedy] * 3


def test_the_last_slots_are_for_who_has_none(tmp_path, cache):
    bounds = FetchLimits()
    lanes = Lanes(bounds)
    one, two = (queued(lanes, name, 10, tmp_path, cache) for name in ("one", "two"))
    one.running_count, two.running_count = 6, 6
    assert lanes.next_foreground(12, 0.0) is None
    late = queued(lanes, "late", 1, tmp_path, cache)
    assert lanes.next_foreground(12, 0.0) is late
    assert lanes.next_foreground(bounds.foreground_total, 0.0) is None


def test_a_bulk_reader_has_all_its_slots_when_alone_and_few_beside_others(tmp_path, cache):
    bounds = FetchLimits()
    lanes = Lanes(bounds)
    bulk = queued(lanes, "bulk", 10, tmp_path, cache)
    bulk.share.add(1 << 30, 0.0)
    bulk.running_count = bounds.foreground_bulk
    assert lanes.next_foreground(bulk.running_count, 0.0) is bulk
    other = queued(lanes, "other", 1, tmp_path, cache)
    other.foreground.clear()
    other.share.add(1, 0.0)
    assert lanes.next_foreground(bulk.running_count, 0.0) is None
    assert lanes.next_foreground(bulk.running_count, 5.0) is bulk


def test_images_of_a_registry_together_leave_slots_for_others(tmp_path, cache):
    bounds = FetchLimits()
    lanes = Lanes(bounds)
    first, second = (queued(lanes, name, 10, tmp_path, cache) for name in ("one", "two"))
    second.state = first.state
    first.state.running_count = bounds.foreground_per_server
    assert lanes.next_foreground(0, 0.0) is None


# --- through the engine -----------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_an_outage_is_a_pause_for_who_reads_and_few_requests_for_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PROBE_PAUSE_MAX_S", 0.5)
    sample = make_sample(60, order=[*range(0, 60, 2), *range(1, 60, 2)])
    async with bench(tmp_path, FetchLimits(readahead=False), sample) as b:
        away = [True]

        def fault(_: Request) -> None:
            if away:
                raise SourceError("connection refused")

        b.source.faults.append(fault)
        state = b.fetcher._scheduler.lanes.sources.of(b.source)
        async with trio.open_nursery() as nursery:
            for index in range(0, 60, 2):
                nursery.start_soon(b.read, index * CHUNK, CHUNK, 120.0)
            with trio.fail_after(60):
                while not state.down or b.fetcher._scheduler._workers.running:    # noqa: ASYNC110
                    await trio.sleep(0.01)
                began, asked = time.monotonic(), len(b.source.requests)
                await b.asked(asked + 3)
            assert time.monotonic() - began > 0.4, "thirty readers, and a probe now and then"
            (told,) = b.fetcher.describe_sources()
            assert told["state"] in {"down", "probing"}
            assert told["why"] == "connection refused"
            away.clear()
        await b.settled()
        (told,) = b.fetcher.describe_sources()
        assert told["state"] == "ok"


@pytest.mark.trio
async def test_a_source_that_stays_down_is_told_at_the_deadline_even_to_who_was_never_tried(tmp_path):
    async with bench(tmp_path) as b:
        b.source.faults.append(lambda _: (_ for _ in ()).throw(SourceError("connection refused")))
        state = b.fetcher._scheduler.lanes.sources.of(b.source)
        failed(state, OPEN_FAILURE_COUNT, trio.current_time() + 3600)
        with pytest.raises(SourceError, match=r"within its deadline; .* connection refused"):
            await b.chunk(1, seconds=0.3)
        assert not b.source.requests
        state.succeeded()


@pytest.mark.trio
async def test_a_prefetch_outlives_an_outage(tmp_path):
    async with bench(tmp_path) as b:
        until = time.monotonic() + 3.0

        def fault(_: Request) -> None:
            if time.monotonic() < until:
                raise SourceError("connection refused")

        b.source.faults.append(fault)
        handle = b.fetcher.prefetch([(b.device, index) for index in range(12)])
        with trio.fail_after(60):
            await handle.wait()
        assert handle.error is None
        assert b.device.cached.complete


@pytest.mark.trio
async def test_a_first_read_goes_before_all_that_a_bulk_reader_waits_for(tmp_path):
    sample = make_sample(80, order=[*range(0, 80, 2), *range(1, 80, 2)])
    async with bench(tmp_path, FetchLimits(readahead=False, foreground_per_source=2, foreground_total=2), sample) as b:
        small = make_sample(4, seed=5)
        other = MemorySource({small.blob: small.stored}, name="memory:other")
        device = small.device(b.cache, other)
        b.fetcher._scheduler.lanes.of(b.source).share.add(1 << 30, trio.current_time())
        b.source.gate.clear()
        async with trio.open_nursery() as nursery:
            for index in range(0, 80, 4):
                nursery.start_soon(b.chunk, index)
            await b.asked(2)
            nursery.start_soon(lambda: b.fetcher.read(device, 0, CHUNK, deadline=time.monotonic() + 20))
            await trio.testing.wait_all_tasks_blocked()
            before = len(b.source.requests)
            after: list[int] = []
            other.faults.append(lambda _: after.append(len(b.source.requests)))
            b.source.gate.set()
        assert after[0] - before <= 2, "the next free slot was its own"
        device.cached.release()
