"""
Paths of a tar archive, and the names that are not files but whiteouts.

Pure functions; called by the reader. Rules: OCI image-spec layer.md "Whiteouts"; the limits are those of Linux.
An archive's names are relative to the root of the image however they begin. `..` is refused instead of resolved:
no layer needs it, and readers disagree on it.
"""

from __future__ import annotations

from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.image.model import EntryKind
from lazyfs.limits import NAME_BYTES_MAX, PATH_BYTES_MAX, PATH_DEPTH_MAX, SYMLINK_BYTES_MAX

WHITEOUT = b".wh."
AUFS = b".wh..wh."                # AUFS' own bookkeeping in old layers: never part of the image
OPAQUE = b".wh..wh..opq"


def normalise(raw: bytes, what: str = "name") -> bytes:
    """
    A path as LayerEntry has it, but for its length: relative, no empty or `.` component; b"" is the root.

    Raises:
        FormatError: empty, NUL, or `..`.

    """
    path = raw.rstrip(b"/")
    # Most paths are plain: these tests are quicker than looking at each component.
    if not path or path[0] in b"./" or b"/." in path or b"//" in path or b"\0" in path:
        path = _clean(raw, what)
    return path


def check_length(path: bytes, what: str = "name") -> None:
    """
    Refuse a normalised path that Linux cannot hold. For whiteouts that is the removed name, without the marker.

    Raises:
        FormatError: a component over 255 bytes, the whole over 4,096 bytes, or too deep.

    """
    if len(path) <= NAME_BYTES_MAX:
        return
    if len(path) > PATH_BYTES_MAX:
        raise FormatError(f"the {what} has {len(path)} bytes, at most {PATH_BYTES_MAX} are possible")
    parts = path.split(b"/")
    longest = max(map(len, parts))
    if longest > NAME_BYTES_MAX:
        raise FormatError(f"a component of the {what} has {longest} bytes, at most {NAME_BYTES_MAX} are possible")
    if len(parts) > PATH_DEPTH_MAX:
        raise FormatError(f"the {what} is {len(parts)} components deep, at most {PATH_DEPTH_MAX} are possible")


def _clean(raw: bytes, what: str) -> bytes:
    if not raw:
        raise FormatError(f"the {what} is empty")
    if b"\0" in raw:
        raise FormatError(f"the {what} holds a NUL byte")
    parts = [part for part in raw.split(b"/") if part not in {b"", b"."}]
    if b".." in parts:
        raise FormatError(f"the {what} has a '..' component")
    return b"/".join(parts)


def link_target(raw: bytes) -> bytes:
    """A hard link's target: the normalised path of a file in the image."""
    target = normalise(raw, "link target")
    check_length(target, "link target")
    if not target:
        raise FormatError("a hard link to the root directory")
    if WHITEOUT in target:
        for part in target.split(b"/"):
            if part.startswith(AUFS):
                raise UnsupportedError(f"a hard link to AUFS metadata {target[:200]!r}")
            if part.startswith(WHITEOUT):
                raise FormatError(f"a hard link to a whiteout {target[:200]!r}")
    return target


def symlink_target(raw: bytes) -> bytes:
    """A symlink's text: any bytes but NUL, 1 .. 4,095 of them."""
    if not raw:
        raise FormatError("a symlink without a target")
    if len(raw) > SYMLINK_BYTES_MAX:
        raise FormatError(f"the symlink's target has {len(raw)} bytes, at most {SYMLINK_BYTES_MAX} are possible")
    if b"\0" in raw:
        raise FormatError("the symlink's target holds a NUL byte")
    return raw


def whiteout(path: bytes) -> tuple[EntryKind, bytes] | None:
    """
    What a normalised path that holds `.wh.` somewhere stands for.

    Returns:
        (WHITEOUT, path of the removed name), (OPAQUE, path of the directory), (NODE, the path itself: the marker is
        in the middle of a name), or None: AUFS metadata, to be skipped.

    """
    head, slash, name = path.rpartition(b"/")
    parents = head.split(b"/") if slash else []
    if any(part.startswith(AUFS) for part in parents):
        return None
    if any(part.startswith(WHITEOUT) for part in parents):
        raise FormatError("an entry below a whiteout")
    if not name.startswith(WHITEOUT):
        return EntryKind.NODE, path
    if name == OPAQUE:
        return EntryKind.OPAQUE, head
    if name.startswith(AUFS):
        return None
    removed = name[len(WHITEOUT) :]
    if removed in {b"", b".", b".."}:
        raise FormatError(f"a whiteout of {removed!r}, which is no name")
    return EntryKind.WHITEOUT, head + slash + removed
