"""
An image's files and where their bytes lie, so that a recording's ranges of devices become ranges of files.

Every byte of a device that is some file's becomes a byte of one file: where several share it (hard links, equal files),
of the first by walking the tree. What lies between files is padding, and nobody's.

Layer: lazyfs.profile, pure; looks at the tree only when asked. Who calls: the commands of `lazyfs profile`, benchmarks.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from lazyfs.errors import UsageError
from lazyfs.image.model import FileType
from lazyfs.image.prefetch import PrefetchHeader, exact_pattern
from lazyfs.profile.parts import Part, Profile
from lazyfs.profile.spans import first_come

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lazyfs.image.erofs import ErofsImage
    from lazyfs.image.table import ChunkTable
    from lazyfs.profile.recording import Recording


class _Piece(NamedTuple):
    """A run of a file's bytes in a device."""

    start: int      # in the device
    end: int
    path: bytes
    file_offset: int


class ImageFiles:
    """
    The tree of a lazy image, for profiles.

    Attributes:
        tree: the merged tree.
        tables: the chunk table of each layer device.
        digests: the device digest of each, as text.

    """

    def __init__(self, tree: ErofsImage, tables: Sequence[ChunkTable], digests: Sequence[str]) -> None:
        self.tree = tree
        self.tables = tuple(tables)
        self.digests = tuple(digests)

    def path(self, nid: int) -> bytes:
        """The first name of a regular file, from the root on, without a slash in front."""
        return self._paths[nid]

    def extents(self, part: Part) -> list[tuple[int, int, int]]:
        """Where the bytes of a part are, as ErofsImage.extents. Its pattern must be the first name of a file."""
        return self.tree.extents(self._nids[part.pattern], part.start, part.end - part.start)

    def parts(self, recording: Recording) -> Iterator[Part]:
        """
        What a recording touched: ranges of files in the order of first access, each byte once.

        Raises:
            UsageError: it is of another image.

        """
        for digest, _ in recording.devices:
            if digest not in self._pieces:
                raise UsageError(f"the recording is of another image: this one has no layer device {digest[:19]}",
                                 hint="name the image that was recorded, by its digest")
        touched: dict[str, list[tuple[int, int]]] = {}
        for touch in recording.touches:
            touched.setdefault(recording.devices[touch.device][0], []).append((touch.start, touch.end))
        fresh = {digest: iter(first_come(ranges)) for digest, ranges in touched.items()}
        for touch in recording.touches:
            digest = recording.devices[touch.device][0]
            for start, end in next(fresh[digest]):
                for path, low, high in self.files_in(digest, start, end):
                    yield Part(exact_pattern(path), low, high, first_ms=touch.ms)

    def files_in(self, digest: str, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
        """(path, start, end in the file) of all files' bytes in [start, end) of a device, in its order."""
        pieces, starts = self._pieces[digest]
        for index in range(max(bisect_right(starts, start) - 1, 0), len(pieces)):
            piece = pieces[index]
            if piece.start >= end:
                return
            low, high = max(piece.start, start), min(piece.end, end)
            if low < high:
                shift = piece.file_offset - piece.start
                yield piece.path, low + shift, high + shift

    @cached_property
    def _paths(self) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        for path, nid in self.tree.walk():
            if nid not in found and self.tree.stat(nid).type is FileType.REGULAR:
                found[nid] = path.lstrip(b"/")
        return found

    @cached_property
    def _nids(self) -> dict[bytes, int]:
        """By pattern."""
        return {exact_pattern(path): nid for nid, path in self._paths.items()}

    @cached_property
    def _pieces(self) -> dict[str, tuple[list[_Piece], list[int]]]:
        """By device digest: disjoint pieces in order, and where they start."""
        found: dict[str, list[_Piece]] = {digest: [] for digest in self.digests}
        for nid, path in self._paths.items():
            position = 0
            for device, offset, length in self.tree.extents(nid, 0, self.tree.stat(nid).size):
                if device >= 0:
                    found[self.digests[device]].append(_Piece(offset, offset + length, path, position))
                position += length
        disjoint = {digest: _disjoint(pieces) for digest, pieces in found.items()}
        return {digest: (pieces, [piece.start for piece in pieces]) for digest, pieces in disjoint.items()}


def profile_of_recording(recording: Recording, files: ImageFiles) -> Profile:
    """
    A recording as a profile of one run.

    Raises:
        UsageError: it is of another image.

    """
    return Profile(tuple(files.parts(recording)), PrefetchHeader(recording.image, recording.tool))


def _disjoint(pieces: list[_Piece]) -> list[_Piece]:
    """Each byte in one piece: the longest of those that begin first. (Sorting is stable: then the first walked.)"""
    pieces.sort(key=lambda piece: (piece.start, -piece.end))
    found: list[_Piece] = []
    position = 0
    for piece in pieces:
        start = max(piece.start, position)
        if start < piece.end:
            found.append(piece._replace(start=start, file_offset=piece.file_offset + start - piece.start))
            position = piece.end
    return found
