"""
The inline xattr area of an inode: (full name, value) pairs to bytes and back.

Layer: lazyfs.image, pure. Area: a 12-byte header (all zero: no filter, no shared xattrs), then entries of
`u8 name_length, u8 prefix_index, u16 value_size, name without its prefix, value`, each padded to 4 bytes
(Linux Documentation/filesystems/erofs.rst, "Xattrs"). Entries are strictly ascending by full name: the kernel does
not care, but then no name can be there twice.
"""

from __future__ import annotations

import struct

from lazyfs import limits
from lazyfs.errors import FormatError
from lazyfs.image.erofs.acl import check_acl
from lazyfs.image.erofs.ondisk import round_up

HEADER_BYTES = 12
_ENTRY = struct.Struct("<BBH")
_ALIGNMENT = 4

# A name that ends with a dot takes a suffix; the others stand alone. (5, lustre, means nothing to Linux today.)
_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
_ACLS = frozenset({b"system.posix_acl_access", b"system.posix_acl_default"})
# Private to overlayfs, which would obey them when the mount is its lower directory (redirects, metacopy, whiteouts).
_FORBIDDEN = (b"trusted.overlay.", b"user.overlay.")


def encode_area(xattrs: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """
    The area's bytes; b"" for no xattrs.

    Raises:
        FormatError: a name that EROFS or lazyfs cannot hold, a name twice, or too many bytes.

    """
    if not xattrs:
        return b""
    area = bytearray(HEADER_BYTES)
    previous = b""
    for name, value in sorted(xattrs):
        if name == previous:
            raise FormatError(f"xattr {name[:100]!r} is there twice")
        previous = name
        index, suffix = _split(name)
        if name in _ACLS:
            check_acl(value)
        if len(value) > limits.XATTR_VALUE_BYTES_MAX:
            raise FormatError(
                f"xattr {name!r} has {len(value)} bytes, EROFS holds at most {limits.XATTR_VALUE_BYTES_MAX}"
            )
        area += _ENTRY.pack(len(suffix), index, len(value)) + suffix + value
        area += bytes(-len(area) % _ALIGNMENT)
    if len(area) > limits.XATTR_INODE_BYTES_MAX:
        raise FormatError(f"xattrs take {len(area)} bytes, EROFS holds at most {limits.XATTR_INODE_BYTES_MAX}")
    return bytes(area)


def decode_area(area: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """
    Validate and decode an area.

    Raises:
        FormatError: anything the writer would not have written.

    """
    if len(area) <= HEADER_BYTES:
        raise FormatError(f"xattr area of {len(area)} bytes has no entry")
    if any(area[:HEADER_BYTES]):
        raise FormatError("xattr area uses shared xattrs or reserved bytes")
    pairs: list[tuple[bytes, bytes]] = []
    position, previous = HEADER_BYTES, b""
    while position < len(area):
        name, value, position = _decode_entry(area, position)
        if name <= previous:
            raise FormatError(f"xattr {name[:100]!r} is out of order or there twice")
        previous = name
        pairs.append((name, value))
    return tuple(pairs)


def _decode_entry(area: bytes, position: int) -> tuple[bytes, bytes, int]:
    if position + _ENTRY.size > len(area):
        raise FormatError("xattr area ends within an entry")
    name_bytes, index, value_bytes = _ENTRY.unpack_from(area, position)
    start = position + _ENTRY.size
    end = start + name_bytes + value_bytes
    after = round_up(end, _ALIGNMENT)
    if after > len(area):
        raise FormatError(f"xattr entry of {name_bytes} + {value_bytes} bytes reaches beyond its area")
    prefix = _PREFIXES.get(index)
    if prefix is None:
        raise FormatError(f"xattr with unknown name prefix {index}")
    suffix = area[start : start + name_bytes]
    name, value = prefix + suffix, area[start + name_bytes : end]
    _check_name(name, prefix, suffix)
    if name in _ACLS:
        check_acl(value)
    return name, value, after


def _split(name: bytes) -> tuple[int, bytes]:
    for index, prefix in _PREFIXES.items():
        if name.startswith(prefix):
            suffix = name[len(prefix) :]
            _check_name(name, prefix, suffix)
            return index, suffix
    raise FormatError(f"xattr {name[:100]!r} is in a namespace that EROFS cannot hold")


def _check_name(name: bytes, prefix: bytes, suffix: bytes) -> None:
    if prefix.endswith(b".") == (not suffix) or b"\0" in name or len(name) > limits.XATTR_NAME_BYTES_MAX:
        raise FormatError(f"xattr name {name[:100]!r} is not valid")
    if name.startswith(_FORBIDDEN):
        raise FormatError(f"xattr {name[:100]!r} is private to overlayfs and not allowed in an image")
