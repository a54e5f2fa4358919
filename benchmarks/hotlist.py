"""
Turn the chunks that a recorded start touched into a prefetch list (format: lazyfs/image/prefetch.py).

The worker knows the chunks in the order of their first touch; the bootstrap knows which files lie in them. Each chunk
becomes the largest piece of a file within it, neighbouring pieces of one file become one range.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from lazyfs.image.model import FileType
from lazyfs.image.prefetch import PREFETCH_VERSION, format_entry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazyfs.image.erofs import ErofsImage


class _Piece(NamedTuple):
    """A run of a file's bytes in a device."""

    start: int  # in the device
    end: int
    path: bytes
    file_offset: int


class _Range(NamedTuple):
    path: bytes
    start: int
    end: int


def make_list(tree: ErofsImage, devices: Sequence[tuple[str, int]], touched: dict[str, list[int]]) -> str:
    """
    The list's text.

    Args:
        tree: the merged tree.
        devices: (digest, chunk size in bytes) of the image's layer devices, in their order.
        touched: chunk indexes by device digest, in the order of first touch.

    """
    pieces = _pieces(tree, len(devices))
    ranges: list[_Range] = []
    for number, (digest, chunk_size) in enumerate(devices):
        starts = [piece.start for piece in pieces[number]]
        for chunk in touched.get(digest, []):
            found = _largest(pieces[number], starts, chunk * chunk_size, (chunk + 1) * chunk_size)
            if found is None:
                continue
            if ranges and ranges[-1].path == found.path and ranges[-1].end == found.start:
                found = _Range(found.path, ranges.pop().start, found.end)
            ranges.append(found)
    lines = [format_entry(part.path, [(part.start, part.end)]) for part in ranges]
    return "\n".join([f"# lazyfs-prefetch {PREFETCH_VERSION}", *lines, ""])


def _pieces(tree: ErofsImage, device_count: int) -> list[list[_Piece]]:
    """By device: which file's bytes are where, in order; where several share bytes (equal files) the first."""
    found: list[list[_Piece]] = [[] for _ in range(device_count)]
    for path, nid in tree.walk():
        status = tree.stat(nid)
        if status.type is not FileType.REGULAR:
            continue
        position = 0
        for device, offset, length in tree.extents(nid, 0, status.size):
            if device >= 0:
                found[device].append(_Piece(offset, offset + length, path.lstrip(b"/"), position))
            position += length
    return [sorted(pieces) for pieces in found]


def _largest(pieces: list[_Piece], starts: list[int], start: int, end: int) -> _Range | None:
    best: _Range | None = None
    index = max(bisect_right(starts, start) - 1, 0)
    while index < len(pieces) and pieces[index].start < end:
        piece = pieces[index]
        low, high = max(piece.start, start), min(piece.end, end)
        if high > low and (best is None or high - low > best.end - best.start):
            best = _Range(piece.path, piece.file_offset + low - piece.start, piece.file_offset + high - piece.start)
        index += 1
    return best
