"""The tar reader on honest archives: everything POSIX, GNU and V7 tars can say, told right."""

from __future__ import annotations

import base64
import io

import pytest

from converter.tar import TarMember, TarReader
from lazyfs.image.model import EntryKind, FileType
from tests.tarbuilder import TarBuilder, base256, header, pad, pax_record

STYLES = ["pax", "gnu"]


def walk(archive: bytes, step: int = 0) -> list[tuple[TarMember, bytes]]:
    """All members with their stored data; `step`: the stream gives at most so many bytes at once."""
    stream = io.BytesIO(archive)
    if step:
        whole = stream.read
        stream.read = lambda size=-1: whole(min(size, step))  # type: ignore[method-assign,misc]
    reader = TarReader(stream, name="layer")
    found = []
    for member in reader:
        data = b""
        while piece := reader.read_data(1000):
            data += piece
        found.append((member, data))
    return found


def one(builder: TarBuilder) -> tuple[TarMember, bytes]:
    (found,) = walk(builder.build())
    return found


@pytest.mark.parametrize("step", [0, 1, 511, 512, 513, 4096])
@pytest.mark.parametrize("style", STYLES)
def test_every_kind_of_member(style: str, step: int) -> None:
    archive = (
        TarBuilder(style).directory("./").directory("etc", mode=0o1777, uid=5, gid=6, mtime=99)
        .file("etc/a", b"x" * 1025, mode=0o4755).symlink("s", "/etc/a").hardlink("./h", "/etc//a")
        .device("c", "c", 0xFFF, 0xFFFFF).device("b", "b", 8, 1).fifo("f").file("empty")
        .file("/abs//x/./y", b"1").build()
    )
    members = walk(archive, step)
    entries = [member.entry for member, _ in members]
    assert [entry.path for entry in entries] == [
        b"", b"etc", b"etc/a", b"s", b"h", b"c", b"b", b"f", b"empty", b"abs/x/y"]
    assert [entry.type for entry in entries if entry.kind is EntryKind.NODE] == [
        FileType.DIRECTORY, FileType.DIRECTORY, FileType.REGULAR, FileType.SYMLINK, FileType.CHARACTER, FileType.BLOCK,
        FileType.FIFO, FileType.REGULAR, FileType.REGULAR]
    etc = entries[1].attributes
    assert (etc.mode, etc.uid, etc.gid, etc.mtime_s, etc.mtime_ns) == (0o1777, 5, 6, 99, 0)
    assert members[2][1] == b"x" * 1025
    assert members[2][0].segments == ((0, 1025),)
    assert (entries[2].size, entries[2].attributes.mode) == (1025, 0o4755)
    assert entries[3].target == b"/etc/a"
    assert (entries[4].kind, entries[4].target) == (EntryKind.HARDLINK, b"etc/a")
    assert [entries[5].rdev, entries[6].rdev] == [(0xFFF, 0xFFFFF), (8, 1)]
    assert (members[8][0].segments, members[8][1]) == ((), b"")


@pytest.mark.parametrize("style", STYLES)
def test_names_of_all_lengths(style: str) -> None:
    names = [b"n" * length for length in (1, 99, 100, 101, 154, 155, 156, 255)]
    names += [b"d/" * depth + b"\xff\xfe e" for depth in (49, 50, 77, 78, 79, 2045)]
    names += [b"p" * 155 + b"/" + b"n" * 100, b"p" * 200 + b"/" + b"n" * 200]
    builder = TarBuilder(style)
    for name in names:
        builder.symlink(name, b"/" + name)
    found = [(member.entry.path, member.entry.target) for member, _ in walk(builder.build())]
    assert found == [(name, b"/" + name) for name in names]


def test_numbers_at_their_ends() -> None:
    big = {"uid": 2**32 - 1, "gid": 2**32 - 1}
    for style, mtime in [("gnu", -(2**63)), ("gnu", 2**63 - 1), ("pax", 2**63 - 1), ("pax", -1), ("pax", 2**33)]:
        found = one(TarBuilder(style).file("x", mtime=mtime, **big))[0].entry.attributes
        assert (found.uid, found.gid, found.mtime_s, found.mtime_ns) == (2**32 - 1, 2**32 - 1, mtime, 0)


