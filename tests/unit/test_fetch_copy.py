"""Background copies: everything comes, each byte once, behind everybody else, and at the rate it was given."""

from __future__ import annotations

import math
import time

import pytest
import trio
import trio.testing

from lazyfs.cache.space import Limits
from lazyfs.errors import CacheError
from lazyfs.fetch.copying import Copies, CopyHandle, CopyTerms
from lazyfs.fetch.engine import FetchLimits
from lazyfs.fetch.transfer import Priority
from lazyfs.image.codec import Codec
from tests.fetchbench import bench
from tests.fetchkit import CHUNK, Request, make_sample

BIG = make_sample(160, seed=3, codec=Codec.NONE, zeros=(9,))    # 10 MiB stored: three windows of 4 MiB
AT_ONCE = CopyTerms(quiet_s=0.0, patience_s=math.inf)


def plan(b):
    return [(b.device, index) for index in range(b.sample.table.chunk_count)]


async def copied(handle: CopyHandle) -> None:
    with trio.fail_after(20):
        await handle.wait()


@pytest.mark.trio
async def test_a_copy_fetches_what_is_missing_each_byte_once(tmp_path):
    async with bench(tmp_path, FetchLimits(readahead=False), sample=BIG) as b:
        await b.chunk(3)
        windows = []
        handle = b.fetcher.copy(plan(b), AT_ONCE)
        handle.on_window = lambda: windows.append(handle.landed_bytes)
        await copied(handle)
        assert handle.error is None
        assert b.device.cached.complete
        assert sum(size for _, size in b.source.requests) == len(BIG.stored)
        assert max(size for _, size in b.source.requests) <= 4 << 20
        assert handle.landed_bytes == handle.received_bytes == len(BIG.stored) - CHUNK
        assert windows == sorted(windows)
        assert len(windows) == len(b.source.requests) - 1
        statistics = b.fetcher.statistics
        assert (statistics.chunks_copied, statistics.copied_stored_bytes) == (158, len(BIG.stored) - CHUNK)
        assert statistics.chunks_prefetched == 0


@pytest.mark.trio
async def test_no_window_starts_while_others_fetch_and_one_does_when_they_are_done(tmp_path):
    async with bench(tmp_path, FetchLimits(readahead=False), sample=BIG) as b:
        b.source.gate.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.chunk, 5)
            await b.asked(1)
            handle = b.fetcher.copy(plan(b), AT_ONCE)
            await trio.testing.wait_all_tasks_blocked()
            assert handle.making_way
            assert len(b.source.requests) == 1
            b.source.gate.set()
        await copied(handle)
        assert not handle.making_way
        assert sum(size for _, size in b.source.requests) == len(BIG.stored)


@pytest.mark.trio
async def test_a_prefetch_goes_before_a_copy(tmp_path):
    async with bench(tmp_path, FetchLimits(readahead=False), sample=BIG) as b:
        b.source.gate.clear()
        prefetch = b.fetcher.prefetch(plan(b)[100:])
        await b.asked(1)
        handle = b.fetcher.copy(plan(b), AT_ONCE)
        await trio.testing.wait_all_tasks_blocked()
        assert len(b.source.requests) == 1
        b.source.gate.set()
        await prefetch.wait()
        await copied(handle)
        assert b.source.requests[0][0] == int(BIG.table.rows["blob_offset"][100])
        assert b.device.cached.complete


@pytest.mark.trio
async def test_who_is_busy_for_longer_than_the_copy_is_patient_gets_one_window_beside_it(tmp_path):
    async with bench(tmp_path, FetchLimits(readahead=False), sample=BIG) as b:
        b.source.gate.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.chunk, 5)
            await b.asked(1)
            handle = b.fetcher.copy(plan(b), CopyTerms(quiet_s=0.0, patience_s=0.05))
            await b.asked(2)
            b.source.gate.set()
        await copied(handle)
        assert b.source.requests[1][1] <= 4 << 20


@pytest.mark.trio
async def test_a_held_copy_stands_still_and_goes_on_where_it_was(tmp_path):
    async with bench(tmp_path, FetchLimits(readahead=False), sample=BIG) as b:
        handle = b.fetcher.copy(plan(b), AT_ONCE)
        handle.on_window = handle.hold
        with trio.fail_after(20):
            while not handle.held or handle.running:    # noqa: ASYNC110
                await trio.sleep(0.001)
        count = len(b.source.requests)
        assert not handle.done
        await b.chunk(159)                              # dispatches: nothing else may start
        await b.settled()
        assert len(b.source.requests) == count + 1
        handle.on_window = lambda: None
        handle.hold(held=False)
        b.fetcher.nudge()
        await copied(handle)
        assert sum(size for _, size in b.source.requests) == len(BIG.stored)


