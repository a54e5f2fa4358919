"""Prefetch lists: the grammar, and what lines find in a real EROFS image."""

from __future__ import annotations

import numpy as np
import pytest

from converter.overlay import merge
from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.image.codec import Codec
from lazyfs.image.erofs import ErofsImage, write_image
from lazyfs.image.model import DataMap, EntryKind, FileType, LayerEntry
from lazyfs.image.prefetch import (
    PrefetchHeader,
    PrefetchList,
    chunks_of,
    exact_pattern,
    find,
    format_entry,
    format_prefetch,
    grammar,
    literal_path,
    make_entry,
    parse_prefetch,
    wanted_extents,
)
from lazyfs.image.table import ROW, ChunkTable

CHUNK = 1 << 16
BLOCKS = CHUNK // 4096
Found = tuple[list[tuple[int, int]], list[str]]


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


def lookup(text: str | bytes, image: ErofsImage = IMAGE, tables: list[ChunkTable] = TABLES) -> Found:
    """(Chunks in order, each once, and lines that name no file)."""
    unmatched: list[str] = []
    extents = wanted_extents(parse_prefetch(text), image, tables, unmatched)
    return list(dict.fromkeys(chunks_of(extents, tables))), unmatched


def chunks(text: str | bytes) -> list[tuple[int, int]]:
    listed, unmatched = lookup(text)
    assert unmatched == []
    return listed


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


def test_where_the_wanted_bytes_are() -> None:
    unmatched: list[str] = []
    wanted = parse_prefetch("lib/b.so 5-9,7-\nnothing\nsparse 1-70000\nbin/sh 4096-4096\nbin/bash 4096-4096\nempty\n")
    assert list(wanted_extents(wanted, IMAGE, TABLES, unmatched)) == [
        (1, 5, 5), (1, 7, CHUNK - 7), (0, 10 * CHUNK + 1, CHUNK - 1), (0, 4096, 1), (0, 4096, 1)]
    assert unmatched == ["nothing"]


def test_everything_is_every_chunk_once() -> None:
    found = chunks("**")
    assert len(found) == len(set(found))
    assert set(found) == {(0, n) for n in (0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13)} | {(1, 0), (1, 1)}


@pytest.mark.parametrize(
    "line", ["nothing", "lib", "lib/py/**/x", "dangling", "loop", "loop/x", "fifo", "bin/sh/x", "lib/a.so/..x", "*x",
    "usr/*/*/circle/z"]
)
def test_lines_that_name_no_file_are_told(line: str) -> None:
    assert lookup(f"bin/sh\n{line}") == ([(0, 0)], [line])


@pytest.mark.parametrize(
    "text",
    ["a b", "a 5-4", "a -5", "a 1", "a 1-2,", "a 1-2, 3-4", "a 1-99999999999999999999", "a 0x1-2", "a ٣-٤", '"a',
    '"a"b', '"\\q"',
     "a 0-1 share=0", "a 0-1 share=1.1", "a share=-1", "a share=0.5 share=0.5", "a ms=", "a ms=1e3", "a ms=1.2345",
     "a colour=1", "a share", "a share=0.5 0-1", "a ms=٣",
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
    listed, unmatched = lookup(line, image)
    assert unmatched == []
    assert set(listed) <= {(0, 0)}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a", ((), 1.0, None)), ("a share=0.67", ((), 0.67, None)), ("a ms=12", ((), 1.0, 12.0)),
        ("a 0-9,20- \t share=0.5  ms=0.125", (((0, 10), (20, None)), 0.5, 0.125)),
        ('"a" 0-0 ms=7 share=1', (((0, 1),), 1.0, 7.0)), ("a=b 0-0", (((0, 1),), 1.0, None)),
    ],
)  # fmt: skip
def test_attributes(line: str, expected: tuple[object, ...]) -> None:
    (entry,) = parse_prefetch(line).entries
    assert (entry.ranges, entry.share, entry.first_ms) == expected


