"""Prefetch lists: the grammar, and what lines find in a real EROFS image."""

from __future__ import annotations

import numpy as np
import pytest

from converter.overlay import merge
from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.image.codec import Codec
from lazyfs.image.erofs import ErofsImage, write_image
from lazyfs.image.model import DataMap, EntryKind, FileType, LayerEntry
from lazyfs.image.prefetch import format_entry, parse_prefetch, resolve
from lazyfs.image.table import ROW, ChunkTable

CHUNK = 1 << 16
BLOCKS = CHUNK // 4096


def file(path: bytes, first_chunk: int, chunks: int = 1, *, holes: tuple[int, ...] = ()) -> LayerEntry:
    """A file whose chunk n is chunk first_chunk + n of its device, but for holes."""
    runs = tuple((n, 1, (first_chunk + n) * BLOCKS) for n in range(chunks) if n not in holes)
    return LayerEntry(path, size=chunks * CHUNK, data=DataMap(16, runs))


def link(path: bytes, target: bytes) -> LayerEntry:
    return LayerEntry(path, type=FileType.SYMLINK, target=target)


LOWER = [
    file(b"bin/sh", 0), file(b"lib/a.so", 1, 4), file(b"lib/b.so", 5), file(b"lib/py/m.py", 6),
    file(b"lib/py/sub/n.py", 7), file(b"lib/py/sub/deep/o.py", 8), file(b"odd name\xff*", 9),
    file(b"sparse", 10, 3, holes=(1,)),
    LayerEntry(b"empty"), LayerEntry(b"bin/bash", EntryKind.HARDLINK, target=b"bin/sh"), link(b"usr", b"/"),
    link(b"lib64", b"lib"), link(b"lib/circle", b".."), link(b"lib/latest.so", b"../../lib64/./a.so"),
    link(b"dangling", b"nowhere"), link(b"loop", b"loop"), LayerEntry(b"fifo", type=FileType.FIFO),
    file(b"zeros", 13, 2),
]
UPPER = [file(b"lib/b.so", 0), file(b"-", 1)]
ROOT = merge([LOWER, UPPER], names=["lower", "upper"])
SIZES = [15 * CHUNK, 2 * CHUNK]
IMAGE = ErofsImage.parse(write_image(ROOT, SIZES), SIZES)
TABLES = [ChunkTable(CHUNK, size, np.zeros(size // CHUNK, dtype=ROW)) for size in SIZES]
for table in TABLES:
    table.rows["codec"] = Codec.NONE
TABLES[0].rows["codec"][14] = Codec.ZERO


def chunks(text: str | bytes) -> list[tuple[int, int]]:
    plan = resolve(parse_prefetch(text), IMAGE, TABLES)
    assert plan.unmatched == []
    return plan.chunks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bin/sh", [(0, 0)]), ("/bin/sh", [(0, 0)]), ("./bin//sh", [(0, 0)]), ("bin/bash\nbin/sh", [(0, 0)]),
        ("lib/b.so\nbin/sh", [(1, 0), (0, 0)]), ("lib/a.so 0-0", [(0, 1)]), ("lib/a.so 65535-65536", [(0, 1), (0, 2)]),
        ("lib/a.so\t196608-,0-1", [(0, 4), (0, 1)]), ("lib/a.so 262144-", []), ("lib/a.so 0-99999999999999",
        [(0, n) for n in (1, 2, 3, 4)]),
        ("sparse", [(0, 10), (0, 12)]), ("sparse 65536-131071", []), ("empty", []), ("zeros", [(0, 13)]),
        ("usr/bin/sh", [(0, 0)]), ("lib64/b.so", [(1, 0)]), ("lib/latest.so 0-0", [(0, 1)]),
        ("usr/usr/lib64/circle/bin/sh", [(0, 0)]),
        ("lib/py/*.py", [(0, 6)]), ("lib/**/*.py", [(0, 6), (0, 7), (0, 8)]), ("**/n.py", [(0, 7)]),
        ("lib/py/**", [(0, 6), (0, 7), (0, 8)]), ("lib/*/*/n.py", [(0, 7)]), ("lib/py/**/**/sub/**/o.py", [(0, 8)]),
        ("lib/[ab].so 0-0", [(0, 1), (1, 0)]), ("lib/[!a].so", [(1, 0)]), ("lib/?.so 0-0", [(0, 1), (1, 0)]),
        ("lib*/b.so", [(1, 0)]),
        ('"odd name\\xff\\*"', [(0, 9)]), ('"odd name\\377*"  0-', [(0, 9)]), ('"bin/sh"', [(0, 0)]), ("-", [(1, 1)]),
        ("# lazyfs-prefetch 1\r\n\r\n  # comment\r\n bin/sh \r\n", [(0, 0)]), ("", []), ("#", []),
    ],
)  # fmt: skip
def test_what_lines_name(text: str, expected: list[tuple[int, int]]) -> None:
    assert chunks(text) == expected
    assert chunks(text.encode()) == expected


def test_everything_is_every_chunk_once() -> None:
    found = chunks("**")
    assert len(found) == len(set(found))
    assert set(found) == {(0, n) for n in (0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13)} | {(1, 0), (1, 1)}


@pytest.mark.parametrize(
    "line", ["nothing", "lib", "lib/py/**/x", "dangling", "loop", "loop/x", "fifo", "bin/sh/x", "lib/a.so/..x", "*x",
    "usr/*/*/circle/z"]
)
def test_lines_that_name_no_file_are_told(line: str) -> None:
    plan = resolve(parse_prefetch(f"bin/sh\n{line}"), IMAGE, TABLES)
    assert (plan.chunks, plan.unmatched) == ([(0, 0)], [line])


@pytest.mark.parametrize(
    "text",
    ["a b", "a 5-4", "a -5", "a 1", "a 1-2,", "a 1-2, 3-4", "a 1-99999999999999999999", "a 0x1-2", "a ٣-٤", '"a',
    '"a"b', '"\\q"',
     '"\\xg0"', '"\\x1"', '"\\400"', "a\\b", 'a"b', "..", "a/../b", "/", ".", '"a\\0b"', "x" * 5000, b"\xff", '"a" b'],
)
def test_malformed_lines_are_refused_with_their_number(text: str | bytes) -> None:
    with pytest.raises(FormatError) as caught:
        parse_prefetch(b"# x\n" + text if isinstance(text, bytes) else f"# x\n{text}")
    assert "line 2" in str(caught.value) or "UTF-8 at byte 4" in str(caught.value)


def test_versions() -> None:
    with pytest.raises(UnsupportedError):
        parse_prefetch("# lazyfs-prefetch 2\n")
    assert parse_prefetch("\n# lazyfs-prefetch 2\n").entries == ()


@pytest.mark.parametrize("path", [b"bin/sh", b"odd name\xff*", b"#x", b'"', b"a\\b", b"[a]?", b" ", b"\n",
    b"\x7f\xc3\xa9", b"a\tb"])
@pytest.mark.parametrize("ranges", [(), ((0, 10),), ((5, None), (0, 1))])
def test_formatted_entries_name_exactly_their_file(path: bytes, ranges: tuple[tuple[int, int | None], ...]) -> None:
    line = format_entry(path, ranges)
    (entry,) = parse_prefetch(line).entries
    assert entry.ranges == ranges
    root = merge([[file(path, 0), file(b"other", 1)]], names=["x"])
    image = ErofsImage.parse(write_image(root, SIZES), SIZES)
    plan = resolve(parse_prefetch(line), image, TABLES)
    assert plan.unmatched == []
    assert set(plan.chunks) <= {(0, 0)}


def test_many_wild_globs_end() -> None:
    entries = [file(b"a/" * depth + b"f", 0) for depth in range(60)]
    sizes = [CHUNK]
    image = ErofsImage.parse(write_image(merge([entries], names=["x"]), sizes), sizes)
    table = ChunkTable(CHUNK, CHUNK, np.ones(1, dtype=ROW))
    plan = resolve(parse_prefetch("/".join(["**", "a"] * 20 + ["nothing"])), image, [table])
    assert len(plan.unmatched) == 1
    name = b"x" * 255
    star = ErofsImage.parse(write_image(merge([[file(name, 0)]], names=["x"]), sizes), sizes)
    assert len(resolve(parse_prefetch("*x" * 100 + "y"), star, [table]).unmatched) == 1
