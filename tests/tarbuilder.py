"""
Builds tar archives for tests: honest ones with few words, and any hostile one with full control of the bytes.

    data = TarBuilder().directory("etc").file("etc/a", b"x", xattrs={"user.k": b"v"}).whiteout("etc/gone").build()

`style` says how values that a ustar header cannot hold are written: "pax" (extended headers), "gnu" (long-name
members, base-256 numbers) or "ustar" (ValueError). Lower levels: `header()` makes one 512-byte block from any field
values, `TarBuilder.member()` writes header and data of any type byte, `.pax()`, `.global_pax()`, `.gnu_long()` write
the extension members, `.raw()` appends bytes as they are, `sparse_*()` the four ways to store a sparse file.
Sources: POSIX.1-2017 pax "ustar Interchange Format" and "pax Header Block"; GNU tar manual "Basic Tar Format".
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any, Self, TypedDict, Unpack

BLOCK = 512
Text = str | bytes
Segments = Iterable[tuple[int, bytes]]   # (offset, data)
Records = Mapping[str, Text] | Iterable[tuple[Text, Text]]
Time = int | tuple[int, int]     # seconds, or (seconds, nanoseconds)
DEFAULT_MODES = {b"5": 0o755, b"2": 0o777}


class NodeAttributes(TypedDict, total=False):
    """What every honest member takes."""

    mode: int
    uid: int
    gid: int
    mtime: Time
    xattrs: Mapping[Text, bytes] | Mapping[str, bytes] | Mapping[bytes, bytes]
    pax: Records                 # further records of its extended header


def to_bytes(text: Text) -> bytes:
    """Names are bytes; a str stands for its UTF-8 form (surrogate escapes for what is not)."""
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")


def pad(data: bytes) -> bytes:
    """`data` with zeros up to the next 512-byte boundary."""
    return data + bytes(-len(data) % BLOCK)


def octal(value: int, width: int) -> bytes:
    """Octal digits and a NUL; ValueError if they do not fit."""
    digits = b"%0*o" % (width - 1, value) if value >= 0 else b""
    if not digits or len(digits) >= width:
        raise ValueError(f"{value} does not fit {width} octal bytes")
    return digits + b"\0"


def base256(value: int, width: int) -> bytes:
    """GNU's binary number: two's complement, big endian, top bit of the field set."""
    raw = bytearray(value.to_bytes(width, "big", signed=True))
    raw[0] |= 0x80
    return bytes(raw)


def number(value: int | bytes, width: int) -> bytes:
    """A numeric field: octal where it fits, else base-256; bytes are taken as they are, padded with NUL."""
    if isinstance(value, bytes):
        return value.ljust(width, b"\0")[:width]
    try:
        return octal(value, width)
    except ValueError:
        return base256(value, width)


def checksum(block: bytes, *, signed: bool = False) -> int:
    """Sum of all bytes, with those of the checksum field as spaces."""
    blank = block[:148] + b" " * 8 + block[156:512]
    return sum(struct.unpack("512b", blank)) if signed else sum(blank)


def header(
    name: Text, *, type: Text = "0", size: int | bytes = 0, mode: int | bytes = 0o644, uid: int | bytes = 0,  # noqa: A002
    gid: int | bytes = 0, mtime: int | bytes = 0, linkname: Text = b"", magic: bytes = b"ustar\x0000",
    uname: Text = b"", gname: Text = b"", major: int | bytes = 0, minor: int | bytes = 0, prefix: Text = b"",
    tail: bytes | None = None, sum_field: int | bytes | None = None, signed_sum: bool = False,
) -> bytes:
    """
    One header block, nothing checked.

    Args:
        magic: 8 bytes, magic and version; GNU's is b"ustar  \\0", V7's b"" (all after it stays as given).
        tail: bytes 345 .. 511 instead of `prefix` (GNU's sparse map and times are there).
        sum_field: the checksum field; None computes the right one.

    """
    block = b"".join((
        to_bytes(name).ljust(100, b"\0")[:100], number(mode, 8), number(uid, 8), number(gid, 8), number(size, 12),
        number(mtime, 12), b" " * 8, to_bytes(type)[:1] or b"\0", to_bytes(linkname).ljust(100, b"\0")[:100],
        magic.ljust(8, b"\0")[:8], to_bytes(uname).ljust(32, b"\0"), to_bytes(gname).ljust(32, b"\0"),
        number(major, 8), number(minor, 8),
        (to_bytes(prefix).ljust(155, b"\0")[:155] if tail is None else tail).ljust(167, b"\0")[:167],
    ))
    if sum_field is None:
        sum_field = checksum(block, signed=signed_sum)
    stored = sum_field if isinstance(sum_field, bytes) else b"%06o\0 " % sum_field
    return block[:148] + stored.ljust(8, b"\0")[:8] + block[156:]


def pax_record(key: Text, value: Text) -> bytes:
    """`length key=value\\n`, the length counting itself."""
    body = b" " + to_bytes(key) + b"=" + to_bytes(value) + b"\n"
    size = len(body) + 1
    while len(b"%d" % size) + len(body) != size:
        size += 1
    return b"%d" % size + body


def pax_body(records: Records | bytes) -> bytes:
    if isinstance(records, bytes):
        return records
    pairs = records.items() if isinstance(records, Mapping) else records
    return b"".join(pax_record(key, value) for key, value in pairs)


def decimal_time(seconds: int, ns: int) -> str:
    """PAX time: a decimal number, negative ones counting down from zero."""
    if seconds < 0 and ns:
        seconds, ns, sign = -seconds - 1, 10**9 - ns, "-"
    else:
        seconds, sign = abs(seconds), "-" if seconds < 0 else ""
    return f"{sign}{seconds}" + (f".{ns:09d}".rstrip("0") if ns else "")


class TarBuilder:
    """Every method appends and returns the builder; `build()` may be called at any time."""

    def __init__(self, style: str = "pax") -> None:
        if style not in {"pax", "gnu", "ustar"}:
            raise ValueError(style)
        self.style = style
        self._parts: list[bytes] = []

    # --- honest members -------------------------------------------------------------------------------------------
    def file(self, path: Text, data: bytes = b"", **attributes: Unpack[NodeAttributes]) -> Self:
        return self._node(path, b"0", data=data, **attributes)

    def directory(self, path: Text, **attributes: Unpack[NodeAttributes]) -> Self:
        """Like tar, writes a `/` after the name."""
        return self._node(to_bytes(path).rstrip(b"/") + b"/", b"5", **attributes)

    def symlink(self, path: Text, target: Text, **attributes: Unpack[NodeAttributes]) -> Self:
        return self._node(path, b"2", link=target, **attributes)

    def hardlink(self, path: Text, target: Text, **attributes: Unpack[NodeAttributes]) -> Self:
        return self._node(path, b"1", link=target, **attributes)

    def device(self, path: Text, kind: str, major: int, minor: int, **attributes: Unpack[NodeAttributes]) -> Self:
        """`kind`: "c" or "b"."""
        return self._node(path, {"c": b"3", "b": b"4"}[kind], rdev=(major, minor), **attributes)

    def fifo(self, path: Text, **attributes: Unpack[NodeAttributes]) -> Self:
        return self._node(path, b"6", **attributes)

    def whiteout(self, path: Text) -> Self:
        """The OCI marker that removes `path`."""
        head, slash, name = to_bytes(path).rpartition(b"/")
        return self.file(head + slash + b".wh." + name)

    def opaque(self, path: Text) -> Self:
        """The OCI marker that makes directory `path` ("" for the root) opaque."""
        text = to_bytes(path)
        return self.file((text.rstrip(b"/") + b"/" if text else b"") + b".wh..wh..opq")

    # --- any member -----------------------------------------------------------------------------------------------
    def member(self, name: Text, data: bytes = b"", **fields: Any) -> Self:
        """Header from any of header()'s fields (size: of `data` unless given), then the padded data."""
        fields.setdefault("size", len(data))
        self._parts += (header(name, **fields), pad(data))
        return self

    def pax(self, records: Records | bytes, *, type: Text = "x", **fields: Any) -> Self:  # noqa: A002
        """An extended header for the next member; bytes are taken as the whole body."""
        return self.member("PaxHeaders/x", pax_body(records), type=type, **fields)

    def global_pax(self, records: Records | bytes) -> Self:
        return self.pax(records, type="g")

    def gnu_long(self, kind: str, text: Text) -> Self:
        """`kind`: "L" (name) or "K" (link target) of the next member."""
        return self.member("././@LongLink", to_bytes(text) + b"\0", type=kind, magic=b"ustar  \0")

    def raw(self, data: bytes) -> Self:
        """Bytes as they are; the caller sees to blocks."""
        self._parts.append(data)
        return self

    # --- sparse files: `segments` are (offset, data) ----------------------------------------------------------------
    def sparse_gnu(self, path: Text, size: int, segments: Segments, **fields: Any) -> Self:
        """Old GNU format, type S: four pairs in the header, 21 in each extension block."""
        chosen = list(segments)
        pairs = [number(offset, 12) + number(len(data), 12) for offset, data in chosen]
        body = b"".join(data for _, data in chosen)
        tail = bytes(41) + b"".join(pairs[:4]).ljust(96, b"\0") + bytes([len(pairs) > 4]) + number(size, 12)
        self._parts.append(header(path, type="S", size=len(body), magic=b"ustar  \0", tail=tail, **fields))
        for first in range(4, len(pairs), 21):
            block = b"".join(pairs[first : first + 21]).ljust(504, b"\0") + bytes([len(pairs) > first + 21])
            self._parts.append(pad(block))
        self._parts.append(pad(body))
        return self

    def sparse_pax(
        self, version: str, path: Text, size: int, segments: Segments, **fields: Any
    ) -> Self:
        """PAX formats, `version`: "0.0", "0.1" or "1.0"."""
        chosen = list(segments)
        body = b"".join(data for _, data in chosen)
        flat = [str(n) for offset, data in chosen for n in (offset, len(data))]
        records: list[tuple[Text, Text]] = []
        if version == "1.0":
            records = [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.name", path),
                       ("GNU.sparse.realsize", str(size))]
            body = pad("".join(f"{n}\n" for n in (len(chosen), *flat)).encode()) + body
        else:
            records = [("GNU.sparse.size", str(size)), ("GNU.sparse.numblocks", str(len(chosen)))]
            if version == "0.1":
                records += [("GNU.sparse.name", path), ("GNU.sparse.map", ",".join(flat))]
            else:
                keys = ("GNU.sparse.offset", "GNU.sparse.numbytes")
                records += [(keys[index % 2], n) for index, n in enumerate(flat)]
        name = path if version == "0.0" else b"GNUSparseFile.0/" + to_bytes(path)[-80:]
        return self.pax(records).member(name, body, **fields)

    def build(self, *, end: bool = True) -> bytes:
        """The archive; `end`: with the two zero blocks."""
        return b"".join(self._parts) + (bytes(2 * BLOCK) if end else b"")

    # ----------------------------------------------------------------------------------------------------------------
    def _node(
        self, path: Text, kind: bytes, *, data: bytes = b"", link: Text = b"", rdev: tuple[int, int] = (0, 0),
        **attributes: Unpack[NodeAttributes],
    ) -> Self:
        mtime = attributes.get("mtime", 0)
        seconds, ns = mtime if isinstance(mtime, tuple) else (mtime, 0)
        more = attributes.get("pax", ())
        records: list[tuple[Text, Text]] = [
            (b"SCHILY.xattr." + to_bytes(key), value) for key, value in attributes.get("xattrs", {}).items()
        ]
        records += more.items() if isinstance(more, Mapping) else more
        name, prefix = self._fit(to_bytes(path), "path", "L", records)
        target, _ = self._fit(to_bytes(link), "linkpath", "K", records, splits=False)
        fields: dict[str, Any] = {"size": len(data), "uid": attributes.get("uid", 0), "gid": attributes.get("gid", 0)}
        fields["mtime"] = seconds
        if ns:
            records.append(("mtime", decimal_time(seconds, ns)))
            fields["mtime"] = min(max(0, seconds), 8**11 - 1)
        if self.style != "gnu":
            for key, value in fields.items():
                if not 0 <= value < 8 ** (11 if key in {"size", "mtime"} else 7):
                    records.append((key, str(value)))
                    fields[key] = 0
            fields["prefix"] = prefix
        else:
            fields["magic"] = b"ustar  \0"
        if records:
            if self.style == "ustar":
                raise ValueError(f"a ustar header cannot hold {records!r}")
            self.pax(records)
        mode = attributes.get("mode", DEFAULT_MODES.get(kind, 0o644))
        return self.member(
            name, data, type=kind, mode=mode, linkname=target, major=rdev[0], minor=rdev[1], **fields
        )

    def _fit(
        self, text: bytes, key: str, kind: str, records: list[tuple[Text, Text]], *, splits: bool = True
    ) -> tuple[bytes, bytes]:
        """Name and prefix fields for `text`, adding what else is needed to carry it."""
        if len(text) <= 100:
            return text, b""
        if splits and self.style != "gnu" and not records:
            cut = text.rfind(b"/", 0, 156)
            if cut > 0 and 0 < len(text) - cut - 1 <= 100:
                return text[cut + 1 :], text[:cut]
        if self.style == "gnu":
            self.gnu_long(kind, text)
        else:
            records.append((key, text))
        return text[:100], b""
