"""Hostile archives (reference: faults §5, lists 2 to 8): one error type, that names the layer and the entry."""

from __future__ import annotations

import io

import pytest

from converter.tar import TarReader
from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.limits import LAYER_BYTES_MAX, TAR_HEADER_BYTES_MAX
from tests.tarbuilder import TarBuilder, base256, header, pad, pax_record


def read_all(archive: bytes) -> int:
    reader = TarReader(io.BytesIO(archive), name="layer sha256:abc")
    count = 0
    for _ in reader:
        count += 1
        while reader.read_data(1 << 16):
            pass
    return count


def pax(key: str, value: str | bytes) -> TarBuilder:
    return TarBuilder().pax([(key, value)]).member("entry-name", b"12345")


def xattr(name: str, value: bytes) -> TarBuilder:
    return TarBuilder().file("entry-name", xattrs={name: value})


def sparse(form: str, size: int, segments: list[tuple[int, bytes]]) -> TarBuilder:
    if form == "S":
        return TarBuilder().sparse_gnu("entry-name", size, segments)
    return TarBuilder().sparse_pax(form, "entry-name", size, segments)


def old_gnu(tail: bytes, size: int = 0) -> TarBuilder:
    return TarBuilder().raw(header("x", type="S", magic=b"ustar  \0", size=size, tail=tail)).raw(pad(bytes(size)))


def sparse_records(body: bytes = b"12345", **keys: str) -> TarBuilder:
    sized = keys if "realsize" in keys else {"size": "9", **keys}
    return TarBuilder().pax({f"GNU.sparse.{key}": value for key, value in sized.items()}).member("x", body)


def named(name: str | bytes, **fields: object) -> TarBuilder:
    return TarBuilder().pax({"path": name}).member("plain", **fields)