@pytest.mark.trio
async def test_a_copy_into_a_full_cache_ends_and_says_why(tmp_path):
    async with bench(tmp_path, FetchLimits(readahead=False), sample=BIG) as b:
        b.cache.space.limits = Limits(quota_bytes=20 * CHUNK)
        handle = b.fetcher.copy(plan(b), AT_ONCE)
        await copied(handle)
        assert isinstance(handle.error, CacheError)
        assert len(b.source.requests) <= 2              # not the whole image, to be thrown away
        await b.settled()
        await b.chunk(150)                              # reads go on


@pytest.mark.trio
async def test_a_read_in_the_middle_of_a_slow_copy_does_not_wait_for_its_rate(tmp_path):
    async with bench(tmp_path, FetchLimits(readahead=False), sample=BIG) as b:
        b.source.faults.append(lambda request: setattr(request, "piece_bytes", 1 << 12))
        handle = b.fetcher.copy(plan(b), CopyTerms(rate_bytes_s=100_000, quiet_s=0.0))
        await b.asked(1)
        await b.chunk(3, 2.0)                           # 2.6 s away at that rate
        handle.cancel()
        await copied(handle)


@pytest.mark.trio
async def test_the_rate_of_a_copy_is_kept(tmp_path):
    async with bench(tmp_path, FetchLimits(readahead=False), sample=BIG) as b:
        def small(request: Request) -> None:
            request.piece_bytes = 1 << 15

        b.source.faults.append(small)
        began = time.monotonic()
        handle = b.fetcher.copy(plan(b)[:64], CopyTerms(rate_bytes_s=8 << 20, quiet_s=0.0))
        await copied(handle)
        assert time.monotonic() - began > 0.3           # 63 chunks: 0.49 s, less the credit of 0.1 s
        assert max(size for _, size in b.source.requests) <= 4 << 20


@pytest.mark.trio
async def test_copies_of_several_images_take_turns(tmp_path):
    async with bench(tmp_path, FetchLimits(readahead=False, copy_streams=1), sample=BIG) as b:
        other = make_sample(160, seed=4, codec=Codec.NONE)
        b.source.blobs[other.blob] = other.stored
        device = other.device(b.cache, b.source)
        asked = []
        b.source.faults.append(lambda request: asked.append(request.data[:16] in other.stored))
        b.source.gate.clear()
        first = b.fetcher.copy(plan(b), AT_ONCE)
        await b.asked(1)
        second = b.fetcher.copy([(device, index) for index in range(160)], AT_ONCE)
        b.source.gate.set()
        await copied(first)
        await copied(second)
        assert asked == [False, False, True, False, True, True]
        await b.settled()
        device.cached.release()


# --- when a window may start; no clock runs here ----------------------------------------------------------------------


def test_a_window_starts_when_it_was_quiet_for_long_enough_or_patience_ends():
    copies = Copies()
    handle = CopyHandle([(None, 0)], CopyTerms(quiet_s=0.5, patience_s=5.0), copies.traffic)
    copies.handles.append(handle)
    assert copies.ready(100.0) == ([handle], math.inf)
    copies.begin(Priority.FOREGROUND)
    copies.begin(Priority.PREFETCH)
    assert copies.ready(101.0) == ([], 105.0)          # patience counts from when it first could have started
    copies.end(Priority.FOREGROUND, 102.0)
    assert copies.ready(102.0) == ([], 105.0)
    copies.end(Priority.PREFETCH, 103.0)
    assert copies.ready(103.0) == ([], 103.5)
    copies.begin(Priority.FOREGROUND)
    copies.end(Priority.FOREGROUND, 103.4)
    assert copies.ready(103.5) == ([], 103.9)
    assert handle.making_way
    assert copies.ready(103.9) == ([handle], math.inf)
    assert not handle.making_way


def test_other_copies_are_no_traffic_and_a_held_one_loses_its_patience():
    copies = Copies()
    handle = CopyHandle([(None, 0)], CopyTerms(quiet_s=0.5, patience_s=5.0), copies.traffic)
    copies.handles.append(handle)
    copies.begin(Priority.COPY)
    assert copies.ready(10.0)[0] == [handle]
    copies.begin(Priority.BACKGROUND)
    assert copies.ready(11.0) == ([], 15.0)
    handle.hold()
    assert copies.ready(20.0) == ([], math.inf)
    handle.hold(held=False)
    assert copies.ready(21.0) == ([], 26.0)
    handle.paused_until = 40.0
    assert copies.ready(27.0) == ([], 40.0)


def test_many_reads_of_what_is_here_are_made_way_for_too():
    reads = [0]
    copies = Copies(lambda: reads[0])
    handle = CopyHandle([(None, 0)], CopyTerms(quiet_s=0.5, patience_s=5.0), copies.traffic)
    copies.handles.append(handle)
    assert copies.ready(100.0)[0] == [handle]
    reads[0] += 1000
    assert copies.ready(101.0) == ([], 101.5)
    reads[0] += 24                                     # in half a second: a program that is no start
    assert copies.ready(101.5)[0] == [handle]
    for step in range(1, 7):
        reads[0] += 100
        assert copies.ready(101.5 + step / 2)[0] == []
    reads[0] += 100
    assert copies.ready(105.0)[0] == [handle]          # patience: since it first could have started
