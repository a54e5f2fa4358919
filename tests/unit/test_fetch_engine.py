"""The fetch engine over a source in memory: exact bytes, one fetch a chunk, deadlines, retries, what waits for what."""

from __future__ import annotations

import os
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from lazyfs.cache.store import CacheDir
from lazyfs.errors import (
    AuthError,
    BugError,
    DeadlineError,
    FormatError,
    IntegrityError,
    NotFoundError,
    RateLimitedError,
    SourceError,
)  # fmt: skip
from lazyfs.fetch.engine import Fetcher, FetchLimits
from lazyfs.image.codec import Codec
from tests.fetchkit import CHUNK, MemorySource, Request, make_sample

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SAMPLE = make_sample(12, zeros=(5,))
PLAIN = FetchLimits(readahead=False)
pytestmark = pytest.mark.trio


class Bench:
    """A fetcher, a cache, one device and its source."""

    def __init__(self, fetcher: Fetcher, cache: CacheDir, source: MemorySource, sample=SAMPLE) -> None:
        self.fetcher, self.cache, self.source, self.sample = fetcher, cache, source, sample
        self.device = sample.device(cache, source)

    async def read(self, offset: int, size: int, seconds: float = 20.0) -> bytes:
        data = await self.fetcher.read(self.device, offset, size, deadline=time.monotonic() + seconds)
        assert bytes(data) == self.sample.data[offset : offset + size]
        return bytes(data)

    async def chunk(self, index: int, seconds: float = 20.0) -> None:
        await self.read(index * CHUNK, min(CHUNK, len(self.sample.data) - index * CHUNK), seconds)

    async def settled(self) -> None:
        """Until no transfer runs: a read returns before the bookkeeping of its last chunk."""
        with trio.fail_after(20):
            while self.fetcher._scheduler._workers.running:    # noqa: ASYNC110
                await trio.sleep(0.001)

    async def asked(self, count: int) -> None:
        """Until so many requests have come."""
        with trio.fail_after(20):
            while len(self.source.requests) < count:    # noqa: ASYNC110
                await trio.sleep(0.001)


@asynccontextmanager
async def bench(tmp_path, bounds: FetchLimits = PLAIN, sample=SAMPLE) -> AsyncIterator[Bench]:
    source = MemorySource({sample.blob: sample.stored})
    with CacheDir.open(tmp_path / "cache") as cache:
        async with Fetcher(bounds) as fetcher:
            made = Bench(fetcher, cache, source, sample)
            try:
                yield made
            finally:
                source.gate.set()
        scheduler = fetcher._scheduler
        assert not scheduler.flights
        assert not scheduler.lanes
        assert not any(scheduler._running.values())
        made.device.cached.release()
        assert not made.device.cached.try_retain()    # nobody holds it still


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
        assert list(b.device.touch_order) == [0, 1, 3, 4, 5, 6, 7, 11, 2, 8, 9, 10]
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


# --- errors and retries -----------------------------------------------------------------------------------------------


def failing(times: int, error: Exception):
    """The first requests raise."""

    def fault(request: Request) -> None:
        if request.number < times:
            raise error

    return fault


async def test_transient_errors_are_tried_again(tmp_path):
    async with bench(tmp_path) as b:
        b.source.faults.append(failing(2, SourceError("reset")))
        await b.read(0, 2 * CHUNK)
        assert len(b.source.requests) == 3
        assert len(set(b.source.requests)) == 1    # merged again
        assert b.fetcher.statistics.retries == 2


@pytest.mark.parametrize("error", [NotFoundError("no"), AuthError("no"), SourceError("no", transient=False)])
async def test_lasting_errors_are_not_tried_again_and_remembered_for_a_while(tmp_path, error):
    async with bench(tmp_path) as b:
        b.source.faults.append(failing(100, error))
        for _ in range(3):
            with pytest.raises(type(error), match="no"):
                await b.chunk(1)
        assert len(b.source.requests) == 1
        b.source.faults.clear()
        await b.chunk(2)
        b.device._errors.clear()    # as time does
        await b.chunk(1)


async def test_remembered_errors_are_forgotten_by_themselves(tmp_path, monkeypatch):
    async with bench(tmp_path) as b:
        b.source.faults.append(failing(1, NotFoundError("no")))
        with pytest.raises(NotFoundError):
            await b.chunk(1)
        now = time.monotonic()
        monkeypatch.setattr("lazyfs.fetch.device.time.monotonic", lambda: now + 3)
        assert b.device.remembered_error(1) is None
        assert not b.device._errors


async def test_retries_never_outlast_the_deadline(tmp_path):
    async with bench(tmp_path) as b:
        b.source.faults.append(failing(100, SourceError("down")))
        began = time.monotonic()
        with pytest.raises(SourceError):
            await b.chunk(1, seconds=0.3)
        assert time.monotonic() - began < 5
        assert 1 <= len(b.source.requests) <= 6


async def test_retry_after_is_honoured_for_the_whole_source(tmp_path):
    async with bench(tmp_path) as b:
        times = []

        def fault(request: Request) -> None:
            times.append(time.monotonic())
            if request.number == 0:
                raise RateLimitedError("slow down", retry_after_s=0.3)

        b.source.faults.append(fault)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.chunk, 1)
            await b.asked(1)
            await trio.sleep(0.05)
            nursery.start_soon(b.chunk, 8)
        assert all(later - times[0] >= 0.3 for later in times[1:])
        assert len(times) == 3


