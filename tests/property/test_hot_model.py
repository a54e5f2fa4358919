"""HotMap.find against a dictionary of blocks; hot.bin of random extents comes back, or is refused for a reason."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs import limits
from lazyfs.errors import FormatError
from lazyfs.image.hot import EXTENT, HotMap, pack_hot, parse_hot
from tests.formatkit import CHUNK_SIZE, make_hot

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCKS = [40, 3, 0, 40]
extents = st.lists(st.tuples(st.integers(0, 44), st.integers(0, 4), st.integers(0, 12)), min_size=1, max_size=12)


def blocks_of(given_extents: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
    return [(device, block) for first, device, count in given_extents for block in range(first, first + count)]


def disjoint(given_extents: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Those that do not meet one before."""
    kept: list[tuple[int, int, int]] = []
    seen: set[tuple[int, int]] = set()
    for extent in given_extents:
        blocks = set(blocks_of([extent]))
        if blocks and not blocks & seen and all(d < 4 and b < BLOCKS[d] for d, b in blocks):
            seen |= blocks
            kept.append(extent)
    return kept


@given(extents.map(disjoint).filter(bool), st.integers(0, 4), st.integers(0, 44), st.integers(1, 30))
@settings(max_examples=400, deadline=None)
def test_find_is_a_lookup_of_each_block(hot: list[tuple[int, int, int]], device: int, first: int, count: int) -> None:
    places = {block: place for place, block in enumerate(blocks_of(hot))}
    found = HotMap(np.array(hot, dtype=EXTENT)).find(device, first, count)
    wanted = [places.get((device, block)) for block in range(first, first + count)]
    if None in wanted:
        assert found is None
        return
    assert found is not None
    assert [place for start, length in found for place in range(start, start + length)] == wanted
    assert all(sum(one) != other[0] for one, other in itertools.pairwise(found))


@given(extents)
@settings(max_examples=200, deadline=None)
def test_exactly_what_makes_sense_is_accepted(hot: list[tuple[int, int, int]]) -> None:
    blocks = blocks_of(hot)
    good = bool(blocks) and all(count for _, _, count in hot) and len(set(blocks)) == len(blocks) and all(
        device < 4 and block < BLOCKS[device] for device, block in blocks)
    devices = [bytes([7]) * 45 * limits.BLOCK_SIZE_BYTES] * 5
    part, stored = make_hot(devices, hot, CHUNK_SIZE, hot_index=0)
    data = pack_hot(part)
    try:
        parsed = parse_hot(data, [count * limits.BLOCK_SIZE_BYTES for count in BLOCKS], [stored], 0)
    except FormatError:
        assert not good
        return
    assert good
    assert pack_hot(parsed) == data
