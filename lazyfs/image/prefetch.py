r"""
Prefetch lists: which parts of which files a start needs, in order; text that people read, edit and keep in git.

    # lazyfs-prefetch 1
    usr/bin/python3.11
    usr/lib/libc.so.6                  0-65535,1048576-
    usr/lib/python3/dist-packages/**/*.py
    "opt/a file with spaces \xff"

Grammar: docs/format.md. Paths count from the image's root; symlinks in them are followed within the image. `*`, `?`,
`[..]` match within a component, `**` as a component any number of directories. Only regular files are matched.

Layer: lazyfs.image, no I/O. Who calls: the converter (to make the hot blob).
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazyfs import limits
from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.image.codec import Codec
from lazyfs.image.model import FileType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lazyfs.image.erofs import ErofsImage
    from lazyfs.image.table import ChunkTable

PREFETCH_VERSION = 1
LIST_BYTES_MAX = 64 * limits.MIB
ENTRY_COUNT_MAX = 1_000_000      # lines; a recorded start has some thousands
_STEPS_MAX = 100_000_000         # directory entries looked at; bounds what thousands of `**` cost
_HEADER = "# lazyfs-prefetch "
_RANGES = re.compile(r"\d{1,19}-(?:\d{1,19})?(?:,\d{1,19}-(?:\d{1,19})?)*")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"(?:\s+(.*))?')
_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|[0-7]{1,3}|.)", re.DOTALL)
_SIMPLE_ESCAPES = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"\\": b"\\", b'"': b'"'}
_GLOB_CHARACTERS = b"*?["
_PLAIN_PATH = re.compile(rb"[A-Za-z0-9._/+@%=~:,-]+")


@dataclass(frozen=True, slots=True)
class PrefetchEntry:
    """One line. `ranges`: [start, end) in bytes, end None: to the file's end; none: the whole file."""

    components: tuple[bytes, ...]
    ranges: tuple[tuple[int, int | None], ...]
    line: str


@dataclass(frozen=True, slots=True)
class PrefetchList:
    entries: tuple[PrefetchEntry, ...]


@dataclass(frozen=True, slots=True)
class PrefetchPlan:
    """`chunks`: (device index, chunk index) in order, each once, no zeros. `unmatched`: lines that name no file."""

    chunks: list[tuple[int, int]]
    unmatched: list[str]


def parse_prefetch(text: str | bytes) -> PrefetchList:
    """
    Read a prefetch list.

    Raises:
        UnsupportedError: of another version.
        FormatError: a line is malformed; the message gives its number.

    """
    if len(text) > LIST_BYTES_MAX:
        raise FormatError(f"prefetch list of {len(text)} bytes, at most {LIST_BYTES_MAX} are allowed")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"prefetch list is not UTF-8 at byte {error.start}",
                              hint="write such a path in quotes, its odd bytes as \\xHH") from error
    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.strip()
        if number == 1 and stripped.startswith(_HEADER) and stripped != f"{_HEADER}{PREFETCH_VERSION}":
            raise UnsupportedError(f"prefetch list of version {stripped[len(_HEADER):][:40]!r}: expected "
                                   f"{PREFETCH_VERSION}")
        if stripped and not stripped.startswith("#"):
            entries.append(_parse_line(stripped, number))
        if len(entries) > ENTRY_COUNT_MAX:
            raise FormatError(f"prefetch list of more than {ENTRY_COUNT_MAX} lines")
    return PrefetchList(tuple(entries))


def format_entry(path: bytes, ranges: Sequence[tuple[int, int | None]] = ()) -> str:
    """The line that names exactly this file (no glob) and these ranges, [start, end)."""
    text = path.decode("ascii") if _PLAIN_PATH.fullmatch(path) else '"' + "".join(map(_quote_byte, path)) + '"'
    stated = ",".join(f"{start}-{end - 1 if end is not None else ''}" for start, end in ranges)
    return f"{text} {stated}" if stated else text


def resolve(prefetch: PrefetchList, image: ErofsImage, tables: Sequence[ChunkTable]) -> PrefetchPlan:
    """
    Find a list's files in an image.

    Args:
        prefetch: what is wanted.
        image: the merged tree.
        tables: the chunk table of each device of the image.

    Raises:
        FormatError: the list's globs would take too long.

    """
    chunks: dict[tuple[int, int], None] = {}
    unmatched = []
    finder = _Finder(image)
    for entry in prefetch.entries:
        found = False
        for nid in finder.find(entry.components):
            found = True
            for start, end in entry.ranges or ((0, None),):
                size = (limits.FILE_BYTES_MAX if end is None else end) - start
                chunks.update(dict.fromkeys(_chunks(image.extents(nid, start, size), tables)))
        if not found:
            unmatched.append(entry.line)
    return PrefetchPlan(list(chunks), unmatched)