@pytest.mark.parametrize(("text", "expected"), [
    ("0", (0, 0)), ("1.5", (1, 500_000_000)), ("-1.5", (-2, 500_000_000)), ("-0.000000001", (-1, 999_999_999)),
    ("12.", (12, 0)), ("7.1234567899", (7, 123_456_789)), ("-3", (-3, 0)), ("8589934592.000000001", (2**33, 1)),
])
def test_pax_times(text: str, expected: tuple[int, int]) -> None:
    found = one(TarBuilder().pax({"mtime": text}).member("x"))[0].entry.attributes
    assert (found.mtime_s, found.mtime_ns) == expected


def test_pax_overrides_and_takes_back() -> None:
    records = [("path", "a"), ("path", "b"), ("uid", "7"), ("uid", ""), ("size", "3"), ("gid", "9"), ("mtime", "5"),
               ("atime", "1"), ("comment", "c"), ("uname", "u"), ("hdrcharset", "BINARY"), ("VENDOR.x", "y")]
    member, data = one(TarBuilder().pax(records).member("plain", b"abc", size=0o777, uid=3, gid=4))
    assert (member.entry.path, member.entry.attributes.uid, member.entry.attributes.gid) == (b"b", 3, 9)
    assert (member.entry.size, data, member.entry.attributes.mtime_s) == (3, b"abc", 5)


def test_pax_device_numbers_and_solaris_header() -> None:
    builder = TarBuilder().pax({"SCHILY.devmajor": "300", "SCHILY.devminor": "70000"}, type="X").member("n", type="3")
    assert one(builder)[0].entry.rdev == (300, 70000)


def test_xattrs() -> None:
    value = b"\0\n=\xff"
    capability = b"\1\0\0\2" + bytes(16)
    acl = b"\2\0\0\0" + bytes(24)
    xattrs = {"user.k": value, "security.capability": capability, "user.a=b": b"", "trusted.x": b"1",
              "system.posix_acl_access": acl}
    # A PAX key ends at its first "=": such a name cannot be said that way.
    del xattrs["user.a=b"]
    xattrs["user.empty"] = b""
    more = [("LIBARCHIVE.xattr.user.%c3%A9%3D", base64.b64encode(b"zz").rstrip(b"=")), ("SCHILY.xattr.user.k", value)]
    found = one(TarBuilder().file("x", xattrs=xattrs, pax=more))[0].entry.attributes.xattrs
    expected = {key.encode(): data for key, data in xattrs.items()} | {b"user.\xc3\xa9=": b"zz"}
    assert found == tuple(sorted(expected.items()))


def test_dropped_xattrs_are_counted() -> None:
    names = ["trusted.overlay.opaque", "user.overlay.x", "system.nfs4_acl", "odd", "user.ok"]
    xattrs = dict.fromkeys(names, b"1")
    archive = TarBuilder().file("x", xattrs=xattrs, pax={"SCHILY.acl.access": "user::rwx"}).build()
    reader = TarReader(io.BytesIO(archive), name="layer")
    (member,) = reader
    assert member.entry.attributes.xattrs == ((b"user.ok", b"1"),)
    assert reader.dropped == {"overlay xattr": 2, "xattr namespace": 2, "text label": 1}
    assert len(reader.warnings) == 5
    assert "layer: entry b'x'" in reader.warnings[0]


def test_whiteouts() -> None:
    builder = (
        TarBuilder().whiteout("gone").whiteout("d/gone").opaque("").opaque("d/e").file("a/x.wh.y").file(".wh", b"z")
        .member("d/.wh.dir/", type="5").member(".wh.link", type="1", linkname=".wh..wh.aufs")
        .file(".wh..wh.aufs").directory(".wh..wh.plnk").file(".wh..wh.plnk/1.2", b"data").file("d/.wh..wh.orph", b"x")
        .file("end", b"e")
    )
    reader = TarReader(io.BytesIO(builder.build()), name="layer")
    found = [(member.entry.kind.name, member.entry.path) for member in reader]
    assert found == [
        ("WHITEOUT", b"gone"), ("WHITEOUT", b"d/gone"), ("OPAQUE", b""), ("OPAQUE", b"d/e"), ("NODE", b"a/x.wh.y"),
        ("NODE", b".wh"), ("WHITEOUT", b"d/dir"), ("WHITEOUT", b"link"), ("NODE", b"end")]
    assert reader.dropped == {"AUFS metadata": 4}


def test_whiteout_of_the_longest_name() -> None:
    """Its marker is longer than a name may be: nobody needs to make a file of it."""
    entry = one(TarBuilder().whiteout("d/" + "n" * 255))[0].entry
    assert (entry.kind, entry.path) == (EntryKind.WHITEOUT, b"d/" + b"n" * 255)


