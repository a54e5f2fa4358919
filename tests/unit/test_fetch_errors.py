"""What the fetch engine does when a source fails, lies or limits, and when the cache cannot store."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from lazyfs import limits
from lazyfs.errors import (
    AuthError,
    BugError,
    DeadlineError,
    FormatError,
    IntegrityError,
    NotFoundError,
    RateLimitedError,
    SourceError,
)
from lazyfs.image.codec import Codec
from tests.fetchbench import SAMPLE, bench
from tests.fetchkit import CHUNK, MemorySource, Request, make_sample

if TYPE_CHECKING:
    from lazyfs.fetch.engine import Fetcher

pytestmark = pytest.mark.trio

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


async def test_no_time_for_another_try_is_a_deadline_that_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "RETRY_FIRST_S", 100.0)
    monkeypatch.setattr(limits, "RETRY_PAUSE_MAX_S", 100.0)
    async with bench(tmp_path) as b:
        b.source.faults.append(failing(1000, SourceError("reset")))
        with pytest.raises(DeadlineError, match="reset"):
            await b.read(0, 10)
        assert len(b.source.requests) == 1


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


async def test_a_source_that_asks_for_an_hour_is_asked_again_while_reads_still_wait(tmp_path):
    async with bench(tmp_path) as b:
        b.source.faults.append(failing(1, RateLimitedError("slow down", retry_after_s=3600)))
        with pytest.raises(RateLimitedError):
            await b.chunk(1)
        await b.settled()
        (lane,) = b.fetcher._scheduler.lanes
        assert 0 < lane.state.paused_until - trio.current_time() < limits.READ_DEADLINE_S / 2 + 1


async def test_a_pause_leaves_no_trace_of_a_source_that_nobody_wants_any_more(tmp_path):
    async with bench(tmp_path) as b:
        b.source.faults.append(failing(1, RateLimitedError("slow down", retry_after_s=0.3)))
        with pytest.raises(RateLimitedError):
            await b.chunk(1, seconds=0.2)
        await b.settled()
        with trio.fail_after(20):
            while b.fetcher._scheduler.lanes:    # noqa: ASYNC110
                await trio.sleep(0.01)


async def test_what_failed_when_nobody_wanted_it_is_tried_for_the_first_who_does(tmp_path):
    async with bench(tmp_path) as b:
        b.source.faults.append(failing(1, NotFoundError("not yet")))
        with trio.fail_after(20):
            await b.fetcher.prefetch([(b.device, 0)]).wait()
        assert not b.device.cached.present(0, 0)
        await b.chunk(0)


class NoThreads(threading.Thread):
    """A machine at its limit of threads; `room` more can be started."""

    room = 0

    def start(self):
        if NoThreads.room <= 0:
            raise RuntimeError("can't start new thread")
        NoThreads.room -= 1
        super().start()


async def test_without_another_thread_transfers_wait_for_those_there_are(tmp_path, monkeypatch):
    async with bench(tmp_path) as b:
        monkeypatch.setattr(NoThreads, "room", 1)
        monkeypatch.setattr("lazyfs.fetch.workers.threading.Thread", NoThreads)
        b.source.gate.clear()
        async with trio.open_nursery() as nursery:
            for index in (0, 2, 4, 7):
                nursery.start_soon(b.chunk, index)
            await b.asked(1)
            b.source.gate.set()
        await b.settled()
        assert b.source.running_max == 1


async def test_without_any_thread_reads_are_tried_again_until_there_is_one(tmp_path, monkeypatch):
    async with bench(tmp_path) as b:
        monkeypatch.setattr(NoThreads, "room", 0)
        monkeypatch.setattr("lazyfs.fetch.workers.threading.Thread", NoThreads)
        with pytest.raises(SourceError, match="thread"):
            await b.chunk(1, seconds=0.3)
        await b.settled()
        monkeypatch.setattr(NoThreads, "room", 1)
        await b.chunk(2)


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
        with pytest.raises(SourceError):
            await b.chunk(1, seconds=0.5)
        assert not b.device.cached.present(1, 1)


async def test_when_time_runs_out_the_last_reason_is_told(tmp_path):
    async with bench(tmp_path) as b:
        def fault(request: Request) -> None:
            if request.number == 0:
                raise SourceError("connection refused")
            time.sleep(0.6)

        b.source.faults.append(fault)
        with pytest.raises(DeadlineError, match=r"within its deadline; .* connection refused"):
            await b.chunk(1, seconds=0.5)


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


async def test_chunks_that_need_no_decoding_do_not_share_the_buffer_they_came_in(tmp_path, monkeypatch):
    sample = make_sample(6, codec=Codec.NONE)
    async with bench(tmp_path, sample=sample) as b:
        monkeypatch.setattr(b.device.cached, "write", lambda index, data: False)
        await b.read(0, len(sample.data))    # one request: the buffer has held all of them
        await b.read(0, len(sample.data))
        assert len(b.source.requests) == 1


async def test_a_chunk_that_vanishes_is_fetched_again(tmp_path):
    async with bench(tmp_path) as b:
        await b.read(0, len(SAMPLE.data))
        os.truncate(b.device.cached.data_path, 3 * CHUNK)
        await b.chunk(9)
        assert len(b.source.requests) == 2
