"""
The merge of a stack of layers into one tree, exactly as OCI image-spec v1.1 layer.md says.

Lowest layer first; of each layer, first its whiteouts and opaque directories (they speak of lower layers only, wherever
they stand in the archive), then its other entries in their order, later ones winning. A parent directory on the way
that is a symlink is followed inside the root, as containerd's fs.RootPath does; the last component never is.

Layer: converter, no I/O. Who calls: the conversion (then the EROFS writer takes the tree), converter.compare.
Invariants: every inode but a directory's may have several names; link counts are exact; no recursion, so depth costs
no stack; steps are counted, so a hostile archive cannot make the merge slow (LIMIT_* below).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lazyfs import limits
from lazyfs.errors import FormatError
from lazyfs.image.model import Attributes, EntryKind, FileType, Inode, LayerEntry

if TYPE_CHECKING:
    from collections.abc import Sequence

_IMPLIED = Attributes()          # a parent that no layer lists: 0755, root, time 0
# Names walked while resolving paths. Real layers need 1 to 3 an entry, for most parents are remembered; a hostile
# one could need 40 symlinks * 2048 components for each entry.
_STEPS_FREE = 10_000_000
_STEPS_PER_ENTRY = 100


def merge(layers: Sequence[Sequence[LayerEntry]], *, names: Sequence[str]) -> Inode:
    """
    Merge layers, lowest first, into one tree; returns its root. `Inode.device` is the layer's index.

    Args:
        layers: the entries of each layer in archive order, paths normal (image.entries.is_normal_path).
        names: what to call each layer in a message.

    Raises:
        FormatError: a hard link that names nothing, a loop of symlinks, limits; names layer and entry.

    """
    merger = _Merger()
    for index, (entries, name) in enumerate(zip(layers, names, strict=True)):
        merger.apply(index, entries, name)
    _count_links(merger.root, merger.linked)
    return merger.root


class _Merger:
    """The tree so far. One layer is applied at a time."""

    def __init__(self) -> None:
        self.root = Inode(FileType.DIRECTORY, _IMPLIED, implied=True)
        self.linked: dict[int, Inode] = {}     # by id(): inodes that ever had a second name
        self._node_count = 1
        self._parents: dict[bytes, Inode] = {}  # directories by the path an entry called them; of this layer only
        self._steps_left = 0
        self._layer = ""

    def apply(self, index: int, entries: Sequence[LayerEntry], name: str) -> None:
        self._layer = name
        self._steps_left = _STEPS_FREE + _STEPS_PER_ENTRY * len(entries)
        self._hide(entries)
        self._parents = {b"": self.root}
        for entry in entries:
            if entry.kind is EntryKind.NODE:
                self._add_node(entry, index)
            elif entry.kind is EntryKind.HARDLINK:
                self._add_link(entry)

    # --- whiteouts ------------------------------------------------------------------------------------------------

    def _hide(self, entries: Sequence[LayerEntry]) -> None:
        """Apply a layer's whiteouts to the layers below. All are resolved before the first one changes anything."""
        hidden = [entry for entry in entries if entry.kind >= EntryKind.WHITEOUT]
        if not hidden or not self.root.children:
            return
        own = {entry.path for entry in entries if entry.kind < EntryKind.WHITEOUT}
        opaque: list[Inode] = []
        removed: list[tuple[Inode, bytes]] = []
        for entry in hidden:
            if entry.kind is EntryKind.OPAQUE:
                opaque += self._find(entry.path, entry, own)[-1:]
                continue
            dirname, _, name = entry.path.rpartition(b"/")
            removed += [(parent, name) for parent in self._find(dirname, entry, own)[-1:]]
        for directory, name in removed:
            directory.children.pop(name, None)
        for directory in opaque:
            directory.children.clear()

    # --- additions ------------------------------------------------------------------------------------------------

    def _add_node(self, entry: LayerEntry, index: int) -> None:
        path = entry.path
        if not path:
            self._set_root(entry)
            return
        dirname, _, name = path.rpartition(b"/")
        parent = self._parents.get(dirname) or self._make_parent(dirname, entry)
        old = parent.children.get(name)
        if old is not None:
            if old.type is entry.type is FileType.DIRECTORY:
                old.attributes, old.implied, old.device = entry.attributes, False, index
                return
            self._forget(old)
        parent.children[name] = Inode(
            entry.type, entry.attributes, entry.size, index, entry.data, entry.target, entry.rdev
        )
        self._count_node(entry)

    def _add_link(self, entry: LayerEntry) -> None:
        """As link(2) after the name was cleared: what the target loses by that cannot be linked to."""
        path, target = entry.path, entry.target
        if path == target:
            raise self._error(entry, "hard link to itself")
        dirname, _, name = path.rpartition(b"/")
        parent = self._parents.get(dirname) or self._make_parent(dirname, entry)
        old = parent.children.pop(name, None)
        if old is not None:
            self._forget(old)
        dirname, _, source_name = target.rpartition(b"/")
        known = self._parents.get(dirname)
        source = known if known is not None else next(iter(self._find(dirname, entry, frozenset())[-1:]), None)
        inode = source.children.get(source_name) if source is not None else None
        if inode is None:
            raise self._error(entry, f"hard link to {_show(target)}, which no lower layer and no earlier entry has")
        if inode.type is FileType.DIRECTORY:
            raise self._error(entry, f"hard link to {_show(target)}, a directory")
        parent.children[name] = inode
        self.linked[id(inode)] = inode
        self._count_node(entry)

    def _set_root(self, entry: LayerEntry) -> None:
        if entry.type is not FileType.DIRECTORY:
            raise self._error(entry, "the root directory cannot be anything else than a directory")
        self.root.attributes, self.root.implied = entry.attributes, False

    # --- paths ----------------------------------------------------------------------------------------------------

    def _find(self, path: bytes, entry: LayerEntry, own: set[bytes] | frozenset[bytes]) -> list[Inode]:
        """
        The directories from the root to `path`, symlinks followed; [] if there is no such directory.

        A symlink whose path is in `own` is not followed: the layer itself puts something else in its place.
        """
        walk = _Walk(self.root, path)
        while walk.todo:
            self._step(entry)
            child = walk.next()
            link = child is not None and child.type is FileType.SYMLINK
            if child is not None and link and (b"/".join(walk.names) in own or not walk.follow(child)):
                return []
        return [] if walk.missing else walk.inodes

    def _make_parent(self, dirname: bytes, entry: LayerEntry) -> Inode:
        """The directory `dirname`, symlinks followed, made where it is missing. Remembered."""
        above, _, name = dirname.rpartition(b"/")
        known = self._parents.get(above)
        found = known.children.get(name) if known is not None else None
        if found is None or found.type is not FileType.DIRECTORY:
            found = self._walk_and_make(dirname, entry)
        self._parents[dirname] = found
        return found

    def _walk_and_make(self, path: bytes, entry: LayerEntry) -> Inode:
        walk = _Walk(self.root, path)
        while walk.todo:
            self._step(entry)
            child = walk.next()
            if child is not None and child.type is FileType.SYMLINK and not walk.follow(child):
                raise self._error(entry, f"more than {limits.SYMLINK_HOPS_MAX} symlinks on the way")
        directory = walk.inodes[-1]
        for name in walk.missing:
            old = directory.children.get(name)
            if old is not None:
                self._forget(old)
            directory.children[name] = Inode(FileType.DIRECTORY, _IMPLIED, implied=True)
            directory = directory.children[name]
            self._count_node(entry)
        return directory

    def _forget(self, old: Inode) -> None:
        """A name loses `old`. Paths that may have led through it are no longer known."""
        if old.type is FileType.DIRECTORY or old.type is FileType.SYMLINK:
            self._parents = {b"": self.root}

    def _count_node(self, entry: LayerEntry) -> None:
        self._node_count += 1
        if self._node_count > limits.ENTRY_COUNT_MAX:
            raise self._error(entry, f"more than {limits.ENTRY_COUNT_MAX} files and implied directories")

    def _step(self, entry: LayerEntry) -> None:
        self._steps_left -= 1
        if self._steps_left < 0:
            raise self._error(entry, "the layer's paths lead through too many symlinks and directories")

    def _error(self, entry: LayerEntry, problem: str) -> FormatError:
        return FormatError(f"layer {self._layer}, entry {_show(entry.path)}: {problem}",
                           hint="the layers do not fit together: build and push the image again")