def test_header() -> None:
    text = "# lazyfs-prefetch 1\n# image: a/b:c@sha256:12\n# mine\n#tool:lazyfs 1\n# runs: 3\n\n# made: too late\na\n"
    assert parse_prefetch(text).header == PrefetchHeader("a/b:c@sha256:12", "lazyfs 1", 3)
    assert parse_prefetch(text.partition("\n")[2]).header == PrefetchHeader()     # only behind the version
    assert [entry.line for entry in parse_prefetch(text).entries] == ["a"]


@pytest.mark.parametrize("line", ["runs: 0", "runs: 1000001", "runs: x", "runs: ٣", "image: a\n# image: b",
    "image: \x07", "made: " + "x" * 5000])
def test_malformed_headers_are_refused(line: str) -> None:
    with pytest.raises(FormatError, match=r"line [23]"):
        parse_prefetch(f"# lazyfs-prefetch 1\n# {line}\na\n")


def test_lists_come_back() -> None:
    made = PrefetchList((make_entry(b"a/b", [(0, 5), (7, None)], 2 / 3, 1.23456), make_entry(b"**/x[*]?", share=1.0),
                         make_entry(exact_pattern(b"a b*[\xff"), first_ms=0), make_entry(b"a #*", [(3, 4)], 1e-9)),
                        PrefetchHeader("i@sha256:0", "lazyfs 1", 3, "by hand"))
    text = format_prefetch(made)
    assert text.splitlines()[5:] == ["a/b 0-4,7- share=0.666667 ms=1.235", "**/x[*]?", '"a b\\*\\[\\xff" ms=0',
                                     '"a #*" 3-3 share=0.000001']
    again = parse_prefetch(text)
    assert again == made
    assert format_prefetch(again) == text
    assert format_prefetch(PrefetchList(())) == "# lazyfs-prefetch 1\n"


@pytest.mark.parametrize("path", [b"a", b"*", b"a[b]c", b"?/[[]/*]", b"[*]"])
def test_exact_patterns_lead_back(path: bytes) -> None:
    assert literal_path(exact_pattern(path)) == path
    assert parse_prefetch(format_entry(path)).entries[0].pattern == exact_pattern(path)


def test_globs_are_no_paths() -> None:
    assert [literal_path(pattern) for pattern in (b"a*", b"a/**", b"[*]?", b"[ab]", b"[[][")] == [None] * 5


def test_a_path_of_escapes_may_be_as_long_as_a_path() -> None:
    path = b"/".join([b"*" * 255] * 16)
    assert parse_prefetch(format_entry(path)).entries[0].pattern == exact_pattern(path)


def test_lines_and_ranges_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "ENTRY_COUNT_MAX", 5)
    monkeypatch.setattr(grammar, "LINE_COUNT_MAX", 8)
    monkeypatch.setattr(grammar, "RANGE_COUNT_MAX", 10)
    assert len(parse_prefetch("a\n" * 5).entries) == 5
    assert len(parse_prefetch("a " + ",".join(["0-"] * 10)).entries[0].ranges) == 10
    for text in ("a\n" * 6, "#\n" * 9, "a 0-\nb " + ",".join(["0-"] * 10)):
        with pytest.raises(FormatError, match="more than"):
            parse_prefetch(text)


def test_huge_files_named_again_and_again_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "_STEPS_MAX", 10_000)
    assert len(chunks("lib/a.so\n" * 100)) == 4
    with pytest.raises(FormatError, match="too many files and chunks"):
        chunks("lib/a.so 0-,0-,0-\n" * 100)
    with pytest.raises(FormatError, match="too many files and chunks"):
        chunks("** " + ",".join(["9999999-"] * 400))      # behind every file's end


def test_many_wild_globs_end() -> None:
    entries = [file(b"a/" * depth + b"f", 0) for depth in range(60)]
    sizes = [CHUNK]
    image = ErofsImage.parse(write_image(merge([entries], names=["x"]), sizes), sizes)
    table = ChunkTable(CHUNK, CHUNK, np.ones(1, dtype=ROW))
    assert len(lookup("/".join(["**", "a"] * 20 + ["nothing"]), image, [table])[1]) == 1
    name = b"x" * 255
    star = ErofsImage.parse(write_image(merge([[file(name, 0)]], names=["x"]), sizes), sizes)
    assert len(lookup("*x" * 100 + "y", star, [table])[1]) == 1
