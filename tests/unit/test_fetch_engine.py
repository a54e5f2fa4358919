"""Reads through the fetch engine: exact bytes, one fetch a chunk, merging, deadlines, what waits for what."""

from __future__ import annotations

import time

import pytest
import trio
import trio.testing

from lazyfs.cache.store import CacheDir
from lazyfs.errors import BugError, DeadlineError, NotFoundError, SourceError
from lazyfs.fetch.engine import Fetcher, FetchLimits
from tests.fetchbench import PLAIN, SAMPLE, bench
from tests.fetchkit import CHUNK, MemorySource, Request, make_sample

pytestmark = pytest.mark.trio

# --- exact reads, single flight, merging ------------------------------------------------------------------------------


async def test_every_read_is_exact_and_no_chunk_is_fetched_twice(tmp_path):
    async with bench(tmp_path) as b:
        size = len(SAMPLE.data)
        for offset, length in ((0, 1), (CHUNK - 1, 2), (3 * CHUNK + 7, 4 * CHUNK), (size - 1, 1), (0, size), (size, 0)):
            await b.read(offset, length)
        await b.settled()
        assert sum(length for _, length in b.source.requests) == len(SAMPLE.stored)
        assert b.fetcher.statistics.fetched_stored_bytes == len(SAMPLE.stored)
        assert b.fetcher.statistics.touched_stored_bytes == len(SAMPLE.stored)
        assert b.fetcher.statistics.chunks_fetched == 11    # one is zeros
        assert b.device.cached.complete


async def test_a_present_read_has_no_checkpoint(tmp_path):
    async with bench(tmp_path) as b:
        await b.chunk(1)
        with trio.testing.assert_no_checkpoints():
            await b.chunk(1)
        assert b.fetcher.statistics.hits == 1


async def test_zero_chunks_need_no_request(tmp_path):
    async with bench(tmp_path) as b:
        await b.chunk(5)
        assert not b.source.requests


@pytest.mark.parametrize(("offset", "size"), [(-1, 5), (0, -1), (len(SAMPLE.data), 1), (0, len(SAMPLE.data) + 1)])
async def test_reads_beyond_the_device_are_bugs(tmp_path, offset, size):
    async with bench(tmp_path) as b:
        with pytest.raises(BugError):
            await b.fetcher.read(b.device, offset, size, deadline=time.monotonic() + 5)


async def test_many_readers_of_a_chunk_make_one_request(tmp_path):
    async with bench(tmp_path) as b:
        b.source.gate.clear()
        async with trio.open_nursery() as nursery:
            for reader in range(200):
                nursery.start_soon(b.read, 2 * CHUNK + reader, 100)
            await trio.testing.wait_all_tasks_blocked()
            b.source.gate.set()
        assert len(b.source.requests) == 1
        assert b.fetcher.statistics.waits == 199


async def test_neighbouring_missing_chunks_go_in_one_request(tmp_path):
    async with bench(tmp_path) as b:
        await b.read(0, 4 * CHUNK)
        assert b.source.requests == [(0, sum(int(size) for size in SAMPLE.table.rows["stored_size"][:4]))]
        await b.read(4 * CHUNK, 4 * CHUNK)    # with the zero chunk in the middle: nothing lies between in the blob
        assert len(b.source.requests) == 2


async def test_chunks_that_are_not_neighbours_in_the_blob_go_in_several(tmp_path):
    sample = make_sample(6, order=[0, 2, 4, 1, 3, 5])
    async with bench(tmp_path, sample=sample) as b:
        await b.read(0, 3 * CHUNK)
        assert sorted(b.source.requests) == [
            (0, int(sample.table.rows["stored_size"][[0, 2]].sum())),
            (int(sample.table.rows["blob_offset"][1]), int(sample.table.rows["stored_size"][1])),
        ]


async def test_reads_that_wait_for_a_slot_are_merged(tmp_path):
    async with bench(tmp_path, FetchLimits(foreground_per_source=1, readahead=False)) as b:
        b.source.gate.clear()
        async with trio.open_nursery() as nursery:
            for index in (0, 7, 9, 8, 6, 2):
                nursery.start_soon(b.chunk, index)
                await trio.testing.wait_all_tasks_blocked()
            b.source.gate.set()
        sizes = SAMPLE.table.rows["stored_size"]
        assert [size for _, size in b.source.requests] == [sizes[0], sizes[6:10].sum(), sizes[2]]
        assert b.source.running_max == 1


async def test_concurrency_is_bounded(tmp_path):
    sample = make_sample(40, order=[*range(0, 40, 2), *range(1, 40, 2)])
    async with bench(tmp_path, sample=sample) as b:
        b.source.gate.clear()
        async with trio.open_nursery() as nursery:
            for index in range(0, 40, 4):
                nursery.start_soon(b.chunk, index)
            await trio.testing.wait_all_tasks_blocked()
            assert len(b.source.requests) <= PLAIN.foreground_per_source
            b.source.gate.set()
        assert b.source.running_max <= PLAIN.foreground_per_source


