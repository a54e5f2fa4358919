"""Any reads, in any order, with any extents, beside chunks that come, go and cannot be had: never a wrong byte."""

from __future__ import annotations

import tempfile
from pathlib import Path

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hotreadkit import BLOCK, LAYERS, hot_bench

BLOCKS = [len(one.data) // BLOCK for one in LAYERS]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(0, 1), st.integers(0, 10**6), st.integers(1, 200_000)),
        st.tuples(st.just("forget"), st.integers(0, 2), st.integers(0, 100), st.just(0)),
        st.tuples(st.just("prefetch"), st.integers(0, 2), st.integers(0, 100), st.just(0)),
        st.tuples(st.just("hot blob gone"), st.booleans(), st.just(0), st.just(0)),
        st.tuples(st.just("full disk"), st.booleans(), st.just(0), st.just(0)),
    ), min_size=1, max_size=12)    # fmt: skip


@st.composite
def extents(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Runs of blocks, none twice, in any order."""
    found = []
    for device, count in enumerate(BLOCKS):
        borders = sorted(draw(st.sets(st.integers(0, count), min_size=2, max_size=8)))
        runs = zip(borders[::2], borders[1::2], strict=False)
        found += [(first, device, end - first) for first, end in runs]
    return draw(st.permutations(found))


@settings(max_examples=25, deadline=None)
@given(extents(), STEPS)
def test_every_byte_is_the_layers(places: list[tuple[int, int, int]], steps: list[tuple]) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as directory:
            async with hot_bench(Path(directory), places) as b, trio.open_nursery() as nursery:
                blob = b.hot_source.blobs[b.sample.blob]
                for what, which, number, size in steps:
                    if what == "read":
                        offset = number % len(LAYERS[which].data)
                        # some of them at the same time: they join each other's flights
                        read = b.read, which, offset, min(size, len(LAYERS[which].data) - offset)
                        await read[0](*read[1:]) if number % 2 else nursery.start_soon(*read)
                    elif what == "forget":
                        cached = b.every_device()[which].cached
                        index = number % cached.chunk_count
                        cached._forget(cached._generation, index, index)
                    elif what == "prefetch":
                        device = b.every_device()[which]
                        b.fetcher.prefetch([(device, number % device.table.chunk_count)])
                    elif what == "hot blob gone":
                        b.hot_source.blobs = {} if which else {b.sample.blob: blob}
                    else:
                        b.hot.device.cached._storing = b.devices[0].cached._storing = not which

    trio.run(run)


@settings(max_examples=25, deadline=None)
@given(extents(), st.lists(st.tuples(st.integers(0, 1), st.integers(0, 100)), max_size=8))
def test_the_wanted_chunks_are_those_with_an_absent_block(
    places: list[tuple[int, int, int]], present: list[tuple[int, int]]
) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as directory:
            async with hot_bench(Path(directory), places) as b:
                for device, number in present:
                    b.devices[device].cached._generation.present[number % b.devices[device].table.chunk_count] = 1
                absent = [
                    not b.devices[device].cached.present(block * BLOCK >> 16, block * BLOCK >> 16)
                    for first, device, count in places for block in range(first, first + count)
                ]    # fmt: skip
                per_chunk = (1 << 16) // BLOCK
                borders = range(0, len(absent), per_chunk)
                expected = [at // per_chunk for at in borders if any(absent[at : at + per_chunk])]
                assert b.hot.wanted_chunks(b.devices) == expected

    trio.run(run)
