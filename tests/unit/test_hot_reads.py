"""Reads that the hot device answers, and what happens where it cannot."""

from __future__ import annotations

import logging
import time

import pytest
import trio
import trio.testing

from lazyfs.errors import DeadlineError, IntegrityError, NotFoundError, SourceError
from lazyfs.fetch.hotview import HOT_PAUSE_S, HotDevice
from tests.fetchkit import CHUNK
from tests.hotreadkit import BLOCK, CHUNK_BLOCKS, hot_bench

pytestmark = pytest.mark.trio
# two blocks of layer 1, then most of layer 0's first chunk, then all of its second
EXTENTS = [(3, 1, 2), (2, 0, 13), (CHUNK_BLOCKS, 0, CHUNK_BLOCKS)]


async def test_hot_blocks_come_from_the_hot_blob_alone(tmp_path):
    async with hot_bench(tmp_path, EXTENTS) as b:
        await b.blocks(0, 2, 13)
        await b.read(1, 3 * BLOCK + 7, BLOCK)
        assert len(b.hot_source.requests) == 1
        assert not b.source.requests
        assert b.fetcher.statistics.hot_reads == 2
        assert b.fetcher.statistics.touched_stored_bytes == int(b.sample.table.rows["stored_size"][0])


async def test_the_second_read_of_hot_blocks_has_no_checkpoint(tmp_path):
    async with hot_bench(tmp_path, EXTENTS) as b:
        await b.blocks(0, 2)
        with trio.testing.assert_no_checkpoints():
            await b.blocks(0, 4)
        hot = b.devices[0].hot
        assert hot.read_now(5 * BLOCK + 1, 10) == b.layers[0].data[5 * BLOCK + 1 : 5 * BLOCK + 11]
        assert hot.read_now(0, 10) is None               # not hot
        assert hot.read_now(CHUNK + 20, 10) is not None   # in the same hot chunk
        assert hot.read_now(2 * CHUNK - 10, 10) is None    # in one that is not there


async def test_one_cold_block_and_the_layers_chunk_is_read(tmp_path):
    async with hot_bench(tmp_path, EXTENTS) as b:
        await b.blocks(0, 1, 3)
        assert len(b.source.requests) == 1
        assert not b.hot_source.requests
        await b.blocks(0, 2, 3)    # hot, but there already
        assert not b.hot_source.requests


async def test_what_is_present_of_the_layer_and_what_is_hot_make_one_read(tmp_path):
    async with hot_bench(tmp_path, EXTENTS) as b:
        await b.blocks(0, 0)
        await b.blocks(0, CHUNK_BLOCKS - 3, 6)
        assert len(b.source.requests) == 1
        assert len(b.hot_source.requests) == 1


async def test_hot_chunks_are_asked_for_together(tmp_path):
    async with hot_bench(tmp_path, EXTENTS) as b:
        await b.blocks(0, CHUNK_BLOCKS, CHUNK_BLOCKS)    # in both hot chunks
        assert len(b.hot_source.requests) == 1


async def test_a_chunk_on_its_way_is_waited_for_rather_than_a_hot_one_asked_for(tmp_path):
    async with hot_bench(tmp_path, EXTENTS) as b:
        b.source.gate.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.blocks, 0, 0)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(b.blocks, 0, 2)
            await trio.testing.wait_all_tasks_blocked()
            b.source.gate.set()
        assert not b.hot_source.requests
        assert len(b.source.requests) == 1


async def test_a_hot_chunk_on_its_way_is_waited_for(tmp_path):
    async with hot_bench(tmp_path, EXTENTS) as b:
        b.hot_source.gate.clear()
        async with trio.open_nursery() as nursery:
            b.fetcher.prefetch([(b.hot.device, 0)])
            nursery.start_soon(b.blocks, 0, 2)
            await trio.testing.wait_all_tasks_blocked()
            b.hot_source.gate.set()
        assert len(b.hot_source.requests) == 1
        assert not b.source.requests