class _Walk:
    """
    One path on its way through the tree: `inodes` and `names` as far as it exists, `missing` beyond.

    What is missing is told apart because `..` behind it must lead back without having made anything.
    """

    __slots__ = ("hops", "inodes", "missing", "names", "todo")

    def __init__(self, root: Inode, path: bytes) -> None:
        self.inodes = [root]
        self.names: list[bytes] = []
        self.missing: list[bytes] = []
        self.todo = path.split(b"/")
        self.todo.reverse()
        self.hops = 0

    def next(self) -> Inode | None:
        """
        Take one component. Returns the directory reached, or the symlink met (see follow); None: missing from here.

        After a symlink was returned, `names` ends with its name until follow() is called.
        """
        name = self.todo.pop()
        if name in (b"", b"."):
            return self.inodes[-1]
        if name == b"..":
            if self.missing:
                self.missing.pop()
            elif len(self.inodes) > 1:
                self.inodes.pop()
                self.names.pop()
            return self.inodes[-1]
        child = None if self.missing else self.inodes[-1].children.get(name)
        if child is None or child.type not in (FileType.DIRECTORY, FileType.SYMLINK):
            self.missing.append(name)    # what is no directory gives way to one
            return None
        self.names.append(name)
        if child.type is FileType.DIRECTORY:
            self.inodes.append(child)
        return child

    def follow(self, link: Inode) -> bool:
        """Go on through a symlink that next() returned. False: too many of them."""
        self.hops += 1
        self.names.pop()
        if link.target.startswith(b"/"):
            del self.inodes[1:]
            self.names.clear()
        self.todo.extend(reversed(link.target.split(b"/")))
        return self.hops <= limits.SYMLINK_HOPS_MAX


def _count_links(root: Inode, linked: dict[int, Inode]) -> None:
    """Set exact link counts, and check the limits that only the finished tree shows."""
    for inode in linked.values():
        inode.link_count = 0
    todo = [(root, 0, 0)]
    while todo:
        directory, depth, path_bytes = todo.pop()
        if depth > limits.PATH_DEPTH_MAX:
            raise FormatError(f"the merged tree has directories deeper than {limits.PATH_DEPTH_MAX}")
        subdirectories = 0
        for name, child in directory.children.items():
            if path_bytes + len(name) > limits.PATH_BYTES_MAX:
                raise FormatError(f"the merged tree has paths longer than {limits.PATH_BYTES_MAX} bytes")
            if child.type is FileType.DIRECTORY:
                subdirectories += 1
                todo.append((child, depth + 1, path_bytes + len(name) + 1))
            elif linked and id(child) in linked:
                child.link_count += 1
        directory.link_count = 2 + subdirectories


def _show(path: bytes) -> str:
    return repr(path[:300])[1:]