def _chunks(extents: list[tuple[int, int, int]], tables: Sequence[ChunkTable]) -> Iterator[tuple[int, int]]:
    for device, offset, length in extents:
        if device < 0:
            continue             # a hole
        table = tables[device]
        codecs = table.rows["codec"]
        for chunk in range(offset // table.chunk_size, (offset + length - 1) // table.chunk_size + 1):
            if codecs[chunk] != Codec.ZERO:
                yield device, chunk


# --- parsing --------------------------------------------------------------------------------------------------------


def _parse_line(line: str, number: int) -> PrefetchEntry:
    where = f"prefetch list, line {number}"
    if line.startswith('"'):
        quoted = _QUOTED.fullmatch(line)
        if quoted is None:
            raise FormatError(f"{where}: no closing quote, or no blank after it")
        pattern, rest = _unescape(quoted[1], where), quoted[2] or ""
    else:
        bare, _, rest = line.replace("\t", " ").partition(" ")
        if "\\" in bare or '"' in bare:
            raise FormatError(f"{where}: a backslash or quote outside of quotes",
                              hint='write the whole path in quotes, with \\\\ and \\"')
        pattern = bare.encode("utf-8", "surrogateescape")
    return PrefetchEntry(_split(pattern, where), _parse_ranges(rest.strip(), where), line)


def _split(pattern: bytes, where: str) -> tuple[bytes, ...]:
    collapsed: list[bytes] = []
    for part in pattern.split(b"/"):
        if part not in (b"", b".") and not (part == b"**" and collapsed[-1:] == [part]):
            collapsed.append(part)
    if not collapsed or len(pattern) > limits.PATH_BYTES_MAX or b".." in collapsed or b"\0" in pattern:
        raise FormatError(f"{where}: not a path within the image: {pattern[:200]!r}")
    return tuple(collapsed)


def _parse_ranges(text: str, where: str) -> tuple[tuple[int, int | None], ...]:
    if not text:
        return ()
    if not _RANGES.fullmatch(text) or not text.isascii():
        raise FormatError(f"{where}: {text[:100]!r} is no list of byte ranges",
                          hint="for example 0-65535,1048576- ; a path with blanks must be in quotes")
    ranges = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if last and int(last) < int(first):
            raise FormatError(f"{where}: range {part} ends before it begins")
        start, end = int(first), min(int(last) + 1, limits.FILE_BYTES_MAX) if last else None
        ranges.append((min(start, limits.FILE_BYTES_MAX), end))
    return tuple(ranges)


def _unescape(text: str, where: str) -> bytes:
    def replace(match: re.Match[bytes]) -> bytes:
        escape = match[1]
        if escape in _SIMPLE_ESCAPES:
            return _SIMPLE_ESCAPES[escape]
        if len(escape) == 1 and escape in _GLOB_CHARACTERS:
            return b"[" + escape + b"]"          # means itself: a class of one
        try:
            value = int(escape[1:], 16) if escape[:1] == b"x" else int(escape, 8)
        except ValueError:
            value = 256
        if value > 255 or (escape[:1] == b"x" and len(escape) != 3):
            raise FormatError(f"{where}: unknown escape \\{escape.decode('latin-1')}")
        byte = bytes([value])
        return b"[" + byte + b"]" if byte in _GLOB_CHARACTERS else byte

    return _ESCAPE.sub(replace, text.encode("utf-8", "surrogateescape"))


def _quote_byte(byte: int) -> str:
    char = chr(byte)
    if char in '"\\*?[':
        return "\\" + char
    return char if " " <= char <= "~" else f"\\x{byte:02x}"


# --- finding --------------------------------------------------------------------------------------------------------


class _Finder:
    """Matches lines against one image. Regular files come in the order of their names, each once a line."""

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
            self._count(1)
            child = self._image.lookup(directory, component)
            return [] if child is None else [(component, child, self._image.stat(child).type)]
        if directory not in self._entries:
            self._entries[directory] = self._image.entries(directory)
        entries = self._entries[directory]
        self._count(len(entries) + 1)
        return entries if matches is None else [entry for entry in entries if matches(entry[0])]

    def _follow(self, directory: int, name: bytes) -> tuple[int, FileType]:
        """Where `name` in a directory leads through symlinks, inside the root; (_, SYMLINK) if nowhere."""
        todo, hops = [name], 0
        nid, kind = directory, FileType.DIRECTORY
        while todo:
            name = todo.pop()
            self._count(1)
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

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _STEPS_MAX:
            raise FormatError("prefetch list: its globs look at too many files",
                              hint="use fewer lines with **, or begin them with a directory")


if TYPE_CHECKING:
    _Matcher = Callable[[bytes], bool]


def _matcher(component: bytes) -> _Matcher | None:
    """A glob component as a test of names; None: it has no glob characters (or is `**`)."""
    if component == b"**" or not any(character in component for character in _GLOB_CHARACTERS):
        return None
    matches = re.compile(fnmatch.translate(component.decode("latin-1"))).match
    return lambda name: matches(name.decode("latin-1")) is not None