@pytest.mark.parametrize("trouble", ["gone", "refused", "damaged", "hanging"])
async def test_whatever_is_wrong_with_the_hot_blob_the_layers_are_read(tmp_path, caplog, trouble):
    async with hot_bench(tmp_path, EXTENTS) as b:
        if trouble == "gone":
            b.hot_source.blobs.clear()
        elif trouble == "damaged":
            b.hot_source.blobs[b.sample.blob] = bytes(len(b.sample.stored))
        elif trouble == "hanging":
            b.hot_source.gate.clear()
        else:
            def refuse(_request):
                raise SourceError("no", transient=False)
            b.hot_source.faults.append(refuse)
        with caplog.at_level(logging.WARNING, "lazyfs.fetch.hotview"):
            await b.blocks(0, 2, 13, seconds=2.0)
            asked = len(b.hot_source.requests)
            assert asked
            await b.blocks(1, 3)
            await b.blocks(0, CHUNK_BLOCKS, 4)
        assert len(b.hot_source.requests) == asked     # for a while it is not asked again
        assert len([one for one in caplog.records if "hot part" in one.message]) == 1
        assert not b.fetcher.statistics.errors


async def test_where_both_are_gone_the_layers_error_is_told(tmp_path):
    async with hot_bench(tmp_path, EXTENTS) as b:
        b.hot_source.blobs.clear()
        b.source.blobs.clear()
        with pytest.raises(NotFoundError):
            await b.blocks(0, 2)
        b.hot_source.gate.clear()
        b.source.gate.clear()
        with pytest.raises((DeadlineError, NotFoundError)):
            await b.blocks(0, CHUNK_BLOCKS, seconds=0.2)


async def test_a_hot_blob_that_failed_is_asked_again_later(tmp_path):
    async with hot_bench(tmp_path, EXTENTS) as b:
        now = 0.0
        hot = HotDevice(b.hot.device, b.hot.extents, clock=lambda: now)
        assert not hot.failing
        hot.failed(IntegrityError("bad"))
        assert hot.failing
        now = HOT_PAUSE_S
        assert not hot.failing


async def test_chunks_that_cannot_be_stored_are_served_from_memory(tmp_path, monkeypatch):
    async with hot_bench(tmp_path, EXTENTS) as b:
        monkeypatch.setattr(b.hot.device.cached, "_storing", False)
        await b.blocks(0, 2, 3)
        await b.blocks(0, 5, 3)
        assert len(b.hot_source.requests) == 1
        assert not b.source.requests


async def test_only_hot_chunks_with_a_block_that_is_not_there_are_wanted(tmp_path):
    async with hot_bench(tmp_path, EXTENTS) as b:
        assert b.hot.wanted_chunks(b.devices) == [0, 1]
        await b.read(0, CHUNK, CHUNK)     # its second chunk comes from the hot blob: the layers have nothing
        assert b.hot.wanted_chunks(b.devices) == [0, 1]
    async with hot_bench(tmp_path / "layers", EXTENTS) as b:
        for device, index in ((0, 1), (0, 0), (1, 0)):
            hot, b.devices[device].hot = b.devices[device].hot, None
            await b.read(device, index * CHUNK, CHUNK)
            b.devices[device].hot = hot
            if (device, index) == (0, 1):
                assert b.hot.wanted_chunks(b.devices) == [0]    # the last hot chunk holds blocks of that one only
        assert b.hot.wanted_chunks(b.devices) == []


async def test_a_read_that_waits_for_the_hot_blob_ends_in_time(tmp_path):
    async with hot_bench(tmp_path, EXTENTS) as b:
        b.hot_source.gate.clear()
        b.source.gate.clear()
        began = time.monotonic()
        with pytest.raises(DeadlineError):
            await b.blocks(0, 2, seconds=0.3)
        assert time.monotonic() - began < 5