def test_old_formats() -> None:
    v7 = header("d/", type="\0", magic=b"") + header("f", type="\0", magic=b"", size=3) + pad(b"abc")
    contiguous = header("c", type="7", size=1) + pad(b"c")
    star = header("n", prefix="p", tail=b"p".ljust(163, b"\0") + b"tar\0")
    gnu_times = header("g", magic=b"ustar  \0", tail=b"00000000017\0" + b"00000000017\0")
    old_go = header("n", magic=b"ustar  \0", tail=b"some/prefix", size=base256(1, 12)) + pad(b"1")
    signed = header(b"\xe9\xe8", signed_sum=True)
    slash = header("notdir/", type="0")
    found = [member.entry for member, _ in walk(v7 + contiguous + star + gnu_times + old_go + signed + slash)]
    assert [(entry.path, entry.type.name) for entry in found] == [
        (b"d", "DIRECTORY"), (b"f", "REGULAR"), (b"c", "REGULAR"), (b"p/n", "REGULAR"), (b"g", "REGULAR"),
        (b"some/prefix/n", "REGULAR"), (b"\xe9\xe8", "REGULAR"), (b"notdir", "REGULAR")]


def test_fields_with_spaces_and_type_bits() -> None:
    block = header("x", mode=b"100644 \0", uid=b"   12 \0", gid=b"", mtime=b"          7 ")
    found = walk(block)[0][0].entry.attributes
    assert (found.mode, found.uid, found.gid, found.mtime_s) == (0o644, 0o12, 0, 7)


SEGMENTS = [(0, b"a" * 10), (4096, b"b" * 600), (10_000, b"c"), (20_000, b"d" * 513)] + [
    (30_000 + 100 * i, b"e" * 7) for i in range(50)]


@pytest.mark.parametrize("step", [0, 100])
@pytest.mark.parametrize("form", ["S", "0.0", "0.1", "1.0"])
def test_sparse_files(form: str, step: int) -> None:
    builder = TarBuilder()
    for size, segments in [(1 << 40, SEGMENTS), (1 << 40, [(1 << 40, b"")]), (5, [(0, b"hello"), (5, b"")])]:
        if form == "S":
            builder.sparse_gnu("d/s", size, segments)
        else:
            builder.sparse_pax(form, "d/s", size, segments)
    found = walk(builder.file("after", b"y").build(), step)
    assert [(member.entry.path, member.entry.size) for member, _ in found] == [
        (b"d/s", 1 << 40), (b"d/s", 1 << 40), (b"d/s", 5), (b"after", 1)]
    assert found[0][0].segments == tuple((offset, len(data)) for offset, data in SEGMENTS)
    assert found[0][1] == b"".join(data for _, data in SEGMENTS)
    assert [member.segments for member, _ in found[1:3]] == [(), ((0, 5),)]


def test_neighbouring_segments_are_joined() -> None:
    member, data = one(TarBuilder().sparse_pax("1.0", "s", 100, [(0, b"ab"), (2, b"c"), (50, b"d")]))
    assert (member.segments, data) == (((0, 3), (50, 1)), b"abcd")


def test_data_that_nobody_reads_is_skipped() -> None:
    archive = TarBuilder().file("a", b"1" * 5000).file("b", b"2" * 5000).file("c", b"3").build()
    reader = TarReader(io.BytesIO(archive), name="layer")
    got = [(member.entry.path, reader.read_data(1)) for member in reader]
    assert got == [(b"a", b"1"), (b"b", b"2"), (b"c", b"3")]
    assert reader.read_data(10) == b""


@pytest.mark.parametrize("end", [b"", bytes(512), bytes(1024), bytes(10240), bytes(1024) + b"garbage" * 100])
def test_ends_of_archives(end: bytes) -> None:
    archive = TarBuilder().file("a", b"1" * 5).build(end=False)
    assert len(walk(archive + end)) == 1
    assert len(walk(end)) == 0 or not end


def test_padding_of_the_last_member_may_be_missing() -> None:
    assert walk(TarBuilder().file("a", b"12345").build(end=False)[:517])[0][1] == b"12345"


def test_comment_in_a_global_header_is_fine() -> None:
    assert one(TarBuilder().global_pax({"comment": "0123abcd"}).file("a"))[0].entry.path == b"a"


def test_pax_record_length_counts_itself() -> None:
    for length in range(1, 120):
        name = "n" * length
        member, _ = one(TarBuilder().pax(pax_record("path", name)).member("x"))
        assert member.entry.path == name.encode()
