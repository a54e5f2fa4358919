"""The plan of a hot device against a naive one: each wanted block once, in order, sorted within each hot chunk."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converter import hotplan
from converter.hotplan import plan_hot
from lazyfs import limits
from lazyfs.errors import UsageError
from lazyfs.image.codec import Codec
from lazyfs.image.hot import hot_starts
from lazyfs.image.table import ROW, ChunkTable, chunk_count

BLOCK = limits.BLOCK_SIZE_BYTES
CHUNK = 16 * BLOCK              # of the layers and of the hot device
BLOCKS = [100, 7, 40]
ZERO_CHUNKS = {(0, 2), (2, 0)}


def table_of(device: int) -> ChunkTable:
    size = BLOCKS[device] * BLOCK
    rows = np.zeros(chunk_count(size, CHUNK), dtype=ROW)
    rows["codec"] = [Codec.ZERO if (device, index) in ZERO_CHUNKS else Codec.NONE for index in range(len(rows))]
    return ChunkTable(CHUNK, size, rows)


TABLES = [table_of(device) for device in range(len(BLOCKS))]


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int, int]:
    device = draw(st.integers(0, len(BLOCKS) - 1))
    start = draw(st.integers(0, BLOCKS[device] * BLOCK - 1))
    return device, start, draw(st.integers(1, min(BLOCKS[device] * BLOCK - start, 40 * BLOCK)))


def naive(wanted: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    found: dict[tuple[int, int], None] = {}
    for device, start, length in wanted:
        for block in range(start // BLOCK, (start + length - 1) // BLOCK + 1):
            if (device, block // 16) not in ZERO_CHUNKS:
                found[device, block] = None
    blocks = list(found)
    return [block for at in range(0, len(blocks), 16) for block in sorted(blocks[at : at + 16])]


@given(st.lists(ranges(), max_size=12))
@settings(max_examples=300, deadline=None)
def test_each_block_once_where_it_is_first_wanted(wanted: list[tuple[int, int, int]]) -> None:
    extents = plan_hot(wanted, TABLES, CHUNK)
    assert [(device, block) for first, device, count in extents.tolist() for block in range(first, first + count)] \
        == naive(wanted)
    starts = [*hot_starts(extents).tolist(), int(extents["count"].sum())]
    assert all(start // 16 == (end - 1) // 16 for start, end in itertools.pairwise(starts))
    for end, (one, following) in zip(starts[1:], itertools.pairwise(extents.tolist()), strict=False):
        first, device, count = one
        assert following[:2] != (first + count, device) or end % 16 == 0      # as long as they can be


def test_more_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotplan, "_BLOCKS_MAX", 50)
    assert int(plan_hot([(0, 0, 50 * BLOCK)], TABLES, CHUNK)["count"].sum()) == 50 - 16
    with pytest.raises(UsageError, match="prefetch list"):
        plan_hot([(0, 0, 100 * BLOCK)], TABLES, CHUNK)


def test_a_range_of_many_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotplan, "_WINDOW_BLOCKS", 3)
    assert plan_hot([(0, 5, 90 * BLOCK)], TABLES, CHUNK).tolist() == plan_hot(
        [(0, 0, BLOCK), (0, BLOCK, 90 * BLOCK)], TABLES, CHUNK).tolist()