# Each must be refused with a message that holds the second string.
REFUSED: list[tuple[str, TarBuilder, str]] = [
    # names
    ("parent directory", named("../x"), "'..'"), ("parent in the middle", named("a/../../x"), "'..'"),
    ("only parent", named(".."), "'..'"), ("NUL in a PAX name", named("a\0b"), "NUL"),
    ("empty name", TarBuilder().member(""), "empty"), ("long component", named("n" * 256), "256 bytes"),
    ("long path", named("d/" * 2048 + "x"), "4097 bytes"), ("deep path", named("d/" * 100_000 + "x"), "200001 bytes"),
    ("root is a file", named("./"), "root"), ("root is a symlink", named("/", type="2", linkname="x"), "root"),
    ("NUL in a GNU long name", TarBuilder().gnu_long("L", "a\0b").member("x"), "NUL"),
    ("empty GNU long name", TarBuilder().gnu_long("L", "").member("x"), "empty"),
    # links
    ("hard link out", TarBuilder().hardlink("h", "../../etc/passwd"), "link target has a '..'"),
    ("hard link to the root", TarBuilder().hardlink("h", "/"), "root"),
    ("hard link to nothing", TarBuilder().hardlink("h", ""), "empty"),
    ("hard link to a whiteout", TarBuilder().hardlink("h", "d/.wh.x"), "whiteout"),
    ("hard link to AUFS metadata", TarBuilder().hardlink("h", ".wh..wh.plnk/12.34"), "AUFS"),
    ("hard link with data", TarBuilder().member("h", b"x", type="1", linkname="y"), "1 bytes"),
    ("symlink to nothing", TarBuilder().symlink("s", ""), "without a target"),
    ("symlink of 4096 bytes", TarBuilder().symlink("s", "x" * 4096), "4096 bytes"),
    ("symlink of 900 KiB", TarBuilder().symlink("s", "x" * 900_000), "900000 bytes"),
    ("symlink with NUL", TarBuilder().pax({"linkpath": b"a\0b"}).member("s", type="2"), "NUL"),
    ("symlink with data", TarBuilder().member("s", b"x", type="2", linkname="y"), "1 bytes"),
    # whiteouts
    ("whiteout of nothing", TarBuilder().file("d/.wh."), "whiteout of b''"),
    ("whiteout of .", TarBuilder().file("d/.wh.."), "whiteout of b'.'"),
    ("whiteout of ..", TarBuilder().file("d/.wh..."), "whiteout of b'..'"),
    ("whiteout of a name too long", TarBuilder().whiteout("n" * 256), "256 bytes"),
    ("below a whiteout", TarBuilder().file("d/.wh.x/y"), "below a whiteout"),
    ("below a whiteout by PAX", named("d/.wh.x/y"), "below a whiteout"),
    # types
    ("directory with data", TarBuilder().member("d/", b"x", type="5"), "1 bytes"),
    ("old directory with data", TarBuilder().member("d/", b"x", type="\0"), "1 bytes"),
    ("device with data", TarBuilder().member("n", b"x", type="3"), "1 bytes"),
    ("FIFO with data", TarBuilder().member("n", b"x", type="6"), "1 bytes"),
    *[(f"type {kind}", TarBuilder().member("n", type=kind), "not known") for kind in "8ADEMNVZs\xff"],
    ("device number too large", TarBuilder().device("n", "c", 4096, 0), "major"),
    ("minor too large", TarBuilder().device("n", "c", 1, 1 << 20), "minor"),
    ("negative device", TarBuilder().device("n", "c", -1, 0), "major"),
    # PAX
    *[(f"PAX {key}={value}", pax(key, value), key if key != "size" else "") for key in ("size", "uid", "gid")
      for value in ("-1", "nan", "1e3", "0x1", "+1", " 1", "1_0", "9" * 21, "1.5", "\u0661")],
    ("PAX size too large", pax("size", str(LAYER_BYTES_MAX + 1)), "entry-name"),
    ("PAX size past the end", pax("size", "100000"), "short"),
    ("PAX uid too large", pax("uid", str(2**32)), "owner"), ("PAX gid too large", pax("gid", str(2**32)), "group"),
    *[(f"PAX mtime={value}", pax("mtime", value), "mtime")
      for value in ("nan", "inf", "-", ".5", "1e9", "1.-5", "0x1", "9" * 5000)],
    ("PAX time too large", pax("mtime", str(2**63)), "time"),
    ("PAX time too small", pax("mtime", f"-{2**63}.5"), "time"),
    *[(f"PAX body {body[:20]!r}", TarBuilder().pax(body).member("x"), "PAX record") for body in (
        b"11 path=abc", b"10 path=abc\n", b"13 path=abc\n", b"0 \n", b"3 \n", b"-1 path=a\n", b"path=abc\n", b"5 a=\0",
        b"99999999999999999999 a=b\n", b"999999999 a=b\n", b"6 =ab\n", b"4 a\n", b"\n", b" 7 a=b\n", b"011 path=a\n",
        pax_record("a", "b") + b"\0\0", pax_record("a\0b", "c"))],
    ("PAX header of 1 GiB", TarBuilder().raw(header("x", type="x", size=1 << 30)), "extended header"),
    ("PAX header too large", TarBuilder().raw(header("x", type="x", size=TAR_HEADER_BYTES_MAX + 1)), "extended header"),
    ("GNU name of 8 EiB", TarBuilder().raw(header("x", type="L", size=base256(1 << 63, 12))), "extended header"),
    ("GNU name of negative size", TarBuilder().raw(header("x", type="L", size=base256(-1, 12))), "extended header"),
    ("PAX header cut", TarBuilder().raw(header("x", type="x", size=5000) + bytes(100)), "short"),
    ("two PAX headers", TarBuilder().pax({"uid": "1"}).pax({"uid": "2"}).file("x"), "two extended"),
    ("two GNU names", TarBuilder().gnu_long("L", "a").gnu_long("L", "b").file("x"), "two extended"),
    ("names that disagree", TarBuilder().gnu_long("L", "a").pax({"path": "b"}).member("x"), "two names"),
    ("PAX header without entry", TarBuilder().pax({"uid": "1"}), "ends after"),
    ("GNU name without entry", TarBuilder().gnu_long("L", "a"), "ends after"),
    *[(f"global {key}", TarBuilder().global_pax({key: "1"}).file("x"), "global") for key in (
        "path", "linkpath", "size", "uid", "gid", "mtime", "SCHILY.xattr.user.x", "GNU.sparse.major")],
    ("global header inside", TarBuilder().pax({"uid": "1"}).global_pax({"comment": "x"}).file("x"), "between"),
    # xattrs
    ("xattr without name", xattr("", b"x"), "xattr"), ("xattr NUL in name", xattr("user.a\0", b"x"), "key"),
    ("xattr of a bare namespace", xattr("user.", b"x"), "namespace"),
    ("xattr name too long", xattr("user." + "n" * 251, b"x"), "256 bytes"),
    ("xattr value too long", xattr("user.x", bytes(65_536)), "65536 bytes"),
    ("xattrs too long together",
     TarBuilder().file("x", xattrs={f"user.{i}": bytes(65_000) for i in range(5)}), "in all"),
    ("damaged ACL", xattr("system.posix_acl_access", b"\2\0\0\0123"), "access control"),
    ("LIBARCHIVE not base64", pax("LIBARCHIVE.xattr.user.x", "*"), "base64"),
    ("LIBARCHIVE bad escape", pax("LIBARCHIVE.xattr.user.%zz", "YQ"), "escape"),
    ("LIBARCHIVE cut escape", pax("LIBARCHIVE.xattr.user.%4", "YQ"), "escape"),
    ("LIBARCHIVE NUL", pax("LIBARCHIVE.xattr.user.%00", "YQ"), "name"),
    # sparse
    *[(f"{form} {what}", sparse(form, size, segments), "entry-name") for form in ("S", "0.0", "0.1", "1.0")
      for what, size, segments in (
        ("overlap", 100, [(0, b"abc"), (2, b"d")]), ("unsorted", 100, [(50, b"a"), (0, b"b")]),
        ("past the end", 10, [(8, b"abc")]), ("starts past the end", 10, [(11, b"")]),
        ("8 EiB", 1 << 63, [(0, b"x")]))],
    ("S negative offset", sparse("S", 100, [(-5, b"x")]), "segment"),
    ("S negative size", sparse("S", -1, []), "sparse"),
    ("S without GNU magic", TarBuilder().member("x", type="S"), "GNU"),
    ("S that ends too early", old_gnu(bytes(137) + b"\1"), "map"),
    ("S goes on after its end", old_gnu(bytes(65) + b"00000000001\0" * 2), "map"),
    ("S stored too much", old_gnu(bytes(138) + b"00000000077\0", size=9), "9 are stored"),
    ("map without size", pax("GNU.sparse.map", "0,5"), "size"),
    *[(f"0.1 map {value}", sparse_records(map=value), "map")
      for value in ("0", "0,5,", ",", "a,b", "0,5,9", "0, 5", "0,-5", "-5,10")],
    ("0.0 out of order", sparse_records(numbytes="5"), "alternate"),
    ("0.0 odd", sparse_records(offset="5"), "odd"),
    ("two maps", sparse_records(offset="0", numbytes="5", map="0,5"), "two"),
    ("0.1 wrong count", sparse_records(numblocks="2", map="0,5"), "segments"),
    ("unknown version", pax("GNU.sparse.major", "2"), "version"),
    ("sparse directory", TarBuilder().pax({"GNU.sparse.size": "9"}).member("x", type="5"), "sparse"),
    ("star's sparse", pax("SCHILY.filetype", "sparse"), "star"),
    *[(f"1.0 map {body[:10]!r}", sparse_records(body, major="1", minor="0", realsize="9"), "map")
      for body in (b"", b"1\n0\n", b"x" * 600, b"-1\n" + bytes(600), b"1\n0\n" + b"9" * 600,
                   b"2\n0\n1\n" + b"\n" * 600)],
    ("1.0 too many", sparse_records(b"1000001\n".ljust(512, b"0"), major="1", minor="0", realsize="9"), "segments"),
    # headers
    ("checksum", TarBuilder().raw(header("x", sum_field=5)), "checksum"),
    ("no checksum", TarBuilder().raw(header("x", sum_field=b"")), "checksum"),
    ("negative size", TarBuilder().raw(header("x", size=base256(-512, 12))), "size"),
    ("size of 8 EiB", TarBuilder().raw(header("x", size=base256(1 << 63, 12))), "size"),
    ("size of 2**94", TarBuilder().raw(header("x", size=base256(1 << 94, 12))), "size"),
    ("size past the end", TarBuilder().raw(header("x", size=5000) + bytes(1000)), "short"),
    ("negative mode", TarBuilder().raw(header("x", mode=base256(-1, 8))), "mode"),
    ("negative owner", TarBuilder().raw(header("x", uid=base256(-1, 8))), "owner"),
    ("owner of 2**32", TarBuilder().raw(header("x", uid=2**32)), "owner"),
    ("time of 2**63", TarBuilder().raw(header("x", mtime=base256(1 << 63, 12))), "time"),
    *[(f"number {raw!r}", TarBuilder().raw(header("x", uid=raw)), "octal") for raw in (
        b"8", b"-1", b"+1", b"1 1", b"0o1", b"1_1", b"1\0" + b"x", b"\x7f")],
    ("one zero block inside", TarBuilder().file("a").raw(bytes(512)).file("b"), "single zero block"),
    ("not a tar", TarBuilder().raw(b"GIF89a" * 200), "octal"),
]


