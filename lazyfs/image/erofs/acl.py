"""
POSIX ACLs in xattr form: whether Linux would have accepted them.

Layer: lazyfs.image, pure. Used by xattr.py only. EROFS hands the stored bytes to the kernel's permission check, and a
malformed ACL makes the file (or the whole directory) inaccessible with EINVAL or EIO, even for root. setxattr(2)
refuses such a value, so no real file has one. Format: linux/posix_acl_xattr.h; rules: acl(5), "Valid ACLs".
"""

from __future__ import annotations

import struct

from lazyfs.errors import FormatError

_VERSION = 2
_ENTRY = struct.Struct("<HHI")
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 1, 2, 4, 8, 16, 32
_TAGS = frozenset({_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER})
_NAMED = frozenset({_USER, _GROUP})
_NO_ID = 0xFFFF_FFFF


def check_acl(value: bytes) -> None:
    """
    Validate the value of system.posix_acl_access or _default.

    Raises:
        FormatError: Linux would not accept it.

    """
    if len(value) < 4 or (len(value) - 4) % _ENTRY.size or int.from_bytes(value[:4], "little") != _VERSION:
        raise FormatError(f"POSIX ACL of {len(value)} bytes is malformed")
    entries = list(_ENTRY.iter_unpack(value[4:]))
    tags = [tag for tag, _, _ in entries]
    # Tags ascend in the order acl(5) wants; only users and groups by id may be there more than once.
    single = [tag for tag in tags if tag not in _NAMED]
    wanted = [_USER_OBJ, _GROUP_OBJ, *([_MASK] if _MASK in tags or _NAMED & set(tags) else []), _OTHER]
    if not _TAGS.issuperset(tags) or tags != sorted(tags) or single != wanted:
        raise FormatError("POSIX ACL has entries missing, twice or out of order")
    if any(permissions > 7 or (tag in _NAMED and number == _NO_ID) for tag, permissions, number in entries):
        raise FormatError("POSIX ACL has an entry with impossible permissions or id")
