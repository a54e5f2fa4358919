"""Layer metadata: round trips of every kind of entry, and refusal of everything that is not exactly right."""

from __future__ import annotations

import msgspec
import pytest
import zstandard

from lazyfs import limits
from lazyfs.errors import FormatError
from lazyfs.image.entries import check_map, is_normal_path, pack_entries, parse_entries
from lazyfs.image.model import Attributes, DataMap, EntryKind, FileType, LayerEntry

XATTRS = ((b"security.capability", b"\0\1"), (b"user.a", b""))
FULL = Attributes(0o7755, 0xFFFF_FFFF, 3, -(1 << 63), 999_999_999, XATTRS)
ENTRIES = [
    LayerEntry(b"", type=FileType.DIRECTORY, attributes=Attributes(0o700)),
    LayerEntry(b"a", attributes=FULL),
    LayerEntry(b"a/\xff..b/.c", size=5000, data=DataMap(13, ((0, 1, 7),))),
    LayerEntry(b"sparse", size=(1 << 40) + 1, data=DataMap(12, ((3, 2, 0), (1 << 28, 1, 2)))),
    LayerEntry(b"hole", size=1 << 62),
    LayerEntry(b"link", type=FileType.SYMLINK, target=b"../\xfe" + b"x" * 4000),
    LayerEntry(b"c", type=FileType.CHARACTER, rdev=(4095, (1 << 20) - 1)),
    LayerEntry(b"b", type=FileType.BLOCK, rdev=(8, 0)),
    LayerEntry(b"p", type=FileType.FIFO),
    LayerEntry(b"s", type=FileType.SOCKET),
    LayerEntry(b"h", EntryKind.HARDLINK, target=b"a/b"),
    LayerEntry(b"w", EntryKind.WHITEOUT),
    LayerEntry(b"", EntryKind.OPAQUE),
]


def frame(value: object) -> bytes:
    raw = value if isinstance(value, bytes) else msgspec.msgpack.encode(value)
    return zstandard.ZstdCompressor().compress(raw)


def node(tag: int, path: bytes, *rest: object, mode: int = 0, xattrs: object = ()) -> list[object]:
    return [tag, path, mode, 0, 0, 0, 0, xattrs, *rest]


def test_every_kind_of_entry_comes_back() -> None:
    data = pack_entries(ENTRIES)
    assert parse_entries(data) == ENTRIES
    assert pack_entries(parse_entries(data)) == data


@pytest.mark.parametrize("count", [0, 1, 15, 16, 65_535, 65_536])
def test_all_forms_of_the_array_header(count: int) -> None:
    entries = [LayerEntry(b"x", EntryKind.WHITEOUT)] * count
    data = pack_entries(entries)
    assert parse_entries(data) == entries
    assert zstandard.ZstdDecompressor().decompress(data) == msgspec.msgpack.encode([[9, b"x"]] * count)


def test_fields_without_a_meaning_are_not_recorded() -> None:
    odd = LayerEntry(b"w", EntryKind.WHITEOUT, FileType.FIFO, FULL, 7, DataMap(13, ()), b"t", (1, 2))
    assert pack_entries([odd]) == pack_entries([LayerEntry(b"w", EntryKind.WHITEOUT)])


@pytest.mark.parametrize(
    "path", [b"a", b"a/b", b"...", b"a/..b", b".a", b"\xff/\n", b"x" * 255, b"", b"/".join([b"y"] * 2048)]
)
def test_normal_paths(path: bytes) -> None:
    assert is_normal_path(path)


@pytest.mark.parametrize(
    "path",
    [b"/", b"/a", b"a/", b"a//b", b".", b"..", b"./a", b"a/.", b"a/..", b"a/../b", b"a/./b", b"a\0b", b"\0", b"x" * 256,
     b"a/" + b"x" * 256 + b"/b", b"/".join([b"yy"] * 1400)],
)
def test_paths_that_are_not_normal(path: bytes) -> None:
    assert not is_normal_path(path)
    with pytest.raises(FormatError):
        parse_entries(frame([[9, path]]))