@pytest.mark.parametrize(("builder", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused(builder: TarBuilder, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        read_all(TarBuilder().file("before", b"x" * 600).raw(builder.build()).build())
    text = str(caught.value)
    assert text.startswith("layer sha256:abc: ")
    assert message in text
    assert "\n" not in text
    assert len(text) < 1200


def test_message_names_entry_or_place() -> None:
    with pytest.raises(FormatError, match=r"layer sha256:abc: entry b'dir/some-file': .*owner"):
        read_all(TarBuilder().file("dir/some-file", uid=2**32).build())
    with pytest.raises(FormatError, match=r"layer sha256:abc: at byte 1024 of the archive: header checksum"):
        read_all(TarBuilder().file("a", b"x").raw(header("x", sum_field=1)).build())
    with pytest.raises(UnsupportedError, match="type b'Z'"):
        read_all(TarBuilder().member("x", type="Z").build())


def test_every_truncation_is_noticed() -> None:
    """But at the boundaries where an archive may end: between members, and in zeros that mean nothing."""
    archive = (
        TarBuilder().file("a", b"1" * 700, xattrs={"user.x": b"1"})
        .sparse_gnu("s", 10**6, [(i * 10, b"x") for i in range(9)])
        .sparse_pax("1.0", "t", 10**6, [(5, b"x")]).gnu_long("L", "n").member("x").build()
    )
    whole = read_all(archive)
    fine = set()
    for size in range(len(archive)):
        try:
            count = read_all(archive[:size])
        except FormatError:
            continue
        fine.add(size)
        assert count <= whole
    body = len(archive) - 1024
    data_ends = {1024 + 512 + 700, 1024 + 512 + 1024}   # after the file's data; after its padding
    assert {0, body, body + 512} | data_ends <= fine
    assert len(fine) == 9  # those, and the end of both sparse files' data, with and without padding


def test_every_bit_flip_in_a_header_is_noticed() -> None:
    archive = bytearray(TarBuilder().file("some/name", b"").build())
    for bit in range(512 * 8):
        archive[bit // 8] ^= 1 << bit % 8
        try:
            read_all(bytes(archive))
        except FormatError:
            pass
        else:
            assert 148 <= bit // 8 < 156    # a checksum field that says the same in another way
        archive[bit // 8] ^= 1 << bit % 8
