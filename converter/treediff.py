"""
Compares two merged trees: names, types, metadata and hard-link groups; gives back the files whose bytes remain.

Layer: converter, no I/O. Who calls: converter.compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from converter.differences import Differences, show_path
from lazyfs.image.model import FileType, Inode

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A regular file on both sides, of the same size; of several names the first."""

    path: bytes
    source: Inode
    lazy: Inode


def compare_trees(source: Inode, lazy: Inode, differences: Differences) -> list[Pair]:
    """
    Compare `lazy` with what it should be. Every difference is added to `differences`.

    Returns: the regular files that are not empty, each inode once.
    """
    pairs: list[Pair] = []
    ours_to_theirs: dict[int, Inode] = {}    # by id(): tell the groups of hard links
    theirs_to_ours: dict[int, Inode] = {}
    todo = [(b"", source, lazy)]
    while todo:
        path, ours, theirs = todo.pop()
        if ours.type is not theirs.type:
            differences.add("tree", f"{show_path(path)}: is a {_name(theirs)}, should be a {_name(ours)}")
            continue
        if id(ours) in ours_to_theirs or id(theirs) in theirs_to_ours:
            if ours_to_theirs.get(id(ours)) is not theirs or theirs_to_ours.get(id(theirs)) is not ours:
                differences.add("metadata", f"{show_path(path)}: is in another group of hard links")
            continue
        ours_to_theirs[id(ours)], theirs_to_ours[id(theirs)] = theirs, ours
        for problem in _metadata(ours, theirs):
            differences.add("metadata", f"{show_path(path)}: {problem}")
        if ours.type is FileType.DIRECTORY:
            todo += reversed(list(_children(path, ours, theirs, differences)))
        elif ours.type is FileType.REGULAR:
            if ours.size != theirs.size:
                differences.add("content", f"{show_path(path)}: has {theirs.size} bytes, should have {ours.size}")
            elif ours.size:
                pairs.append(Pair(path, ours, theirs))
    return pairs


def _children(
    path: bytes, ours: Inode, theirs: Inode, differences: Differences
) -> Iterator[tuple[bytes, Inode, Inode]]:
    for name in sorted(ours.children.keys() | theirs.children.keys()):
        child_path = path + b"/" + name if path else name
        our_child, their_child = ours.children.get(name), theirs.children.get(name)
        if our_child is None:
            differences.add("tree", f"{show_path(child_path)}: should not be there")
        elif their_child is None:
            differences.add("tree", f"{show_path(child_path)}: is missing")
        else:
            yield child_path, our_child, their_child


def _metadata(ours: Inode, theirs: Inode) -> Iterator[str]:
    """What differs of two inodes of the same type, one line a field."""
    a, b = ours.attributes, theirs.attributes
    if a.mode != b.mode:
        yield f"mode is {b.mode:04o}, should be {a.mode:04o}"
    if (a.uid, a.gid) != (b.uid, b.gid):
        yield f"owner is {b.uid}:{b.gid}, should be {a.uid}:{a.gid}"
    if (a.mtime_s, a.mtime_ns) != (b.mtime_s, b.mtime_ns):
        yield f"mtime is {b.mtime_s}.{b.mtime_ns:09d}, should be {a.mtime_s}.{a.mtime_ns:09d}"
    if a.xattrs != b.xattrs:
        names = {name for name, _ in set(a.xattrs) ^ set(b.xattrs)}
        yield f"xattrs differ: {', '.join(sorted(name.decode('utf-8', 'backslashreplace') for name in names))}"
    if ours.link_count != theirs.link_count:
        yield f"link count is {theirs.link_count}, should be {ours.link_count}"
    if ours.type is FileType.SYMLINK and ours.target != theirs.target:
        yield f"points to {theirs.target[:200]!r}, should point to {ours.target[:200]!r}"
    if ours.type in (FileType.CHARACTER, FileType.BLOCK) and ours.rdev != theirs.rdev:
        yield f"device number is {theirs.rdev}, should be {ours.rdev}"


def _name(inode: Inode) -> str:
    return inode.type.name.lower()