@pytest.mark.parametrize(
    "value",
    [
        {}, 7, [7], [[]], [[0, b"a"]], [[11, b"a"]], [[9]], [[9, "a"]], [[9, b"a", 1]], [["9", b"a"]],
        b"\xdd\xff\xff\xff\xff",
        [[9, b""]], [[8, b"", b"a"]], [[8, b"a", b"a/"]],
        [node(1, b"a", 0, 12)], [node(1, b"a", -1, 12, [])], [node(1, b"a", 0, 11, [])], [node(1, b"a", 0, 44, [])],
        [node(1, b"", 0, 12, [])], [node(1, b"a", 0, 12, [], mode=0o10000)], [node(1, b"a", 1 << 63, 12, [])],
        [node(1, b"a", 4096, 12, [[0, 1, 0xFFFF_FFFF]])], [node(1, b"a", 4096, 12, [[0, 0, 0]])],
        [node(1, b"a", 4096, 12, [[1, 1, 0]])], [node(1, b"a", 9000, 12, [[0, 2, 0], [1, 1, 5]])],
        [node(1, b"a", 9000, 12, [[2, 1, 0], [0, 1, 5]])], [node(1, b"a", 4096, 12, [[0, 1, 16]])],
        [node(7, b"a", b"")], [node(7, b"a", b"x\0")], [node(7, b"a", b"x" * 4096)], [node(7, b"", b"x")],
        [node(3, b"a", 4096, 0)], [node(4, b"a", 0, 1 << 20)], [node(4, b"a", 0)], [node(5, b"")],
        [node(2, b"a", xattrs=[[b"", b""]])], [node(2, b"a", xattrs=[[b"b", b""], [b"a", b""]])],
        [node(2, b"a", xattrs=[[b"a", b""], [b"a", b""]])], [node(2, b"a", xattrs=[[b"a\0", b""]])],
        [node(2, b"a", xattrs=[[b"a" * 256, b""]])], [node(2, b"a", xattrs=[[b"a", bytes(65_536)]])],
        [node(2, b"a", xattrs=[[b"%d" % n, bytes(60_000)] for n in range(1, 7)])],
        [[2, b"a", 0, 1 << 32, 0, 0, 0, []]], [[2, b"a", 0, 0, 0, 0, 1_000_000_000, []]],
        [[2, b"a", 0, 0, 0, 1 << 63, 0, []]],
    ],
    ids=lambda value: repr(value)[:50],
)
def test_malformed_metadata_is_refused(value: object) -> None:
    with pytest.raises(FormatError):
        parse_entries(frame(value), device_size=16 * 4096)


def test_last_byte_of_the_device_is_usable_and_the_next_is_not() -> None:
    entry = [node(1, b"a", 4097, 13, [[0, 1, 14]])]
    assert parse_entries(frame(entry), device_size=16 * 4096)[0].data.runs == ((0, 1, 14),)
    with pytest.raises(FormatError, match="beyond the layer device"):
        parse_entries(frame(entry), device_size=15 * 4096)


def test_the_last_unit_may_reach_beyond_the_file() -> None:
    assert check_map(DataMap(20, ((0, 1, 3),)), size=1, device_size=4 * 4096) == ""
    assert check_map(DataMap(20, ((0, 1, 4),)), size=1, device_size=4 * 4096) != ""


@pytest.mark.parametrize("data", [b"", b"x", b"\x28\xb5\x2f\xfd", frame([]) + b"x", frame([])[:-1], frame([]) * 2])
def test_not_one_whole_frame(data: bytes) -> None:
    with pytest.raises(FormatError):
        parse_entries(data)


def test_a_bomb_is_not_expanded() -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(256 * limits.MIB))
    assert len(bomb) < 20_000
    with pytest.raises(FormatError, match="claims to expand"):
        parse_entries(bomb)


def test_a_frame_that_lies_about_its_size_is_refused() -> None:
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    with pytest.raises(FormatError, match="claims to expand"):
        parse_entries(compressor.compress(msgspec.msgpack.encode([])))
