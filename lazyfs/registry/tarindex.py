"""
Where the members of an archive of an image lie: a walk over tar headers that reads no data.

Layer: registry; used by files.py. Not the reader of layers (converter has that one): here are only the names, offsets
and sizes of regular files and the targets of links in what `docker save` or `skopeo copy` wrote. POSIX.1-2017 pax
"ustar Interchange Format" and "pax Extended Header"; GNU's long names ('L', 'K') and base-256 sizes. Bounded: every
header's checksum and every extent is checked against the file's size; anything odd is a FormatError.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from lazyfs.errors import FormatError, UsageError
from lazyfs.limits import PATH_BYTES_MAX, TAR_HEADER_BYTES_MAX

_BLOCK = 512
_MEMBER_COUNT_MAX = 65_536   # 64 images of 128 layers with four files each, twice
_COMPRESSED = {
    b"\x1f\x8b": "gunzip", b"\x28\xb5\x2f\xfd": "unzstd", b"\xfd7zXZ\x00": "unxz", b"BZh": "bunzip2",
}
_LINKS = b"12"
_IGNORED = b"5g"             # directories; global pax headers (none of their keys concerns us)
_REGULAR = b"\x000"


@dataclass(frozen=True, slots=True)
class Member:
    """Data of a regular file; or, with `target`, a link: its target as a normalised name of the archive."""

    offset: int
    size: int
    target: str = ""


@dataclass(slots=True)
class _Pending:
    """What extended headers said about the next member."""

    path: bytes | None = None
    target: bytes | None = None
    size: int | None = None


def index_tar(descriptor: int, file_size: int, name: str) -> dict[str, Member]:
    """
    The members of the tar of `file_size` bytes.

    Raises:
        UsageError: it is compressed. FormatError: it is no well-formed tar, or cut short.

    """
    start = os.pread(descriptor, 8, 0)
    for magic, tool in _COMPRESSED.items():
        if start.startswith(magic):
            raise UsageError(f"{name}: the archive is compressed; its layers cannot be reached without unpacking",
                             hint=f"uncompress it first: {tool} {name}")
    found: dict[str, Member] = {}
    offset, pending = 0, _Pending()
    for _ in range(_MEMBER_COUNT_MAX):
        header = os.pread(descriptor, _BLOCK, offset)
        where = f"{name}: tar header at byte {offset}"
        if len(header) < _BLOCK:
            raise FormatError(f"{where}: the archive ends without its end mark", hint="was the copy cut short?")
        if not any(header):
            return found
        _check_sum(header, where)
        kind = header[156:157]
        size = _number(header[124:136], where)
        data = offset + _BLOCK
        if kind in {b"x", b"L", b"K"}:
            _extend(pending, kind, _read_header_data(descriptor, data, size, file_size, where), where)
        else:
            size = pending.size if pending.size is not None and kind in _REGULAR else size
            size = size if kind in _REGULAR or kind in _IGNORED else 0
            if kind not in _IGNORED:
                path, member = _member(kind, header, pending, Member(data, size), where)
                if found.setdefault(path, member) != member:
                    raise FormatError(f"{where}: {path[:200]!r} is there twice")
            if kind != b"g":
                pending = _Pending()
        if data + size > file_size:
            raise FormatError(f"{where}: data of {size} bytes reach beyond the file's end", hint="was it cut short?")
        offset = data + (size + _BLOCK - 1) // _BLOCK * _BLOCK
    raise FormatError(f"{name}: more than {_MEMBER_COUNT_MAX} members: this is no image's archive")


def _member(kind: bytes, header: bytes, pending: _Pending, member: Member, where: str) -> tuple[str, Member]:
    path = normalise(pending.path if pending.path is not None else _header_path(header), where)
    if kind in _LINKS:
        target = pending.target if pending.target is not None else _text(header[157:257])
        # A symlink's target is relative to its directory, a hard link's to the archive.
        base = path.rpartition("/")[0] if kind == b"2" else ""
        member = Member(0, 0, normalise(base.encode() + b"/" + target if base else target, where) or ".")
    elif kind not in _REGULAR:
        raise FormatError(f"{where}: a member of type {kind!r} has no place in an image's archive")
    if not path:
        raise FormatError(f"{where}: a file without a name")
    return path, member


def normalise(path: bytes, where: str) -> str:
    """A name relative to the archive's root, `.` and `..` resolved. Raises FormatError if it leads out of it."""
    try:
        text = path.decode()
    except UnicodeDecodeError:
        raise FormatError(f"{where}: a name that is not UTF-8: {path[:100]!r}") from None
    parts: list[str] = []
    for part in text.split("/"):
        if part == "..":
            if not parts:
                raise FormatError(f"{where}: {text[:200]!r} leads out of the archive")
            parts.pop()
        elif part not in {"", "."}:
            parts.append(part)
    if text.startswith("/") or "\0" in text or len(path) > PATH_BYTES_MAX:
        raise FormatError(f"{where}: {text[:200]!r} is not an acceptable name")
    return "/".join(parts)


def _extend(pending: _Pending, kind: bytes, data: bytes, where: str) -> None:
    if kind == b"L":
        pending.path = _text(data)
    elif kind == b"K":
        pending.target = _text(data)
    else:
        for key, value in _pax_records(data, where):
            if key == b"path":
                pending.path = value
            elif key == b"linkpath":
                pending.target = value
            elif key == b"size":
                pending.size = _decimal(value, where)


def _pax_records(data: bytes, where: str) -> list[tuple[bytes, bytes]]:
    """`length key=value` and a newline, one after another; length counts itself."""
    found, position = [], 0
    while position < len(data):
        space = data.find(b" ", position, position + 12)
        length = _decimal(data[position:space], where) if space > 0 else 0
        record = data[space + 1 : position + length]
        if length <= space - position + 1 or position + length > len(data) or not record.endswith(b"\n"):
            raise FormatError(f"{where}: a malformed pax record")
        key, equals, value = record[:-1].partition(b"=")
        if not equals or b"GNU.sparse" in key:
            raise FormatError(f"{where}: a pax record that has no place in an image's archive: {key[:60]!r}")
        found.append((key, value))
        position += length
    return found


def _decimal(text: bytes, where: str) -> int:
    if not text.isdigit() or len(text) > 19:
        raise FormatError(f"{where}: {text[:40]!r} is not a decimal number")
    return int(text)


def _read_header_data(descriptor: int, offset: int, size: int, file_size: int, where: str) -> bytes:
    if size > TAR_HEADER_BYTES_MAX or offset + size > file_size:
        raise FormatError(f"{where}: an extended header of {size} bytes")
    return os.pread(descriptor, size, offset)


def _header_path(header: bytes) -> bytes:
    path = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + path if prefix else path


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _number(field: bytes, where: str) -> int:
    """Octal, or GNU's base-256 for sizes of 8 GiB and more."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.strip(b" \0")
    if text.strip(b"01234567"):
        raise FormatError(f"{where}: {field!r} is not an octal number")
    return int(text or b"0", 8)


def _check_sum(header: bytes, where: str) -> None:
    """The sum of all bytes, the checksum's own taken as spaces."""
    stated = header[148:156].strip(b" \0")
    if stated.strip(b"01234567") or sum(header) - sum(header[148:156]) + 8 * 0x20 != int(stated or b"0", 8):
        raise FormatError(f"{where}: wrong checksum: not a tar archive, or damaged")
