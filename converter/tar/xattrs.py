"""
Extended attributes of a tar entry: which are kept, in which form.

Pure; called by the reader once an entry has any. Kept: user., trusted., security. and the two POSIX ACLs. Dropped and
counted: the overlay file system's own (they would act on the overlay that the image becomes a lower layer of),
namespaces that only some file system knows, and what Linux has on other types of file only (user.* on a symlink would
be listed but not readable, and so stop a copy-up; containerd drops it with a warning).
Source: xattr(7), acl(5); Linux include/uapi/linux/posix_acl_xattr.h.
"""

from __future__ import annotations

import binascii
import re
import struct
from typing import TYPE_CHECKING

from lazyfs.errors import FormatError
from lazyfs.image.model import FileType
from lazyfs.limits import XATTR_INODE_BYTES_MAX, XATTR_NAME_BYTES_MAX, XATTR_VALUE_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_NAMESPACES = (b"user.", b"trusted.", b"security.")
_OVERLAY = (b"trusted.overlay.", b"user.overlay.")
_USER = b"user."
_ACL_ACCESS, _ACL_DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"
_ACLS = {_ACL_ACCESS, _ACL_DEFAULT}
_ACL_VERSION = struct.pack("<I", 2)
_ACL_ENTRY_BYTES = 8
_ESCAPE = re.compile(rb"%(..?)?", re.DOTALL)
_HEX_DIGITS = 2


def select(
    found: Mapping[bytes, bytes], kind: FileType, dropped: Callable[[str, bytes], None]
) -> tuple[tuple[bytes, bytes], ...]:
    """
    Check and sort an entry's attributes.

    Args:
        found: all of them, by full name.
        kind: type of the entry.
        dropped: called with a reason ("overlay xattr", "xattr namespace" or "xattr of another file type") and the
            name of each that is left out.

    """
    kept = []
    total_bytes = 12  # EROFS: header of an inode's attributes
    for name, value in found.items():
        if len(name) > XATTR_NAME_BYTES_MAX:
            raise FormatError(f"an xattr's name has {len(name)} bytes, at most {XATTR_NAME_BYTES_MAX}: {name[:60]!r}")
        if name.startswith(_OVERLAY):
            dropped("overlay xattr", name)
            continue
        if not name.startswith(_NAMESPACES) and name not in _ACLS:
            dropped("xattr namespace", name)
            continue
        if not _fits(name, kind):
            dropped("xattr of another file type", name)
            continue
        if name in _NAMESPACES:
            raise FormatError(f"xattr {name!r} has no name after its namespace")
        if len(value) > XATTR_VALUE_BYTES_MAX:
            raise FormatError(f"xattr {name!r} has {len(value)} bytes, at most {XATTR_VALUE_BYTES_MAX} are possible")
        if name in _ACLS and (value[:4] != _ACL_VERSION or len(value) % _ACL_ENTRY_BYTES != len(_ACL_VERSION)):
            raise FormatError(f"xattr {name!r} is not an access control list of version 2")
        total_bytes += (4 + len(name) + len(value) + 3) & ~3
        kept.append((name, value))
    if total_bytes > XATTR_INODE_BYTES_MAX:
        raise FormatError(f"xattrs of {total_bytes} bytes in all, at most {XATTR_INODE_BYTES_MAX} are possible")
    kept.sort()
    return tuple(kept)


def _fits(name: bytes, kind: FileType) -> bool:
    """Whether Linux has the attribute on a file of that type (xattr(7), acl(5))."""
    if name.startswith(_USER):
        return kind in {FileType.REGULAR, FileType.DIRECTORY}
    if name == _ACL_DEFAULT:
        return kind is FileType.DIRECTORY
    return name != _ACL_ACCESS or kind is not FileType.SYMLINK


def decode_libarchive(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    """A LIBARCHIVE.xattr record: URL-encoded name, base64 value (its padding may be missing)."""
    def unescape(match: re.Match[bytes]) -> bytes:
        digits = match[1] or b""
        try:
            return bytes.fromhex(digits.decode("ascii")) if len(digits) == _HEX_DIGITS else _bad()
        except ValueError:
            return _bad()

    def _bad() -> bytes:
        raise FormatError(f"PAX record LIBARCHIVE.xattr has a bad escape in the name {name[:100]!r}")

    plain = _ESCAPE.sub(unescape, name)
    body = value.rstrip(b"=")
    try:
        return plain, binascii.a2b_base64(body + b"=" * (-len(body) % 4), strict_mode=True)
    except binascii.Error as error:
        raise FormatError(f"PAX record LIBARCHIVE.xattr.{plain[:60]!r} is not base64") from error
