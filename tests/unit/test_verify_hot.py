"""HotSums: a hot device that holds what the layers hold is found right, one that does not block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from converter.verifyhot import HotSums
from lazyfs import limits
from lazyfs.image.codec import Codec
from tests.formatkit import CHUNK_SIZE, make_hot, make_table

if TYPE_CHECKING:
    from lazyfs.image.table import ChunkTable

BLOCK = limits.BLOCK_SIZE_BYTES
RANDOM = np.random.default_rng(1)
# Chunks of 16 blocks: two of noise, one of zeros, one short; and a device with the first chunk of that one again.
LOWER = RANDOM.bytes(2 * CHUNK_SIZE) + bytes(CHUNK_SIZE) + RANDOM.bytes(3 * BLOCK)
DEVICES = [LOWER, LOWER[:CHUNK_SIZE]]
EXTENTS = [(10, 0, 12), (50, 0, 1), (0, 1, 2), (40, 0, 2), (0, 0, 9)]      # over a border, the end, twins, zeros


def wrong_blocks(stored: list[bytes], layers: list[bytes]) -> tuple[int, int]:
    """(of stored chunks, of zeros) when the hot device was made of `stored`, and the layers are `layers`."""
    part, _ = make_hot(stored, EXTENTS, CHUNK_SIZE, hot_index=2)
    tables = [make_table(device, CHUNK_SIZE, Codec.ZSTD, index)[0] for index, device in enumerate(layers)]
    sums = HotSums(part, tables)
    content = b"".join(stored[device][first * BLOCK : (first + count) * BLOCK] for first, device, count in EXTENTS)
    for digest, data in chunks(part.table, content):
        sums.take(digest, data)
    distinct = dict(one for device, table in zip(layers, tables, strict=True) for one in chunks(table, device))
    return sum(sums.compare(digest, data) for digest, data in distinct.items()), sums.compare_zeros()


def chunks(table: ChunkTable, device: bytes) -> list[tuple[bytes, bytes]]:
    """The stored ones."""
    return [(bytes(row["digest"]), device[at * CHUNK_SIZE : (at + 1) * CHUNK_SIZE])
            for at, row in enumerate(table.rows) if row["codec"] != Codec.ZERO]


def with_byte(device: bytes, block: int) -> bytes:
    changed = bytearray(device)
    changed[block * BLOCK + 77] ^= 1
    return bytes(changed)


def test_the_same() -> None:
    assert wrong_blocks(DEVICES, DEVICES) == (0, 0)


@pytest.mark.parametrize(("block", "found"), [(10, (1, 0)), (15, (1, 0)), (16, (1, 0)), (21, (1, 0)), (22, (0, 0)),
                                              (50, (1, 0)), (40, (0, 1)), (41, (0, 1)), (42, (0, 0)), (8, (1, 0)),
                                              (9, (0, 0))])
def test_one_block_is_another(block: int, found: tuple[int, int]) -> None:
    assert wrong_blocks([with_byte(LOWER, block), DEVICES[1]], DEVICES) == found


def test_a_hot_chunk_that_could_not_be_read_is_not_compared() -> None:
    part, _ = make_hot(DEVICES, EXTENTS, CHUNK_SIZE, hot_index=2)
    tables = [make_table(device, CHUNK_SIZE, Codec.ZSTD, index)[0] for index, device in enumerate(DEVICES)]
    sums = HotSums(part, tables)
    assert [sums.compare(digest, data) for digest, data in chunks(tables[0], LOWER)] == [0, 0, 0]


def test_a_hot_chunk_of_zeros_is_known_without_being_read() -> None:
    part, _ = make_hot([bytes(len(LOWER)), DEVICES[1]], [(0, 0, 16)], CHUNK_SIZE, hot_index=2)
    assert part.table.rows["codec"].tolist() == [Codec.ZERO]
    tables = [make_table(device, CHUNK_SIZE, Codec.ZSTD, index)[0] for index, device in enumerate(DEVICES)]
    sums = HotSums(part, tables)
    digest, data = chunks(tables[0], LOWER)[0]
    assert [sums.compare(digest, data), sums.compare(digest, data)] == [16, 0]     # told once
