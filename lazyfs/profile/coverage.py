"""
A prefetch list against an image, often a later build of the one that was recorded: what of it still names something.

A file's content is not in a list, so a file that changed but kept its name and size counts as found; what can be seen
is that it is gone, or shorter. Layer: lazyfs.profile, pure. Who calls: `lazyfs profile check`, and whoever wants a
list's ranges with real names and sizes (show, diff).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lazyfs.image.prefetch import LOOKUP_STEPS, FileFinder, chunks_of, exact_pattern, literal_path, make_entry
from lazyfs.profile.parts import OPEN_END, Part, Profile, distinct

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lazyfs.image.prefetch import PrefetchEntry, PrefetchList
    from lazyfs.image.table import ChunkTable
    from lazyfs.profile.files import ImageFiles


@dataclass(frozen=True, slots=True)
class Chunks:
    """Chunks that hold something, each once. `size_bytes`: uncompressed; `stored_bytes`: what the link carries."""

    count: int
    size_bytes: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class Coverage:
    """
    What a list finds in an image.

    Attributes:
        profile: what was found, of files by their real names and within their sizes.
        line_count: of the list.
        missing: lines that name no file.
        cut: lines of files that are shorter now, and how many stated bytes are behind their end.
        stated_bytes: of all lines; of those without an end what was found.
        matched_bytes: of these, how many are there.
        chunks: that hold what was found.

    """

    profile: Profile
    line_count: int
    missing: tuple[str, ...]
    cut: tuple[tuple[str, int], ...]
    stated_bytes: int
    matched_bytes: int
    chunks: Chunks

    @property
    def share(self) -> float:
        """Matched of stated bytes. Where no line says how many they are: lines that find something."""
        if self.stated_bytes:
            return self.matched_bytes / self.stated_bytes
        return 1 - len(self.missing) / self.line_count if self.line_count else 1.0

    def as_json(self) -> dict[str, Any]:
        """For --json; a contract: names are only added."""
        return {
            "coverage": round(self.share, 6),
            "lines": self.line_count,
            "missing": list(self.missing),
            "cut": [{"line": line, "missingBytes": size} for line, size in self.cut],
            "statedBytes": self.stated_bytes,
            "matchedBytes": self.matched_bytes,
            "chunks": self.chunks.count,
            "chunkBytes": self.chunks.size_bytes,
            "storedBytes": self.chunks.stored_bytes,
        }


@dataclass(slots=True)
class _Found:
    """What one line finds. `stated`, `matched`: bytes. `short`: a range begins or ends behind its file's end."""

    parts: list[Part]
    short: bool = False
    file_count: int = 0
    stated: int = 0
    matched: int = 0


def cover(prefetch: PrefetchList, files: ImageFiles) -> Coverage:
    """
    Look for a list's files in an image.

    Raises:
        FormatError: the list's globs or ranges would take too long.

    """
    finder = FileFinder(files.tree)
    parts: list[Part] = []
    missing, cut = [], []
    stated = matched = 0
    for entry in prefetch.entries:
        found = _find(entry, finder, files)
        parts += found.parts
        stated, matched = stated + found.stated, matched + found.matched
        if not found.file_count:
            missing.append(_plain(entry))
        elif found.short:
            cut.append((_plain(entry), found.stated - found.matched))
    profile = Profile(distinct(parts), prefetch.header)
    return Coverage(profile, len(prefetch.entries), tuple(missing), tuple(cut), stated, matched,
                    count_chunks(chunks_in(profile, files), files.tables))


def chunks_in(profile: Profile, files: ImageFiles) -> dict[tuple[int, int], None]:
    """(device index, chunk index) that hold the parts of a profile of this image, in order."""
    chunks: dict[tuple[int, int], None] = {}
    for part in profile.parts:
        chunks.update(dict.fromkeys(chunks_of(files.extents(part), files.tables)))
    return chunks


def count_chunks(chunks: Iterable[tuple[int, int]], tables: Sequence[ChunkTable]) -> Chunks:
    """Sizes of chunks, given as (device index, chunk index)."""
    count = size = stored = 0
    for device, chunk in chunks:
        count += 1
        size += tables[device].chunk_bytes(chunk)
        stored += int(tables[device].rows["stored_size"][chunk])
    return Chunks(count, size, stored)


def _plain(entry: PrefetchEntry) -> str:
    """The line as lazyfs would write it: printable, whatever stands in the list."""
    return make_entry(entry.pattern, entry.ranges, entry.share, entry.first_ms).line


def _find(entry: PrefetchEntry, finder: FileFinder, files: ImageFiles) -> _Found:
    """Of a glob, whose files have any size, nothing is stated but what is there."""
    exact = literal_path(entry.pattern) is not None
    ranges = [(start, None if end == OPEN_END else end) for start, end in entry.ranges or ((0, None),)]
    found = _Found([])
    for nid in finder.find(entry.components):
        found.file_count += 1
        finder.spend(len(ranges) * LOOKUP_STEPS)
        pattern, size = exact_pattern(files.path(nid)), files.tree.stat(nid).size
        for start, end in ranges:
            low, high = min(start, size), size if end is None else min(end, size)
            found.matched += high - low
            found.stated += end - start if exact and end is not None else high - low
            found.short |= exact and (start > size or (end is not None and end > size))
            if low < high:
                found.parts.append(Part(pattern, low, high, entry.share, entry.first_ms))
    if not found.file_count:
        found.stated = sum(end - start for start, end in ranges if end is not None)
    return found
