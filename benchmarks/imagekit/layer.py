"""
An overlayfs upper directory as an OCI layer tar.

Formats: overlayfs (kernel Documentation/filesystems/overlayfs.rst: a whiteout is a character device 0:0, an opaque
directory has `trusted.overlay.opaque` = "y") and OCI image-spec layer.md (`.wh.NAME`, `.wh..wh..opq`). PAX headers,
whole seconds, as Docker writes layers; entries sorted by name, so that one tree gives one tar.
"""

from __future__ import annotations

import os
import stat
import tarfile
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OPAQUE_XATTR = "trusted.overlay.opaque"
_OWN_XATTRS = "trusted.overlay."  # overlayfs's notes to itself, not the file's
_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}


def write_layer(top: Path, sink: IO[bytes]) -> int:
    """
    Write everything below `top` (not `top` itself) as a layer tar; returns the count of entries.

    Sockets are left out: an archive cannot hold them.
    """
    links: dict[tuple[int, int], str] = {}
    count = 0
    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as archive:
        for path, name in _walk(os.fspath(top), ""):
            status = os.lstat(path)
            member = _member(path, name, status, links)
            if member is None:
                continue
            count += 1
            if member.isreg() and member.size > 0:  # a whiteout is an empty file
                with open(path, "rb") as file:  # noqa: PTH123 - names may not be UTF-8
                    archive.addfile(member, file)
            else:
                archive.addfile(member)
            if stat.S_ISDIR(status.st_mode) and _is_opaque(path):
                archive.addfile(_empty(f"{name}/.wh..wh..opq", status))
                count += 1
    return count


def _walk(folder: str, prefix: str) -> Iterator[tuple[str, str]]:
    """Absolute path and name in the archive, parents first, in order of bytes."""
    for name in sorted(os.listdir(folder), key=os.fsencode):  # noqa: PTH208
        path = f"{folder}/{name}"
        yield path, prefix + name
        if stat.S_ISDIR(os.lstat(path).st_mode):
            yield from _walk(path, f"{prefix}{name}/")


def _is_opaque(path: str) -> bool:
    try:
        return os.getxattr(path, OPAQUE_XATTR, follow_symlinks=False) == b"y"
    except OSError:
        return False


def _empty(name: str, status: os.stat_result) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.mtime, member.mode = int(status.st_mtime), 0o644
    return member


def _member(path: str, name: str, status: os.stat_result, links: dict[tuple[int, int], str]) -> tarfile.TarInfo | None:
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
        folder, _, last = name.rpartition("/")
        return _empty(f"{folder}/.wh.{last}" if folder else f".wh.{last}", status)
    kind = _TYPES.get(stat.S_IFMT(status.st_mode))
    if kind is None:
        return None
    member = tarfile.TarInfo(name)
    member.mode, member.uid, member.gid = stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid
    member.mtime, member.type = int(status.st_mtime), kind
    if kind != tarfile.DIRTYPE and status.st_nlink > 1:
        first = links.setdefault((status.st_dev, status.st_ino), name)
        if first != name:
            member.type, member.linkname = tarfile.LNKTYPE, first
            return member
    if kind == tarfile.REGTYPE:
        member.size = status.st_size
    elif kind == tarfile.SYMTYPE:
        member.linkname = os.readlink(path)  # noqa: PTH115
    elif kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        member.devmajor, member.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
    member.pax_headers = {
        f"SCHILY.xattr.{key}": os.fsdecode(os.getxattr(path, key, follow_symlinks=False))
        for key in sorted(os.listxattr(path, follow_symlinks=False))
        if not key.startswith(_OWN_XATTRS)
    }
    return member
