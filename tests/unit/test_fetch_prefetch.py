"""Prefetch windows, read-ahead, and the pure parts: lanes, retry pauses, the spill."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import trio
import trio.testing

from lazyfs import limits
from lazyfs.cache.store import CacheDir
from lazyfs.errors import NotFoundError, RateLimitedError, SourceError
from lazyfs.fetch import retry
from lazyfs.fetch.brake import Brake, Traffic
from lazyfs.fetch.device import FetchDevice
from lazyfs.fetch.engine import FetchLimits
from lazyfs.fetch.flight import Flight
from lazyfs.fetch.lane import FlightQueue
from lazyfs.fetch.readahead import Readahead
from lazyfs.fetch.spill import Spill
from lazyfs.fetch.transfer import Priority, Transfer
from lazyfs.image.codec import Codec
from lazyfs.image.digest import Digest
from lazyfs.image.table import parse_table
from tests.fetchbench import PLAIN, SAMPLE, bench
from tests.fetchkit import CHUNK, MemorySource, Request, make_sample

BIG = make_sample(80, seed=3, codec=Codec.NONE, zeros=(9,))    # 5 MiB stored: three windows
WINDOW_CHUNKS = PLAIN.window_bytes_max // CHUNK


def plan(b):
    return [(b.device, index) for index in range(b.sample.table.chunk_count)]


# --- prefetch ---------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_the_plan_comes_in_windows_in_order_and_each_byte_once(tmp_path):
    async with bench(tmp_path, sample=BIG) as b:
        handle = b.fetcher.prefetch(plan(b))
        await handle.wait()
        assert handle.error is None
        assert b.device.cached.complete
        assert b.source.requests == sorted(b.source.requests)
        assert len(b.source.requests) == 3
        assert sum(size for _, size in b.source.requests) == len(BIG.stored)
        assert (handle.fetched_count, handle.skipped_count) == (79, 1)
        assert b.fetcher.statistics.chunks_prefetched == 79
        assert b.fetcher.statistics.touched_stored_bytes == 0
        again = b.fetcher.prefetch(plan(b))
        await again.wait()
        assert len(b.source.requests) == 3


@pytest.mark.trio
async def test_who_watches_a_chunk_is_told_when_it_lands_and_wants_nothing(tmp_path):
    async with bench(tmp_path, sample=BIG) as b:
        b.source.gate.clear()
        handle = b.fetcher.prefetch(plan(b))
        await b.asked(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.fetcher.watch, b.device, 4, 60)
            await trio.testing.wait_all_tasks_blocked()
            (window,) = handle.running
            assert not window.is_wanted()
            assert not b.device.cached.present(4, 4)
            b.source.gate.set()
        assert b.device.cached.present(4, 4)
        await handle.wait()
        assert b.fetcher.statistics.waits == 0


@pytest.mark.trio
async def test_who_watches_a_chunk_that_nobody_fetches_waits_no_longer_than_told(tmp_path, autojump_clock):
    async with bench(tmp_path, sample=BIG) as b:
        began = trio.current_time()
        await b.fetcher.watch(b.device, 4, 7)
        assert trio.current_time() - began == 7


@pytest.mark.trio
async def test_windows_skip_what_is_present_or_on_its_way(tmp_path):
    async with bench(tmp_path, sample=BIG) as b:
        await b.chunk(3)
        b.source.gate.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.chunk, 5)
            await b.asked(2)
            handle = b.fetcher.prefetch(plan(b))
            await b.asked(3)
            b.source.gate.set()
        await handle.wait()
        assert sum(size for _, size in b.source.requests) == len(BIG.stored)


@pytest.mark.trio
async def test_a_read_inside_a_running_window_waits_and_outside_asks_at_once(tmp_path):
    async with bench(tmp_path, sample=BIG) as b:
        b.source.gate.clear()
        handle = b.fetcher.prefetch(plan(b))
        await b.asked(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.chunk, 4)
            nursery.start_soon(b.chunk, 70)
            await b.asked(2)
            await trio.testing.wait_all_tasks_blocked()
            assert b.source.requests[1] == (int(BIG.table.rows["blob_offset"][70]), CHUNK)
            b.source.gate.set()
        await handle.wait()
        assert sum(size for _, size in b.source.requests) == len(BIG.stored)


@pytest.mark.trio
async def test_the_next_window_starts_before_the_last_one_ends_but_not_earlier(tmp_path):
    async with bench(tmp_path, sample=BIG) as b:
        positions = []

        def fault(request: Request) -> None:
            if request.number == 0:
                request.before_piece = lambda position: positions.append((position, len(b.source.requests)))
            request.piece_bytes = 1 << 14

        b.source.faults.append(fault)
        await b.fetcher.prefetch(plan(b)).wait()
        early = [count for position, count in positions if position < PLAIN.window_bytes_max - 1024 * 1024]
        assert set(early) == {1}


@pytest.mark.trio
async def test_a_window_that_fails_is_fetched_again(tmp_path):
    async with bench(tmp_path, sample=BIG) as b:
        def fault(request: Request) -> None:
            if request.number == 0:
                request.data = request.data[: 3 * CHUNK]

        b.source.faults.append(fault)
        handle = b.fetcher.prefetch(plan(b))
        await handle.wait()
        assert handle.error is None
        assert b.device.cached.complete
        assert sum(size for _, size in b.source.requests) == len(BIG.stored) + (WINDOW_CHUNKS - 3) * CHUNK


@pytest.mark.trio
async def test_a_prefetch_without_its_blob_gives_up_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "RETRY_PAUSE_MAX_S", 0.01)
    async with bench(tmp_path, sample=BIG) as b:
        b.source.blobs.clear()
        handle = b.fetcher.prefetch(plan(b) * 4)
        await handle.wait()
        assert isinstance(handle.error, NotFoundError)


@pytest.mark.trio
async def test_a_cancelled_prefetch_gives_up_its_window(tmp_path):
    async with bench(tmp_path, sample=BIG) as b:
        b.source.gate.clear()
        handle = b.fetcher.prefetch(plan(b))
        await b.asked(1)
        handle.cancel()
        assert not handle.done
        b.source.gate.set()
        await handle.wait()
        assert handle.cancelled
        assert len(b.source.requests) == 1
        assert b.fetcher.statistics.fetched_stored_bytes == 0


@pytest.mark.trio
async def test_a_cancelled_window_that_a_read_waits_for_goes_on(tmp_path):
    async with bench(tmp_path, sample=BIG) as b:
        b.source.gate.clear()
        handle = b.fetcher.prefetch(plan(b))
        await b.asked(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.chunk, 20)
            await trio.testing.wait_all_tasks_blocked()
            handle.cancel()
            b.source.gate.set()
        await handle.wait()
        assert len(b.source.requests) == 1


@pytest.mark.trio
async def test_an_unmounted_image_ends_its_prefetch(tmp_path):
    async with bench(tmp_path, sample=BIG) as b:
        other = make_sample(80, seed=4, codec=Codec.NONE)
        source = MemorySource({other.blob: other.stored})
        device = other.device(b.cache, source)
        source.gate.clear()
        handle = b.fetcher.prefetch([(device, index) for index in range(80)])
        device.cached.release()
        source.gate.set()
        await handle.wait()
        assert handle.done


@pytest.mark.trio
async def test_a_bad_chunk_in_a_window_comes_again_by_itself(tmp_path):
    async with bench(tmp_path, sample=BIG) as b:
        def fault(request: Request) -> None:
            if request.number == 0:
                request.data = request.data[:100] + b"\0\0\0\0" + request.data[104:]

        b.source.faults.append(fault)
        await b.fetcher.prefetch(plan(b)).wait()
        await b.chunk(0)
        assert b.fetcher.statistics.bad_chunks == 1


@pytest.mark.trio
async def test_what_a_cancelled_window_still_hangs_in_is_wanted_again(tmp_path):
    async with bench(tmp_path, sample=BIG) as b:
        hanging = threading.Event()
        b.source.faults.append(lambda request: hanging.wait(20) if request.number == 0 else None)
        first = b.fetcher.prefetch(plan(b))
        await b.asked(1)
        first.cancel()
        await b.chunk(3)
        second = b.fetcher.prefetch(plan(b))
        with trio.fail_after(20):
            await second.wait()
        assert b.device.cached.complete
        assert not first.done
        hanging.set()
        await first.wait()
        assert sum(size for _, size in b.source.requests[1:]) == len(BIG.stored)
        assert b.device.remembered_error(0) is None


@pytest.mark.trio
async def test_a_read_overtakes_a_window_that_would_be_later(tmp_path, monkeypatch):
    monkeypatch.setattr("lazyfs.fetch.transfer.Transfer._rate", lambda _: 1e6)
    async with bench(tmp_path, sample=BIG) as b:
        stopped, go_on = threading.Event(), threading.Event()

        def fault(request: Request) -> None:
            if request.number == 0:
                request.piece_bytes = CHUNK
                request.before_piece = lambda position: position < 4 * CHUNK or stopped.set() or go_on.wait(20)

        b.source.faults.append(fault)
        handle = b.fetcher.prefetch(plan(b))
        assert await trio.to_thread.run_sync(stopped.wait, 20)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.chunk, 5)       # next but one: it waits for the window
            await b.chunk(30)                    # 1.6 s away
            assert b.source.requests[1:] == [(int(BIG.table.rows["blob_offset"][30]), CHUNK)]
            go_on.set()
        await handle.wait()
        assert b.device.cached.complete
        assert sum(size for _, size in b.source.requests) == len(BIG.stored) + CHUNK


def test_a_window_is_overtaken_only_where_asking_is_sooner(monkeypatch):
    _, flights = queue_of(range(80), BIG)
    transfer = Transfer([flights[index] for index in range(9)], Priority.PREFETCH)
    assert not transfer.is_overtaken_by_asking(flights[8])     # no rate is known yet
    monkeypatch.setattr(Transfer, "_rate", lambda _: 1e6)
    assert [index for index in range(9) if transfer.is_overtaken_by_asking(flights[index])] == [2, 3, 4, 5, 6, 7, 8]
    transfer.delay_s = 0.15                                    # each request costs that
    assert [index for index in range(9) if transfer.is_overtaken_by_asking(flights[index])] == [7, 8]


@pytest.mark.trio
async def test_an_image_gets_no_more_ahead_than_its_bound(tmp_path):
    async with bench(tmp_path, replace(PLAIN, prefetch_bytes_max=10 * CHUNK + 1), sample=BIG) as b:
        handle = b.fetcher.prefetch(plan(b))
        await handle.wait()
        assert sum(size for _, size in b.source.requests) == 10 * CHUNK


@pytest.mark.trio
async def test_several_images_take_turns(tmp_path):
    small = replace(PLAIN, prefetch_streams=1, window_bytes_first=4 * CHUNK, window_bytes_max=8 * CHUNK)
    async with bench(tmp_path, small, sample=BIG) as b:
        other = make_sample(80, seed=4, codec=Codec.NONE)
        source = MemorySource({other.blob: other.stored})
        device = other.device(b.cache, source)
        asked = []
        b.source.faults.append(lambda _: asked.append("first"))
        source.faults.append(lambda _: asked.append("second"))
        b.source.gate.clear()
        first = b.fetcher.prefetch(plan(b))
        await b.asked(1)
        second = b.fetcher.prefetch([(device, index) for index in range(80)])
        b.source.gate.set()
        await first.wait()
        await second.wait()
        assert asked[1:9] == ["first", "second"] * 4
        assert all(size <= 4 * CHUNK for _, size in source.requests[:8])
        await b.settled()
        device.cached.release()


@pytest.mark.trio
async def test_windows_grow_so_that_a_large_hot_part_is_few_requests(tmp_path):
    growing = replace(PLAIN, window_bytes_first=2 * CHUNK, window_bytes_max=32 * CHUNK)
    sample = make_sample(80, seed=4, codec=Codec.NONE)
    async with bench(tmp_path, growing, sample=sample) as b:
        await b.fetcher.prefetch(plan(b)).wait()
        sizes = [size // CHUNK for _, size in sorted(b.source.requests)]
        assert sizes[:5] == [2, 4, 8, 16, 32]


# --- who goes first -----------------------------------------------------------------------------------------------


def test_a_window_stands_back_while_reads_are_under_way():
    traffic = Traffic()
    brake = Brake(traffic)
    looked = threading.Semaphore(0)

    def goes_first() -> bool:
        looked.release()
        return False

    traffic.begin()
    traffic.begin()
    thread = threading.Thread(target=brake.hold, args=(CHUNK, goes_first))
    thread.start()
    assert looked.acquire(timeout=20)
    traffic.end()
    assert looked.acquire(timeout=20)
    assert thread.is_alive()
    traffic.end()
    thread.join(20)
    assert not thread.is_alive()
    assert brake.hold(CHUNK, goes_first) < 20


def test_a_window_that_is_waited_for_does_not_stand_back_nor_for_ever():
    traffic = Traffic()
    traffic.begin()
    assert Brake(traffic, courtesy_s=1e9).hold(CHUNK, lambda: True) < 20
    assert Brake(traffic, courtesy_s=0.0).hold(CHUNK, lambda: False) < 20


def test_the_rate_of_all_windows_together_is_bounded(monkeypatch):
    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            assert 0 < seconds <= 0.1
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr("lazyfs.fetch.brake.time", clock)
    brake = Brake(Traffic(), rate_bytes_s=1_000_000)
    for _ in range(100):
        brake.hold(50_000, lambda: False)
    assert 4.8 < clock.now - 1000 < 5.2
    clock.now += 60                                   # idle time is no credit
    began = clock.now
    for _ in range(20):
        brake.hold(50_000, lambda: False)
    assert 0.8 < clock.now - began < 1.2
    began = clock.now
    brake.hold(5_000_000, lambda: True)               # somebody waits for it
    assert clock.now == began


def hot_devices(cache, first, second):
    """Two devices whose chunks 0 to 7 are, taken in turn, in one hot blob; and its source."""
    hot = b""
    tables = [sample.table.rows.copy() for sample in (first, second)]
    for index in range(8):
        for sample, rows in zip((first, second), tables, strict=True):
            start, size = int(rows["blob_offset"][index]), int(rows["stored_size"][index])
            rows["blob_offset"][index], rows["blob_index"][index] = len(hot), 1
            hot += sample.stored[start : start + size]
    name = Digest.of(hot)
    source = MemorySource({first.blob: first.stored, second.blob: second.stored, name: hot})
    devices = []
    for sample, rows in zip((first, second), tables, strict=True):
        sizes = [len(sample.stored), len(hot)]
        table = parse_table(rows.tobytes(), CHUNK, sample.table.device_size, sizes)
        cached = cache.device(sample.digest, CHUNK, table.device_size)
        devices.append(FetchDevice(table, cached, [(source, sample.blob, sizes[0]), (source, name, sizes[1])]))
    return devices, source, len(hot)


@pytest.mark.trio
async def test_the_hot_blob_of_several_layers_is_one_stream(tmp_path):
    async with bench(tmp_path) as b:
        first, second = make_sample(10, seed=5), make_sample(12, seed=6)
        devices, source, size = hot_devices(b.cache, first, second)
        await b.fetcher.prefetch([(device, index) for index in range(8) for device in devices]).wait()
        assert source.requests == [(0, size)]
        for device, sample in zip(devices, (first, second), strict=True):
            data = await b.fetcher.read(device, 0, device.size, deadline=time.monotonic() + 20)
            assert data == sample.data
        assert len(source.requests) == 3
        await b.settled()
        for device in devices:
            device.cached.release()


# --- read-ahead -------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_sequential_reader_finds_chunks_there_and_nothing_comes_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("lazyfs.fetch.device.READAHEAD_SEQUENCE_BYTES_MIN", 3 * BIG.table.chunk_size)
    async with bench(tmp_path, FetchLimits(), sample=BIG) as b:
        for index in range(80):
            await b.chunk(index)
        await b.settled()
        assert b.fetcher.statistics.chunks_read_ahead > 40
        assert len(b.source.requests) < 40
        assert sum(size for _, size in b.source.requests) == len(BIG.stored)


@pytest.mark.trio
async def test_a_random_reader_gets_what_it_asks_for_only(tmp_path):
    async with bench(tmp_path, FetchLimits(), sample=BIG) as b:
        for index in random.Random(1).sample(range(0, 80, 2), 20):
            await b.chunk(index)
        await b.settled()
        assert b.fetcher.statistics.fetched_stored_bytes == b.fetcher.statistics.touched_stored_bytes


@pytest.mark.parametrize("times", [1, 4])
def test_readahead_grows_with_the_stream_and_stops_at_its_bound(times: int):
    ahead = Readahead(8, 3)
    asked: list[int] = []
    for index in range(100, 180):
        wanted = ahead.advance(index, missing=index not in asked, times=times)
        assert not set(wanted) & set(asked)
        asked.extend(wanted)
        assert len(asked) == 0 or max(asked) <= index + min(8 * times, (index - 99) * min(times, 2))
    assert max(asked) > 179 + 4 * times
    assert asked == list(range(100 + max(2, 3 // times), max(asked) + 1)), "so much sooner, but not at the first chunk"


def test_readahead_tells_streams_apart_and_leaves_found_chunks_alone():
    ahead = Readahead(8, 3)
    for step in range(2):
        for base in range(0, 16_000, 1000):
            assert not ahead.advance(base + step, missing=True)
    assert ahead.advance(5002, missing=True) == range(5003, 5006)
    assert not ahead.advance(7002, missing=False)
    for base in range(50_000, 60_000, 100):
        ahead.advance(base, missing=True)
    assert len(ahead._streams) == 16


def test_random_reads_are_not_taken_for_sequential_ones_where_that_is_believed_soon():
    chance = random.Random(1)
    order = list(range(200))
    chance.shuffle(order)
    ahead = Readahead(4, 8)
    assert sum(len(ahead.advance(index, missing=True, times=4)) for index in order[:120]) <= 4
    side_by_side = Readahead(4, 8)
    for step in range(2):
        wanted = [side_by_side.advance(base + step, missing=True, times=4) for base in (1000, 2000)]
    assert wanted == [range(1002, 1006), range(2002, 2006)]


# --- pure parts -------------------------------------------------------------------------------------------------------


def queue_of(indexes, sample=SAMPLE):
    class Stub:
        table = sample.table
        blobs = ((None, sample.blob, len(sample.stored)),)

    queue = FlightQueue()
    flights = {index: Flight(Stub(), index, 0.0) for index in indexes}
    for index in indexes:
        queue.push(flights[index])
    return queue, flights


def test_runs_are_neighbours_oldest_first_and_bounded():
    queue, _ = queue_of([8, 1, 2, 7, 6, 0])
    assert [flight.index for flight in queue.pop_run(1 << 30)] == [6, 7, 8]
    assert [flight.index for flight in queue.pop_run(1)] == [1]
    assert [flight.index for flight in queue.pop_run(1 << 30)] == [2]
    assert [flight.index for flight in queue.pop_run(1 << 30)] == [0]
    assert queue.pop_run(1) == []


def test_equal_stored_bytes_wanted_twice_are_two_flights():
    queue, flights = queue_of([3])
    twin, _ = queue_of([3])
    other = twin.clear()[0]
    queue.push(other)
    assert len(queue) == 2
    assert queue.discard(flights[3])
    assert not queue.discard(flights[3])
    assert queue.pop_run(1 << 30) == [other]
    assert len(queue) == 0


def test_random_queues_lose_and_double_nothing():
    draw = random.Random(0)
    for _ in range(200):
        indexes = draw.sample(range(12), draw.randrange(1, 12))
        queue, flights = queue_of(indexes)
        removed = {index for index in indexes if draw.random() < 0.2}
        for index in removed:
            queue.discard(flights[index])
        seen = []
        while run := queue.pop_run(draw.choice([1, 40_000, 1 << 30])):
            assert all(a.stored_end == b.stored_start for a, b in pairwise(run))
            seen += [flight.index for flight in run]
        assert sorted(seen) == sorted(set(indexes) - removed)
        assert not queue._by_start
        assert not queue._by_end


def test_pauses_double_with_jitter_up_to_a_bound():
    for attempt in range(1, 20):
        pause = retry.pause_s(SourceError("x"), attempt)
        expected = limits.RETRY_FIRST_S * 2 ** (attempt - 1)
        assert min(expected * 0.5, limits.RETRY_PAUSE_MAX_S) <= pause <= min(expected * 1.5, limits.RETRY_PAUSE_MAX_S)
    assert len({retry.pause_s(SourceError("x"), 3) for _ in range(20)}) > 1
    assert 7 <= retry.pause_s(RateLimitedError("x", retry_after_s=7), 1) <= 7 + limits.RETRY_FIRST_S
    assert retry.is_transient(RateLimitedError("x"))
    assert not retry.is_transient(NotFoundError("x"))


def test_the_spill_keeps_the_latest_within_its_bound():
    spill = Spill(100)
    one, two = object(), object()
    spill.put(one, 0, b"x" * 40)
    spill.put(one, 1, b"y" * 40)
    assert spill.get(one, 0) == b"x" * 40
    spill.put(two, 0, b"z" * 40)
    assert spill.get(one, 1) is None    # used least recently
    assert spill.get(one, 0) is not None
    spill.put(two, 0, b"z" * 10)
    assert spill.bytes_held == 50
    spill.put(one, 9, bytes(101))
    assert spill.bytes_held == 0
    spill.clear()


def test_touches_count_each_chunk_once(tmp_path):

    with CacheDir.open(tmp_path / "cache") as cache:
        device = SAMPLE.device(cache, MemorySource({}))
        assert device.touch(1, 3) == [1, 2, 3]
        assert device.touch(0, 2) == [0]
        assert device.touched_stored_bytes == SAMPLE.table.rows["stored_size"][:4].sum()
        device.cached.release()
