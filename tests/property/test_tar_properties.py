"""Whatever the builder writes, in whatever style and however the stream cuts it, the reader tells the same."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from converter.tar import TarReader
from lazyfs.errors import FormatError
from lazyfs.image.model import EntryKind, FileType
from tests.tarbuilder import TarBuilder

NAMES = st.one_of(
    st.binary(min_size=1, max_size=12), st.sampled_from([b"a", b"b", b"x" * 100, b"y" * 255, b"\xff", b"...", b" "])
).map(lambda name: name.replace(b"/", b"_").replace(b"\0", b"0")).filter(
    lambda name: name not in {b".", b".."} and not name.startswith(b".wh."))
PATHS = st.lists(NAMES, min_size=1, max_size=6).map(b"/".join)
SPELLINGS = st.sampled_from([b"", b"./", b"/", b".//./", b"//"])
XATTR_NAMES = st.sampled_from([b"user.a", b"user.b", b"trusted.t", b"security.capability", b"user.\xff"])
KINDS = st.sampled_from(["file", "directory", "symlink", "hardlink", "c", "b", "fifo", "whiteout", "opaque", "sparse"])


@dataclass
class Wanted:
    kind: str
    path: bytes
    data: bytes
    target: bytes
    sparse: tuple[str, int, list[tuple[int, bytes]]]
    attributes: dict[str, Any] = field(default_factory=dict)


@st.composite
def sparse_files(draw: st.DrawFn) -> tuple[str, int, list[tuple[int, bytes]]]:
    """(format, size, segments that do not touch)."""
    position, segments = 0, []
    for _ in range(draw(st.integers(0, 30))):
        position += draw(st.integers(1, 1 << 34))
        data = draw(st.binary(min_size=1, max_size=600))
        segments.append((position, data))
        position += len(data)
    return draw(st.sampled_from(["S", "0.0", "0.1", "1.0"])), position + draw(st.integers(0, 1 << 40)), segments


@st.composite
def entries(draw: st.DrawFn) -> Wanted:
    ids = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 0o7777777, 0o10000000, 2**32 - 1]))
    ends = st.sampled_from([0, 8**11 - 1, 8**11, -1, -(2**63) + 1, 2**63 - 1])
    seconds = st.one_of(st.integers(-(2**40), 2**40), ends)
    attributes = {
        "mode": draw(st.integers(0, 0o7777)), "uid": draw(ids), "gid": draw(ids),
        "mtime": (draw(seconds), draw(st.sampled_from([0, 0, 1, 500_000_000, 999_999_999]))),
        "xattrs": draw(st.dictionaries(XATTR_NAMES, st.binary(max_size=100), max_size=3)),
    }
    return Wanted(draw(KINDS), draw(PATHS), draw(st.binary(max_size=1500)),
                  draw(st.binary(min_size=1, max_size=300).map(lambda text: text.replace(b"\0", b"0"))),
                  draw(sparse_files()), attributes)


def add(builder: TarBuilder, wanted: Wanted, spelling: bytes) -> None:
    path, attributes = spelling + wanted.path, wanted.attributes
    if wanted.kind == "file":
        builder.file(path, wanted.data, **attributes)
    elif wanted.kind == "symlink":
        builder.symlink(path, wanted.target, **attributes)
    elif wanted.kind == "hardlink":
        builder.hardlink(path, spelling + b"t/" + wanted.path, **attributes)
    elif wanted.kind in {"c", "b"}:
        builder.device(path, wanted.kind, len(wanted.data), len(wanted.target), **attributes)
    elif wanted.kind == "sparse":
        form, size, segments = wanted.sparse
        wanted.path = path = b"sparse"     # the builder puts no long names before these
        attributes["xattrs"] = {}
        attributes["mtime"] = (abs(attributes["mtime"][0]) % 8**11, 0)
        fields = {key: attributes[key] for key in ("mode", "uid", "gid")} | {"mtime": attributes["mtime"][0]}
        if form == "S":
            builder.sparse_gnu(path, size, segments, **fields)
        else:
            builder.sparse_pax(form, path, size, segments, **fields)
    else:
        getattr(builder, wanted.kind)(path, **({} if wanted.kind in {"whiteout", "opaque"} else attributes))


def check(wanted: Wanted, entry: Any, data: bytes, segments: Any, style: str) -> None:
    special = {"hardlink": EntryKind.HARDLINK, "whiteout": EntryKind.WHITEOUT, "opaque": EntryKind.OPAQUE}
    types = {"file": FileType.REGULAR, "sparse": FileType.REGULAR, "directory": FileType.DIRECTORY, "b": FileType.BLOCK,
             "symlink": FileType.SYMLINK, "c": FileType.CHARACTER, "fifo": FileType.FIFO}
    assert (entry.path, entry.kind) == (wanted.path, special.get(wanted.kind, EntryKind.NODE))
    if wanted.kind == "hardlink":
        assert entry.target == b"t/" + wanted.path
    if wanted.kind in special:
        return
    found = entry.attributes
    assert entry.type is types[wanted.kind]
    mode = 0o777 if wanted.kind == "symlink" else wanted.attributes["mode"]       # Linux has no other
    assert (found.mode, found.uid, found.gid) == (mode, wanted.attributes["uid"], wanted.attributes["gid"])
    assert (found.mtime_s, found.mtime_ns) == wanted.attributes["mtime"]
    xattrs = sorted(wanted.attributes["xattrs"].items())
    if wanted.kind not in {"file", "sparse", "directory"}:
        xattrs = [(name, value) for name, value in xattrs if not name.startswith(b"user.")]
    assert found.xattrs == tuple(xattrs)
    if wanted.kind == "file":
        assert (entry.size, data, segments) == (len(wanted.data), wanted.data, ((0, len(data)),) if data else ())
    elif wanted.kind == "sparse":
        assert entry.size == wanted.sparse[1]
        assert segments == tuple((offset, len(piece)) for offset, piece in wanted.sparse[2])
        assert data == b"".join(piece for _, piece in wanted.sparse[2])
    elif wanted.kind == "symlink":
        assert entry.target == wanted.target
    elif wanted.kind in {"c", "b"}:
        assert entry.rdev == (len(wanted.data), len(wanted.target))
    if wanted.kind not in {"file", "sparse"}:
        assert (segments, data, entry.size) == ((), b"", 0)


class Cut:
    """A stream that gives at most `step` bytes at once."""

    def __init__(self, data: bytes, step: int) -> None:
        self._stream = io.BytesIO(data)
        self._step = step

    def read(self, size: int, /) -> bytes:
        return self._stream.read(min(size, self._step))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(entries(), SPELLINGS), max_size=8), st.sampled_from(["pax", "gnu"]),
       st.sampled_from([1, 100, 512, 1000, 1 << 20]), st.sampled_from([1, 77, 1 << 20]))
def test_what_is_written_is_read(chosen: list[tuple[Wanted, bytes]], style: str, step: int, piece: int) -> None:
    builder = TarBuilder(style)
    for wanted, spelling in chosen:
        add(builder, wanted, spelling)
    reader = TarReader(Cut(builder.build(), step), name="layer")
    count = 0
    for (wanted, _), member in zip(chosen, reader, strict=True):
        data = b""
        while part := reader.read_data(piece):
            assert len(part) <= piece
            data += part
        check(wanted, member.entry, data, member.segments, style)
        count += 1
    assert count == len(chosen)
    assert set(reader.dropped) <= {"xattr of another file type"}


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=300), st.sampled_from(["path", "linkpath", "mtime", "size", "uid", "SCHILY.xattr.user.x",
                                                "LIBARCHIVE.xattr.user.x", "GNU.sparse.map", "GNU.sparse.size"]))
def test_any_record_is_taken_or_refused(value: bytes, key: str) -> None:
    archive = TarBuilder().pax([(key, value)]).member("x").build()
    try:
        for member in TarReader(io.BytesIO(archive), name="layer"):
            assert not member.entry.path.startswith(b"/")
            assert b".." not in member.entry.path.split(b"/")
            assert b"\0" not in member.entry.path
    except FormatError:
        pass