async def test_waiters_are_woken_chunk_by_chunk(tmp_path):
    """The first chunk of a run is served while the source still holds back the last."""
    async with bench(tmp_path) as b:
        stop_at = int(SAMPLE.table.rows["stored_size"][:2].sum())
        release = trio.lowlevel.current_trio_token()
        done = []

        def hold(position: int) -> None:
            if position >= stop_at:
                trio.from_thread.run(first_read.wait, trio_token=release)

        def fault(request: Request) -> None:
            request.before_piece = hold

        first_read = trio.Event()
        b.source.faults.append(fault)

        async def both() -> None:
            await b.read(0, 3 * CHUNK)
            done.append("all")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(both)
            await trio.testing.wait_all_tasks_blocked()
            await b.chunk(0)
            done.append("first")
            first_read.set()
        assert done == ["first", "all"]


async def test_two_images_with_the_same_layer_share_the_fetch(tmp_path):
    async with bench(tmp_path) as b:
        other = MemorySource({SAMPLE.blob: SAMPLE.stored}, name="memory:other")
        device = SAMPLE.device(b.cache, other)
        b.source.gate.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.chunk, 3)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(lambda: b.fetcher.read(device, 3 * CHUNK, 10, deadline=time.monotonic() + 20))
            await trio.testing.wait_all_tasks_blocked()
            b.source.gate.set()
        assert (len(b.source.requests), len(other.requests)) == (1, 0)
        device.cached.release()


async def test_when_the_other_images_source_fails_ours_is_asked(tmp_path):
    async with bench(tmp_path) as b:
        bad = MemorySource({}, name="memory:bad")
        device = SAMPLE.device(b.cache, bad)
        bad.gate.clear()
        async with trio.open_nursery() as nursery:

            async def fails() -> None:
                with pytest.raises(NotFoundError):
                    await b.fetcher.read(device, 3 * CHUNK, 10, deadline=time.monotonic() + 20)

            nursery.start_soon(fails)
            await b_asked(bad)
            nursery.start_soon(b.chunk, 3)
            await trio.testing.wait_all_tasks_blocked()
            bad.gate.set()
        assert (len(b.source.requests), len(bad.requests)) == (1, 1)
        device.cached.release()


async def b_asked(source: MemorySource) -> None:
    while not source.requests:    # noqa: ASYNC110
        await trio.sleep(0.001)


# --- deadlines and cancellation ---------------------------------------------------------------------------------------


async def test_a_read_ends_at_its_deadline_and_the_download_goes_on_for_others(tmp_path):
    async with bench(tmp_path) as b:
        b.source.gate.clear()
        async with trio.open_nursery() as nursery:

            async def hurried() -> None:
                with pytest.raises(DeadlineError):
                    await b.chunk(1, seconds=0.05)
                b.source.gate.set()

            nursery.start_soon(b.chunk, 1)
            await b.asked(1)
            nursery.start_soon(hurried)
        assert len(b.source.requests) == 1


async def test_a_cancelled_reader_does_not_stop_the_download(tmp_path):
    async with bench(tmp_path) as b:
        b.source.gate.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.chunk, 1)
            await b.asked(1)
            with trio.move_on_after(0.02) as scope:
                await b.chunk(1)
            assert scope.cancelled_caught
            b.source.gate.set()
        assert len(b.source.requests) == 1


async def test_a_download_nobody_waits_for_is_kept(tmp_path):
    async with bench(tmp_path) as b:
        b.source.gate.clear()
        with trio.move_on_after(0.02):
            await b.chunk(1)
        b.source.gate.set()
        with trio.fail_after(10):
            while not b.device.cached.present(1, 1):    # noqa: ASYNC110
                await trio.sleep(0.001)
        await b.chunk(1)
        assert len(b.source.requests) == 1


async def test_a_longer_deadline_outlives_an_attempt_made_for_a_shorter_one(tmp_path):
    async with bench(tmp_path) as b:
        b.source.gate.clear()
        async with trio.open_nursery() as nursery:

            async def hurried() -> None:
                with pytest.raises(DeadlineError):
                    await b.chunk(1, seconds=0.2)

            nursery.start_soon(hurried)
            await b.asked(1)
            nursery.start_soon(b.chunk, 1)
            await b.asked(2)    # the first attempt ended with the hurried reader's deadline
            b.source.gate.set()


async def test_a_deadline_in_the_past_fails_at_once_but_not_what_is_there(tmp_path):
    async with bench(tmp_path) as b:
        with pytest.raises(DeadlineError):
            await b.chunk(1, seconds=-1)
        await b.chunk(2)
        await b.chunk(2, seconds=-1)
        assert len(b.source.requests) == 1


async def test_closing_ends_the_readers(tmp_path):
    errors = []
    source = MemorySource({SAMPLE.blob: SAMPLE.stored})
    with CacheDir.open(tmp_path / "cache") as cache:
        device = SAMPLE.device(cache, source)
        source.gate.clear()

        async def reader(fetcher: Fetcher) -> None:
            try:
                await fetcher.read(device, 0, 10, deadline=time.monotonic() + 60)
            except SourceError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            async with Fetcher() as fetcher:
                nursery.start_soon(reader, fetcher)
                await trio.testing.wait_all_tasks_blocked()
            assert len(errors) <= 1
        assert "stopping" in str(errors[0])
        source.gate.set()
        device.cached.release()
