"""
The one tar we write ourselves: a few regular files under fixed names, in strict POSIX ustar headers.

Header layout: POSIX.1-1988 ustar (IEEE Std 1003.1, pax, "ustar Interchange Format"). Everything that could vary is
fixed (mode 0444 or 0555, root, time 0), so the bytes follow from names and contents alone; and a reader compares the
whole header with the one it would have written instead of interpreting it.

Layer: lazyfs.image, no I/O. Who calls: lazyfs.image.bootstrap. Source archives are read by converter.tar, not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazyfs.errors import BugError, FormatError

if TYPE_CHECKING:
    from collections.abc import Sequence

_BLOCK_BYTES = 512
END = bytes(2 * _BLOCK_BYTES)    # of every archive
_SIZE_FIELD = slice(124, 136)
_SIZE_MAX = 8 ** 11 - 1          # eleven octal digits
_NAME_BYTES_MAX = 100


@dataclass(frozen=True, slots=True)
class Member:
    """One file, or a directory if its name ends in a slash."""

    name: str
    data: bytes | memoryview


def pack_ustar(members: Sequence[Member]) -> bytes:
    """The archive of these members, in this order."""
    parts: list[bytes | memoryview] = []
    for member in members:
        parts += [header_of(member.name, len(member.data)), member.data, padding_of(len(member.data))]
    return b"".join([*parts, END])


def parse_ustar(
    archive: bytes | memoryview, names: Sequence[str], *, optional: frozenset[str] = frozenset()
) -> tuple[Member, ...]:
    """
    Exactly the members `names`, in this order; their data are views of `archive`. `optional` ones may be missing.

    Raises:
        FormatError: anything else than pack_ustar() would have written.

    """
    view, offset = memoryview(archive), 0
    members = []
    for name in names:
        header = bytes(view[offset : offset + _BLOCK_BYTES])
        if name in optional and header[:_NAME_BYTES_MAX].rstrip(b"\0") != name.encode("ascii"):
            continue
        size = _read_size(header, name)
        if (size and name.endswith("/")) or header != header_of(name, size):
            raise FormatError(f"bootstrap layer: no member {name} at byte {offset}")
        start = offset + _BLOCK_BYTES
        offset = start + size + -size % _BLOCK_BYTES
        if offset > len(view) or any(view[start + size : offset]):
            raise FormatError(f"bootstrap layer: member {name} of {size} bytes is cut short or badly padded")
        members.append(Member(name, view[start : start + size]))
    if view[offset:] != END:
        raise FormatError(f"bootstrap layer: expected the end of the archive at byte {offset}")
    return tuple(members)


def _read_size(header: bytes, name: str) -> int:
    digits = header[_SIZE_FIELD][:-1]
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise FormatError(f"bootstrap layer: no member {name} where it should be")
    return int(digits, 8)


def padding_of(size: int) -> bytes:
    """What follows a member's data of `size` bytes."""
    return bytes(-size % _BLOCK_BYTES)


def header_of(name: str, size: int) -> bytes:
    """The header block of a file of `size` bytes; of a directory if `name` ends in a slash."""
    directory = name.endswith("/")
    if len(name) > _NAME_BYTES_MAX or not 0 <= size <= _SIZE_MAX or (directory and size):
        raise BugError(f"member {name} of {size} bytes does not fit a ustar header")
    fields = (
        name.encode("ascii").ljust(100, b"\0"),
        b"0000555\0" if directory else b"0000444\0",
        b"0000000\0" * 2,                    # uid, gid
        b"%011o\0" % size,
        b"%011o\0" % 0,                      # mtime
        b" " * 8,                            # checksum, counted as blanks
        b"5" if directory else b"0",
        bytes(100),                          # linkname
        b"ustar\x0000",                      # magic, version
        b"root".ljust(32, b"\0") * 2,
        b"0000000\0" * 2,                    # devmajor, devminor
        bytes(155 + 12),                     # prefix, padding
    )
    header = b"".join(fields)
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]
