"""
One header block, with what extension members before it say, as plain values.

Pure; called by the reader for every entry, so written for speed. Accepts POSIX ustar, GNU, star and V7 blocks.
Sources: POSIX.1-2017 pax "ustar Interchange Format"; GNU tar manual "Basic Tar Format"; star(5).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converter.tar.fields import S64_MAX, bounded, number, text
from lazyfs.errors import FormatError
from lazyfs.image.model import Attributes
from lazyfs.limits import LAYER_BYTES_MAX

if TYPE_CHECKING:
    from converter.tar.pax import PaxHeader

BLOCK = 512
TYPE_OFFSET = 156
SIZE_FIELD = slice(124, 136)
# name, mode, uid, gid, size, mtime, (checksum), type, linkname, magic, (uname, gname), major, minor, rest
_FIELDS = struct.Struct("100s8s8s8s12s12s8xc100s8s64x8s8s167s")
_MAGIC_USTAR, _MAGIC_GNU = b"ustar\0", b"ustar  \0"
_PREFIX_BYTES = 155
_PREFIX_STAR_BYTES = 131           # star's variant of ustar: a shorter prefix, then times
_TRAILER_STAR = b"tar\0"
_TIME_BYTES = 12                   # GNU: access time where POSIX has the prefix
_ID_MAX = 0xFFFF_FFFF
_MAJOR_MAX, _MINOR_MAX = 0xFFF, 0xF_FFFF   # Linux dev_t as file systems store it: 12 and 20 bits

assert _FIELDS.size == BLOCK


@dataclass(slots=True)
class Extended:
    """What the extension members before a header say about its entry."""

    pax: PaxHeader | None = None
    name: bytes | None = None      # GNU L
    link: bytes | None = None      # GNU K

    def __bool__(self) -> bool:
        return self.pax is not None or self.name is not None or self.link is not None


@dataclass(slots=True)
class Header:
    """`name` and `link` are as they lie in the archive. `tail`: the block's last 167 bytes."""

    name: bytes
    link: bytes
    kind: bytes
    size: int
    is_gnu: bool
    pax: PaxHeader | None
    fields: tuple[bytes, ...]      # mode, uid, gid, mtime, major, minor
    tail: bytes

    @property
    def is_sparse(self) -> bool:
        pax = self.pax
        return self.kind == b"S" or (pax is not None and bool(pax.sparse or pax.sparse_pairs))


def parse(block: bytes, extended: Extended) -> Header:
    """
    Names, type and size of a header whose checksum is right.

    Raises:
        FormatError: a number is none, or the size is not 0 .. LAYER_BYTES_MAX, or two extensions disagree.

    """
    name, mode, uid, gid, raw_size, mtime, kind, link, magic, major, minor, tail = _FIELDS.unpack(block)
    name, link = text(name), text(link) if link[0] else b""
    is_gnu = magic == _MAGIC_GNU
    if tail[0]:
        name = _prefix(magic, tail) + name
    pax = extended.pax
    size = None
    if extended:
        path = pax.path if pax is not None else None
        target = pax.linkpath if pax is not None else None
        name = _choose("name", name, extended.name, path)
        link = _choose("link target", link, extended.link, target)
        size = pax.size if pax is not None else None
    if size is None:
        size = number(raw_size)
    if not 0 <= size <= LAYER_BYTES_MAX:
        bounded(f"the size of {name[:200]!r}", size, LAYER_BYTES_MAX)
    return Header(name, link, kind, size, is_gnu, pax, (mode, uid, gid, mtime, major, minor), tail)


def _choose(what: str, plain: bytes, gnu: bytes | None, pax: bytes | None) -> bytes:
    if gnu is not None and pax is not None and gnu != pax:
        raise FormatError(f"a GNU and a PAX header give one entry two {what}s: {gnu[:100]!r} and {pax[:100]!r}")
    if gnu is not None:
        return gnu
    return plain if pax is None else pax


def _prefix(magic: bytes, tail: bytes) -> bytes:
    """What stands before the name, with the `/` between them."""
    if magic.startswith(_MAGIC_USTAR):
        return text(tail[: _PREFIX_STAR_BYTES if tail[-4:] == _TRAILER_STAR else _PREFIX_BYTES]) + b"/"
    if magic == _MAGIC_GNU:
        try:
            number(tail[:_TIME_BYTES])
        except FormatError:
            # Go before 1.8, and so old Docker, wrote a prefix into GNU headers with large numbers.
            return text(tail[:_PREFIX_BYTES]) + b"/"
    return b""


def attributes(header: Header, xattrs: tuple[tuple[bytes, bytes], ...]) -> Attributes:
    """Mode, owner and time of an entry, PAX before the block's own fields."""
    raw_mode, raw_uid, raw_gid, raw_mtime, _, _ = header.fields
    pax = header.pax
    uid = gid = mtime = None
    if pax is not None:
        uid, gid, mtime = pax.uid, pax.gid, pax.mtime
    if uid is None:
        uid = number(raw_uid)
    if gid is None:
        gid = number(raw_gid)
    if not (0 <= uid <= _ID_MAX and 0 <= gid <= _ID_MAX):
        bounded("the owner's number", uid, _ID_MAX)
        bounded("the group's number", gid, _ID_MAX)
    seconds, ns = (number(raw_mtime), 0) if mtime is None else mtime
    if not -S64_MAX <= seconds <= S64_MAX:
        bounded("the time", seconds, S64_MAX, -S64_MAX - 1)
    mode = number(raw_mode)
    if mode < 0:
        bounded("the mode", mode, _ID_MAX)
    return Attributes(mode & 0o7777, uid, gid, seconds, ns, xattrs)


def device(header: Header) -> tuple[int, int]:
    """(major, minor) of a device node."""
    pax = header.pax
    major = number(header.fields[4]) if pax is None or pax.major is None else pax.major
    minor = number(header.fields[5]) if pax is None or pax.minor is None else pax.minor
    return bounded("the device's major number", major, _MAJOR_MAX), bounded("its minor number", minor, _MINOR_MAX)