async def test_asked_to_wait_longer_than_the_deadline_fails_at_once(tmp_path):
    async with bench(tmp_path) as b:
        b.source.faults.append(failing(1, RateLimitedError("slow down", retry_after_s=100)))
        with pytest.raises(RateLimitedError):
            await b.chunk(1)
        assert len(b.source.requests) == 1


async def test_a_stream_that_breaks_keeps_what_arrived(tmp_path):
    async with bench(tmp_path) as b:
        sizes = SAMPLE.table.rows["stored_size"]

        def fault(request: Request) -> None:
            if request.number == 0:
                request.data = request.data[: int(sizes[0]) + 100]

        b.source.faults.append(fault)
        await b.read(0, 3 * CHUNK)
        assert b.source.requests[1] == (int(sizes[0]), int(sizes[1:3].sum()))


async def test_small_pieces_make_whole_chunks(tmp_path):
    async with bench(tmp_path) as b:
        b.source.faults.append(lambda request: setattr(request, "piece_bytes", 1000))
        await b.read(0, 3 * CHUNK)


async def test_a_source_that_gives_too_much_is_not_believed(tmp_path):
    async with bench(tmp_path) as b:

        class Flood(bytes):
            def __getitem__(self, key):
                return bytes(self) + b"more"

        b.source.faults.append(lambda request: setattr(request, "data", Flood(request.data)))
        with pytest.raises(SourceError, match="too many"):
            await b.chunk(1, seconds=0.2)


def spoiling(times: int, position: int = 50):
    def fault(request: Request) -> None:
        if request.number < times:
            data = bytearray(request.data)
            data[position] ^= 1
            request.data = bytes(data)

    return fault


@pytest.mark.parametrize("codec", [Codec.NONE, Codec.LZ4, Codec.ZSTD])
async def test_a_bad_chunk_is_fetched_once_more(tmp_path, codec):
    async with bench(tmp_path, sample=make_sample(4, codec=codec)) as b:
        b.source.faults.append(spoiling(1))
        await b.read(0, 3 * CHUNK)    # its neighbours of the same request were good
        await b.settled()
        assert len(b.source.requests) == 2
        assert b.source.requests[1][1] == b.sample.table.rows["stored_size"][0]
        assert b.fetcher.statistics.bad_chunks == 1


@pytest.mark.parametrize("codec", [Codec.NONE, Codec.LZ4, Codec.ZSTD])
async def test_a_chunk_that_stays_bad_is_an_error_and_never_wrong_bytes(tmp_path, codec):
    async with bench(tmp_path, sample=make_sample(4, codec=codec)) as b:
        b.source.faults.append(spoiling(1000))
        for _ in range(3):
            with pytest.raises((IntegrityError, FormatError)):
                await b.chunk(0)
        assert len(b.source.requests) == 2
        assert not b.device.cached.present(0, 0)


async def test_a_bug_in_the_source_ends_the_read_not_the_engine(tmp_path):
    async with bench(tmp_path) as b:
        b.source.faults.append(failing(1, ZeroDivisionError()))
        with pytest.raises(BugError):
            await b.chunk(1)
        await b.chunk(2)


async def test_a_dead_source_does_not_hold_up_another(tmp_path):
    async with bench(tmp_path) as b:
        dead_sample = make_sample(40, seed=7, order=[*range(0, 40, 2), *range(1, 40, 2)])
        dead = MemorySource({}, name="memory:dead")
        dead.gate.clear()
        device = dead_sample.device(b.cache, dead)
        async with trio.open_nursery() as nursery:
            for index in range(0, 40, 4):
                nursery.start_soon(_expect_error, b.fetcher, device, index)
            await trio.testing.wait_all_tasks_blocked()
            await b.read(0, 3 * CHUNK)
            dead.gate.set()
        device.cached.release()


async def _expect_error(fetcher: Fetcher, device, index: int) -> None:
    with pytest.raises(SourceError):
        await fetcher.read(device, index * CHUNK, 10, deadline=time.monotonic() + 30)


# --- a cache that cannot store ----------------------------------------------------------------------------------------


async def test_without_space_reads_are_served_from_memory_and_it_recovers(tmp_path, monkeypatch):
    async with bench(tmp_path) as b:
        monkeypatch.setattr(b.device.cached, "write", lambda index, data: False)
        await b.read(100, 3 * CHUNK)
        await b.read(100, 3 * CHUNK)    # remembered
        assert len(b.source.requests) == 1
        await b.settled()
        assert b.fetcher.statistics.not_stored == 4
        monkeypatch.undo()
        await b.read(2 * CHUNK, 3 * CHUNK)    # partly memory, partly cache
        assert b.device.cached.present(4, 4)


async def test_a_chunk_that_vanishes_is_fetched_again(tmp_path):
    async with bench(tmp_path) as b:
        await b.read(0, len(SAMPLE.data))
        os.truncate(b.device.cached.data_path, 3 * CHUNK)
        await b.chunk(9)
        assert len(b.source.requests) == 2
