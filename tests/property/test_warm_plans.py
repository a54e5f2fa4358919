"""What the kernel is asked to read when a hot chunk has arrived: exactly the files' parts of its blocks."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.image.hot import EXTENT
from lazyfs.image.model import FileType
from lazyfs.node.warmplan import make_warm_plan
from tests.mountkit import BLOCK, sample_tree

SAMPLE = sample_tree()
BLOCKS = len(SAMPLE.data) // BLOCK
CHUNK_BLOCKS = 16    # of 64 KiB


def owners() -> dict[int, tuple[int, int]]:
    """Of each block of the device: (nid, block in that file), the slow way."""
    found = {}
    for _, nid in SAMPLE.tree.walk():
        if SAMPLE.tree.stat(nid).type is FileType.REGULAR:
            position = 0
            for device, offset, length in SAMPLE.tree.extents(nid, 0, SAMPLE.tree.size(nid)):
                if device >= 0:
                    for block in range(-(-length // BLOCK)):
                        found[offset // BLOCK + block] = (nid, position // BLOCK + block)
                position += length
    return found


OWNERS = owners()


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, BLOCKS), min_size=2, max_size=30), st.randoms())
def test_a_plan_names_each_hot_block_of_a_file_once(borders, draw) -> None:
    cuts = sorted(borders)
    runs = [(first, 0, end - first) for first, end in zip(cuts[::2], cuts[1::2], strict=False)]
    draw.shuffle(runs)
    plan = make_warm_plan(np.array(runs, dtype=EXTENT), CHUNK_BLOCKS * BLOCK, SAMPLE.tree)
    hot = [block for first, _, count in runs for block in range(first, first + count)]
    expected = {OWNERS[block]: place // CHUNK_BLOCKS for place, block in enumerate(hot) if block in OWNERS}
    found: dict[tuple[int, int], int] = {}
    for chunk, nid, start, size in zip(plan.chunks, plan.nids, plan.starts, plan.sizes, strict=True):
        for offset in range(start, start + size, BLOCK):
            assert (nid, offset // BLOCK) not in found
            found[nid, offset // BLOCK] = chunk
    assert found == expected
    assert plan.chunks == sorted(plan.chunks)
    assert set(plan.paths) == set(plan.nids)
    for nid, path in plan.paths.items():
        assert nid in {number for name, number in SAMPLE.tree.walk() if name == path}
