"""
What the lines of a prefetch list name in one image: files, where their bytes are, and the chunks that hold them.

Layer: lazyfs.image, no I/O. `*`, `?`, `[..]` match within a component, `**` as a component any number of directories.
Only regular files are matched. Lists are hostile: every step is counted, and there are at most _STEPS_MAX of them.
"""

from __future__ import annotations

import fnmatch
import re
from typing import TYPE_CHECKING

from lazyfs import limits
from lazyfs.errors import FormatError
from lazyfs.image.codec import Codec
from lazyfs.image.model import FileType
from lazyfs.image.prefetch.grammar import GLOB_CHARACTERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from lazyfs.image.erofs import ErofsImage
    from lazyfs.image.prefetch.grammar import PrefetchList
    from lazyfs.image.table import ChunkTable

# A step takes about a microsecond: a directory entry looked at, a chunk named. So a list costs half a minute at most,
# thousands of `**`, huge files, or a million lines: a name that is looked up, a range that is laid out weigh more.
_STEPS_MAX = 30_000_000
LOOKUP_STEPS = 20


def wanted_extents(
    prefetch: PrefetchList, image: ErofsImage, tables: Sequence[ChunkTable], unmatched: list[str]
) -> Iterator[tuple[int, int, int]]:
    """
    What a list names, as (device index, offset, length) in bytes, in its order; what is named twice comes twice.

    Args:
        prefetch: what is wanted.
        image: the merged tree.
        tables: the chunk table of each device of the image.
        unmatched: gets the lines that name no file.

    Raises:
        FormatError: the list's globs or ranges would take too long.

    """
    finder = FileFinder(image)
    for entry in prefetch.entries:
        found = False
        for nid in finder.find(entry.components):
            found = True
            for start, end in entry.ranges or ((0, None),):
                yield from (one for one in finder.extents(nid, start, end, tables) if one[0] >= 0)
        if not found:
            unmatched.append(entry.line)


def chunks_of(extents: Iterable[tuple[int, int, int]], tables: Sequence[ChunkTable]) -> Iterator[tuple[int, int]]:
    """(device index, chunk index) of all chunks that hold these (device index, offset, length); no zeros, no holes."""
    for device, offset, length in extents:
        if device < 0:
            continue             # a hole
        table = tables[device]
        codecs = table.rows["codec"]
        for chunk in range(offset // table.chunk_size, (offset + length - 1) // table.chunk_size + 1):
            if codecs[chunk] != Codec.ZERO:
                yield device, chunk


class FileFinder:
    """
    Matches lines against one image. Regular files come in the order of their names, each once a line.

    Counts its steps over all lines, and raises FormatError when they are too many.
    """

    def __init__(self, image: ErofsImage) -> None:
        self._image = image
        self._steps = 0
        self._entries: dict[int, list[tuple[bytes, int, FileType]]] = {}

    def find(self, components: tuple[bytes, ...]) -> Iterator[int]:
        """The regular files that a line names: a directory's own before those below it, by name."""
        matchers = [_matcher(component) for component in components]
        found: dict[int, None] = {}
        seen: set[tuple[int, int]] = set()
        todo = [(self._image.root_nid, 0)]     # a directory, and which component comes next
        while todo:
            state = todo.pop()
            if state not in seen:
                seen.add(state)
                todo += reversed(list(self._match(state, components, matchers[state[1]], found)))
        yield from found

    def extents(
        self, nid: int, start: int, end: int | None, tables: Sequence[ChunkTable]
    ) -> list[tuple[int, int, int]]:
        """Where bytes [start, end) of a file are, as ErofsImage.extents; end None: to the file's end."""
        size = (limits.FILE_BYTES_MAX if end is None else end) - start
        found = self._image.extents(nid, start, size)
        self.spend(LOOKUP_STEPS + sum(1 + (length // tables[device].chunk_size if device >= 0 else 0)
                           for device, _, length in found))
        return found

    def _match(
        self, state: tuple[int, int], components: tuple[bytes, ...], matches: _Matcher | None, found: dict[int, None]
    ) -> Iterator[tuple[int, int]]:
        """Go one component on from a directory: files into `found`, directories to go on with are given back."""
        directory, index = state
        last, recursive = index == len(components) - 1, components[index] == b"**"
        if recursive and not last:
            yield directory, index + 1
        for name, child, stated in self._candidates(directory, components[index], matches, recursive=recursive):
            nid, kind = child, stated
            if stated is FileType.SYMLINK and not recursive:   # `**` follows none: they may lead in circles
                nid, kind = self._follow(directory, name)
            if kind is FileType.DIRECTORY and (recursive or not last):
                yield nid, index if recursive else index + 1
            elif kind is FileType.REGULAR and last:
                found[nid] = None

    def _candidates(
        self, directory: int, component: bytes, matches: _Matcher | None, *, recursive: bool
    ) -> list[tuple[bytes, int, FileType]]:
        if matches is None and not recursive:
            self.spend(LOOKUP_STEPS)
            child = self._image.lookup(directory, component)
            return [] if child is None else [(component, child, self._image.stat(child).type)]
        if directory not in self._entries:
            self._entries[directory] = self._image.entries(directory)
        entries = self._entries[directory]
        self.spend(len(entries) + 1)
        return entries if matches is None else [entry for entry in entries if matches(entry[0])]

    def _follow(self, directory: int, name: bytes) -> tuple[int, FileType]:
        """Where `name` in a directory leads through symlinks, inside the root; (_, SYMLINK) if nowhere."""
        todo, hops = [name], 0
        nid, kind = directory, FileType.DIRECTORY
        while todo:
            name = todo.pop()
            self.spend(LOOKUP_STEPS)
            if name in (b"", b"."):
                continue
            if kind is not FileType.DIRECTORY:
                return nid, FileType.SYMLINK
            if name == b"..":
                nid = self._image.parent(nid)
                continue
            child = self._image.lookup(nid, name)
            if child is None:
                return nid, FileType.SYMLINK
            child_kind = self._image.stat(child).type
            if child_kind is not FileType.SYMLINK:
                nid, kind = child, child_kind
                continue
            hops += 1
            target = self._image.readlink(child)
            if hops > limits.SYMLINK_HOPS_MAX:
                return nid, FileType.SYMLINK
            nid = self._image.root_nid if target.startswith(b"/") else nid
            todo += reversed(target.split(b"/"))
        return nid, kind

    def spend(self, steps: int) -> None:
        """Count steps; also those of whoever does something for each file found. Raises FormatError: too many."""
        self._steps += steps
        if self._steps > _STEPS_MAX:
            raise FormatError("prefetch list: its lines look at too many files and chunks",
                              hint="use fewer lines with **, or begin them with a directory; name large files once")


if TYPE_CHECKING:
    _Matcher = Callable[[bytes], bool]


def _matcher(component: bytes) -> _Matcher | None:
    """A glob component as a test of names; None: it has no glob characters (or is `**`)."""
    if component == b"**" or not any(character in component for character in GLOB_CHARACTERS):
        return None
    matches = re.compile(fnmatch.translate(component.decode("latin-1"))).match
    return lambda name: matches(name.decode("latin-1")) is not None
