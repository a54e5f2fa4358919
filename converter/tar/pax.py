"""
PAX extended headers: the records of one `x` (or `g`) member.

Pure; called by the reader. Later records win over earlier ones of the same key; an empty value takes a record back
(POSIX), except for xattrs, where it is a value. Keys that say nothing about the image (atime, ctime, comment, uname,
charset ...) are skipped. Source: POSIX.1-2017 pax, "pax Header Block"; star(5); GNU tar manual, "Sparse Formats".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from converter.tar.fields import decimal, pax_time
from converter.tar.xattrs import decode_libarchive
from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.limits import SPARSE_SEGMENT_COUNT_MAX

_LENGTH = re.compile(rb"([1-9][0-9]{0,8}) ")
_XATTR = b"SCHILY.xattr."
_LIBARCHIVE = b"LIBARCHIVE.xattr."
_SPARSE = b"GNU.sparse."
_DROPPED = (b"SCHILY.acl.", b"RHT.security.selinux")  # text forms that no container runtime applies
_NUMBERS = {
    b"size": "size", b"uid": "uid", b"gid": "gid", b"SCHILY.devmajor": "major", b"SCHILY.devminor": "minor",
}


@dataclass(slots=True)
class PaxHeader:
    """What one extended header says; None: nothing. Ranges are not checked yet."""

    path: bytes | None = None
    linkpath: bytes | None = None
    size: int | None = None
    uid: int | None = None
    gid: int | None = None
    mtime: tuple[int, int] | None = None
    major: int | None = None
    minor: int | None = None
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    sparse: dict[bytes, bytes] = field(default_factory=dict)     # GNU.sparse.*, without that prefix
    sparse_pairs: list[bytes] = field(default_factory=list)      # format 0.0: offset, length, offset, length ...
    dropped: list[bytes] = field(default_factory=list)           # keys left out that somebody may miss


def records(body: bytes) -> list[tuple[bytes, bytes]]:
    """
    Split the body of an extended header into (key, value).

    Raises:
        FormatError: a record's length does not lead to its newline, or there is no key.

    """
    found = []
    position = 0
    while position < len(body):
        match = _LENGTH.match(body, position)
        if match is None:
            raise FormatError(f"a PAX record begins with {body[position : position + 12]!r}, expected its length")
        end = position + int(match[1])
        if end > len(body) or end <= match.end() or body[end - 1] != 0x0A:
            raise FormatError(f"a PAX record of length {int(match[1])} does not end with a newline there")
        key, equals, value = body[match.end() : end - 1].partition(b"=")
        if not equals or not key or b"\0" in key:
            raise FormatError(f"a PAX record has no proper key: {key[:60]!r}")
        found.append((key, value))
        position = end
    return found


def parse(body: bytes) -> PaxHeader:
    """The meaning of an `x` header's body."""
    header = PaxHeader()
    for key, value in records(body):
        if key == b"mtime":
            header.mtime = pax_time(value) if value else None
        elif key == b"path":
            header.path = value or None
        elif key == b"linkpath":
            header.linkpath = value or None
        elif key in _NUMBERS:
            setattr(header, _NUMBERS[key], decimal(key, value) if value else None)
        elif key.startswith(_XATTR):
            _add_xattr(header, key[len(_XATTR) :], value)
        elif key.startswith(_LIBARCHIVE):
            _add_xattr(header, *decode_libarchive(key[len(_LIBARCHIVE) :], value))
        elif key.startswith(_SPARSE):
            _add_sparse(header, key[len(_SPARSE) :], value)
        elif key.startswith(_DROPPED):
            header.dropped.append(key)
        elif key == b"SCHILY.filetype" and value == b"sparse":
            raise UnsupportedError("a sparse file as star writes it")
    return header


def check_global(body: bytes) -> None:
    """
    Accept a `g` header that changes no entry.

    POSIX applies its records to all entries that follow; containerd and Docker ignore them. An archive that means
    two things is refused; those that exist in practice hold a comment (git archive).
    """
    for key, _ in records(body):
        if key in {b"mtime", b"path", b"linkpath"} or key in _NUMBERS or key.startswith((_XATTR, _LIBARCHIVE, _SPARSE)):
            raise UnsupportedError(
                f"a global PAX header sets {key[:60]!r} for all entries after it, which container runtimes ignore",
                hint="write the archive again without global headers",
            )


def _add_xattr(header: PaxHeader, name: bytes, value: bytes) -> None:
    if not name or b"\0" in name:
        raise FormatError(f"an xattr with the name {name[:60]!r}")
    header.xattrs[name] = value


def _add_sparse(header: PaxHeader, key: bytes, value: bytes) -> None:
    if key in {b"offset", b"numbytes"}:
        if len(header.sparse_pairs) % 2 != (key == b"numbytes"):
            raise FormatError("GNU.sparse.offset and GNU.sparse.numbytes do not alternate")
        if len(header.sparse_pairs) >= 2 * SPARSE_SEGMENT_COUNT_MAX:
            raise FormatError(f"a sparse file of more than {SPARSE_SEGMENT_COUNT_MAX} segments")
        header.sparse_pairs.append(value)
    else:
        header.sparse[key] = value
