"""The hot part: hot.bin comes back, nothing off is accepted, and a bootstrap carries it only where there is one."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from lazyfs import limits
from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.image.bootstrap import HOT_MEMBER, pack_bootstrap, pack_unpacked, parse_bootstrap
from lazyfs.image.hot import EXTENT, HEAD_BYTES, HotMap, hot_starts, pack_hot, parse_hot
from lazyfs.image.ustar import Member, pack_ustar, parse_ustar
from tests.formatkit import CHUNK_SIZE, make_bootstrap, make_hot

BLOCK = limits.BLOCK_SIZE_BYTES
DEVICES = [bytes(range(256)) * 1024, b"", b"x" * BLOCK, b"\1\2\3\4" * CHUNK_SIZE]     # 64, 0, 1 and 64 blocks
EXTENTS = [(10, 0, 3), (0, 3, 20), (0, 2, 1), (60, 0, 4), (13, 0, 1)]
SIZES = [len(device) for device in DEVICES]
PART, STORED = make_hot(DEVICES, EXTENTS, CHUNK_SIZE, hot_index=3)
BLOBS = [1 << 20, 1 << 20, 1 << 20, STORED]
DATA = pack_hot(PART)
NAMES = ("lazyfs/", "lazyfs/image.json", "lazyfs/tables.bin", HOT_MEMBER, "lazyfs/image.erofs")


def parse(data: bytes) -> object:
    return parse_hot(data, SIZES, BLOBS, 3)


def with_extents(*extents: tuple[int, int, int]) -> bytes:
    """The same rows with other extents."""
    head = struct.pack("<I", len(extents))
    return DATA[:28] + head + DATA[32 : -8 * len(EXTENTS)] + np.array(list(extents), dtype=EXTENT).tobytes()


def test_it_comes_back() -> None:
    part = parse_hot(DATA, SIZES, BLOBS, 3)
    assert pack_hot(part) == DATA
    assert part.digest == PART.digest
    assert part.table.device_size == 29 * BLOCK
    assert (part.table.rows["blob_index"] == 3).all()
    assert part.extents.tolist() == EXTENTS
    assert hot_starts(part.extents).tolist() == [0, 3, 23, 24, 28]


@pytest.mark.parametrize(
    "extents",
    [
        [], [(10, 0, 29)] * 2, [(10, 0, 3), *EXTENTS[1:-1], (12, 0, 1)], [*EXTENTS, (0, 0, 0)],
        [*EXTENTS[:-1], (13, 0, 2)], EXTENTS[:-1], [*EXTENTS[:-1], (0, 4, 1)], [*EXTENTS[:-1], (0, 1, 1)],
        [*EXTENTS[:-1], (64, 0, 1)], [*EXTENTS[:-1], (0xFFFFFFFF, 0, 1)], [*EXTENTS[:3], (61, 0, 4), (13, 0, 1)],
        [*EXTENTS[:-1], (0, 0xFFFF, 1)], [*EXTENTS[:-1], (63, 0, 1)],
    ],
    ids=["none", "far too many", "inside another", "empty", "a block more", "a block fewer", "no such device",
         "in an empty device", "behind its device", "the last block there is", "over the end", "the last device",
         "the end of another"],
)
def test_extents_that_are_off(extents: list[tuple[int, int, int]]) -> None:
    with pytest.raises(FormatError):
        parse(with_extents(*extents))


def test_other_extents_of_as_many_blocks_are_fine() -> None:
    parse(with_extents(*EXTENTS[:-1], (14, 0, 1)))


@pytest.mark.parametrize(
    ("offset", "field", "value"),
    [(0, "8s", b"LAZYBLOB"), (12, "I", 3), (12, "I", CHUNK_SIZE * 2), (16, "Q", 0), (16, "Q", 30 * BLOCK),
     (16, "Q", 29 * BLOCK + 1), (16, "Q", limits.HOT_BYTES_MAX + BLOCK), (24, "I", 0), (24, "I", 0xFFFFFFFF),
     (28, "I", 4), (28, "I", 0xFFFFFFFF), (32, "32s", bytes(32)), (HEAD_BYTES, "Q", STORED), (HEAD_BYTES + 12, "H", 0),
     (HEAD_BYTES + 12, "H", 4), (HEAD_BYTES + 14, "B", 0), (HEAD_BYTES + 16, "B", 0xAA)],
)
def test_fields_that_are_off(offset: int, field: str, value: object) -> None:
    data = bytearray(DATA)
    struct.pack_into(f"<{field}", data, offset, value)
    assert data != DATA
    with pytest.raises(FormatError):
        parse(bytes(data))


@pytest.mark.parametrize("data", [b"", DATA[:HEAD_BYTES - 1], DATA[:HEAD_BYTES], DATA[:-1], DATA + b"\0",
                                  DATA + DATA[-8:]])
def test_another_length(data: bytes) -> None:
    with pytest.raises(FormatError):
        parse(data)


@pytest.mark.parametrize("offset", [8, 10])
def test_another_version_is_unsupported(offset: int) -> None:
    data = bytearray(DATA)
    data[offset] += 1
    with pytest.raises(UnsupportedError):
        parse(bytes(data))


def test_finding_blocks() -> None:
    found = HotMap(PART.extents)
    assert found.find(0, 10, 3) == [(0, 3)]
    assert found.find(0, 11, 1) == [(1, 1)]
    assert found.find(0, 10, 4) == [(0, 3), (28, 1)]
    assert found.find(0, 9, 2) is None
    assert found.find(0, 14, 1) is None
    assert found.find(0, 13, 2) is None
    assert found.find(0, 63, 1) == [(27, 1)]
    assert found.find(0, 63, 2) is None
    assert found.find(1, 0, 1) is None
    assert found.find(2, 0, 1) == [(23, 1)]
    assert found.find(3, 0, 20) == [(3, 20)]
    assert found.find(3, 5, 16) is None
    assert found.find(4, 0, 1) is None


def test_neighbours_in_both_devices_are_one() -> None:
    extents = np.array([(5, 0, 2), (7, 0, 3), (0, 1, 1), (10, 0, 1)], dtype=EXTENT)
    assert HotMap(extents).find(0, 6, 5) == [(1, 4), (6, 1)]


def test_a_bootstrap_carries_it() -> None:
    bootstrap = make_bootstrap(DEVICES, hot=EXTENTS)
    tar = pack_bootstrap(bootstrap)
    parsed = parse_bootstrap(tar)
    assert parsed.hot is not None
    assert bootstrap.hot is not None
    assert pack_hot(parsed.hot) == pack_hot(bootstrap.hot)
    assert pack_bootstrap(parsed) == tar
    members = {member.name: bytes(member.data) for member in parse_ustar(tar, NAMES)}
    assert pack_unpacked(members.get) == tar


def test_a_bootstrap_without_one_has_no_such_member() -> None:
    tar = pack_bootstrap(make_bootstrap(DEVICES))
    names = tuple(name for name in NAMES if name != HOT_MEMBER)
    members = {member.name: bytes(member.data) for member in parse_ustar(tar, names)}
    assert parse_bootstrap(tar).hot is None
    assert pack_unpacked(members.get) == tar


def members_of(tar: bytes) -> list[Member]:
    return list(parse_ustar(tar, NAMES, optional=frozenset({HOT_MEMBER})))


def test_a_hot_part_without_a_hot_blob_and_a_hot_blob_without_one() -> None:
    cold = members_of(pack_bootstrap(make_bootstrap(DEVICES)))
    with pytest.raises(FormatError, match="without a hot blob"):
        parse_bootstrap(pack_ustar([*cold[:3], Member(HOT_MEMBER, DATA), *cold[3:]]))
    hot = members_of(pack_bootstrap(make_bootstrap(DEVICES, hot=EXTENTS)))
    with pytest.raises(FormatError, match="the other way round"):
        parse_bootstrap(pack_ustar([*hot[:3], *hot[4:]]))


def test_a_layer_whose_chunk_is_in_the_hot_blob() -> None:
    bootstrap = make_bootstrap(DEVICES, hot=EXTENTS)
    tar = bytearray(pack_bootstrap(bootstrap))
    row = tar.index(pack_ustar([Member("lazyfs/tables.bin", b"")])[:100]) + 512
    assert tar[row : row + 16] != bytes(16)
    tar[row : row + 2], tar[row + 12 : row + 14] = bytes(2), struct.pack("<H", len(bootstrap.blobs) - 1)
    with pytest.raises(FormatError, match="names the hot blob"):
        parse_bootstrap(bytes(tar))
