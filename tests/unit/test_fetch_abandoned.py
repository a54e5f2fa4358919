"""What is fetched for reads of which none waits any more: their readers were killed, and nobody else wants it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import trio

from lazyfs.errors import SourceError
from lazyfs.fetch import transfer
from lazyfs.fetch.engine import FetchLimits
from tests.fetchbench import bench

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fetchkit import Request

pytestmark = pytest.mark.trio


async def test_what_failed_is_not_asked_for_again_for_nobody(tmp_path: Path):
    async with bench(tmp_path) as b:
        b.source.gate.clear()

        def fault(request: Request) -> None:
            raise SourceError("reset")

        b.source.faults.append(fault)
        with trio.move_on_after(0.05):
            await b.chunk(1)
        b.source.gate.set()
        await b.settled()
        b.source.faults.clear()
        await b.chunk(2)    # the lane is alive
        assert len(b.source.requests) == 2
        await b.chunk(1)
        assert len(b.source.requests) == 3


async def test_what_waits_for_its_second_try_is_dropped_with_its_reader(tmp_path: Path):
    async with bench(tmp_path) as b:
        def fault(request: Request) -> None:
            raise SourceError("reset")

        b.source.faults.append(fault)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.chunk, 1)
            await b.asked(1)
            await b.settled()
            nursery.cancel_scope.cancel()    # in the pause before it is asked again
        scheduler = b.fetcher._scheduler
        with trio.fail_after(20):
            while scheduler.flights:    # noqa: ASYNC110
                await trio.sleep(0.001)
        assert len(b.source.requests) <= 2


async def test_what_nobody_waits_for_leaves_the_queue(tmp_path: Path):
    one_slot = FetchLimits(readahead=False, foreground_total=1, foreground_per_source=1)
    async with bench(tmp_path, one_slot) as b:
        b.source.gate.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.chunk, 1)
            await b.asked(1)
            with trio.move_on_after(0.05):
                await b.chunk(7)    # no slot
            b.source.gate.set()
        await b.settled()
        assert len(b.source.requests) == 1
        await b.chunk(7)
        assert len(b.source.requests) == 2


async def test_a_long_transfer_ends_soon_after_its_last_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transfer, "ABANDON_S", 0.1)
    pieces: list[int] = []

    def take_time(position: int) -> None:
        pieces.append(position)
        time.sleep(0.005)    # a slow link: all of it would take minutes

    def drip(request: Request) -> None:
        request.piece_bytes, request.before_piece = 1, take_time

    async with bench(tmp_path) as b:
        b.source.faults.append(drip)
        with trio.move_on_after(0.05):
            await b.chunk(1)
        await b.settled()
        assert not b.device.cached.present(1, 1)
        assert len(pieces) < b.source.requests[0][1] / 2
        b.source.faults.clear()
        await b.chunk(1)
