"""
USER[:GROUP], by name or number, to numbers: by the image's own passwd and group files. Pure; the bytes are hostile.

Layer: runner. Who calls: runner.session. As Docker does it: a name that is in the file counts as a name even if it
is a number; a number need not be in the file; a user without a group of its own choice gets its passwd line's, or 0,
and the groups that name it as a member.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazyfs.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterator

ID_MAX = (1 << 31) - 1           # as Docker; (uid_t)-1 means "no change" to the kernel
GROUP_COUNT_MAX = 1024           # of one user; NGROUPS_MAX is 65,536, but each is an argument of a system call
FILE_BYTES_MAX = 1 << 20         # of passwd and of group: some 20,000 users


@dataclass(frozen=True, slots=True)
class User:
    """Numbers. `groups`: the additional ones, without `gid`."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()


def resolve_user(text: str, passwd: bytes, group: bytes) -> User:
    """
    Who that is.

    Args:
        text: USER[:GROUP]; "": root.
        passwd: the image's /etc/passwd; b"" if it has none.
        group: the image's /etc/group, likewise.

    Raises:
        FormatError: no such user or group in the image, or a number out of range.

    """
    name, colon, group_name = text.partition(":")
    wanted = (name or "0").encode("utf-8", "surrogateescape")
    known = next((fields for fields in _lines(passwd, 4) if fields[0] == wanted), None)
    if known is None:
        uid = _number(wanted, f"user {name!r:.60} is not in the image's /etc/passwd")
        known = next((fields for fields in _lines(passwd, 4) if fields[2] == b"%d" % uid), None)
    if known is not None:
        uid = _number(known[2], f"user {name!r:.60} has no valid number in the image's /etc/passwd")
    if colon:
        return User(uid, _group(group_name, group))
    if known is None:
        return User(uid)
    gid = _number(known[3], f"user {name!r:.60} has no valid group in the image's /etc/passwd")
    return User(uid, gid, tuple(sorted(_member_of(known[0], group) - {gid})))


def _group(name: str, group: bytes) -> int:
    wanted = name.encode("utf-8", "surrogateescape")
    known = next((fields for fields in _lines(group, 3) if fields[0] == wanted), None)
    return _number(wanted if known is None else known[2], f"group {name!r:.60} is not in the image's /etc/group")


def _member_of(name: bytes, group: bytes) -> set[int]:
    found: set[int] = set()
    for fields in _lines(group, 4):
        if name in fields[3].split(b",") and (number := _id(fields[2])) is not None and len(found) < GROUP_COUNT_MAX:
            found.add(number)
    return found


def _lines(data: bytes, field_count_min: int) -> Iterator[list[bytes]]:
    """The fields of each line that has enough of them; others do not count, as for every reader of these files."""
    for line in data[:FILE_BYTES_MAX].split(b"\n"):
        fields = line.strip(b" \t\r").split(b":")
        if len(fields) >= field_count_min and fields[0] and not fields[0].startswith(b"#"):
            yield fields


def _number(text: bytes, problem: str) -> int:
    number = _id(text)
    if number is None:
        raise FormatError(problem, hint="name another: --user UID:GID")
    return number


def _id(text: bytes) -> int | None:
    if not (text.isdigit() and len(text) <= 10):
        return None
    number = int(text)
    return number if number <= ID_MAX else None
