"""
Row 5: bytes fetched until ready, against the compressed size of the pages that the start touches.

The pages are compressed as a hot part is by default, so that a stronger codec does not make up for fetching too much.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, ratio
from benchmarks.kit.lazy import LazyMount
from benchmarks.profilerows.starts import PROGRAMS, fast_starts
from benchmarks.rows.recording import record_list
from converter.encode import Encoding
from converter.hot import hot_encoding
from lazyfs.image.codec import Codec, compress
from lazyfs.image.prefetch import literal_path, parse_prefetch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks.session import Session, Subject
    from lazyfs.image.prefetch import PrefetchEntry

TITLE = "bytes fetched until ready against the working set's compressed size"
_PAGE = 4096
_PIECE_BYTES = 1 << 20     # the default chunk size


def measure(session: Session) -> list[Figure]:
    figures = []
    for letter, subject in PROGRAMS:
        starts = fast_starts(session, letter)
        raw, stored = _working_set(session, subject)
        fetched = [start.fetched_bytes / 1e6 for start in starts]
        link = [start.link_bytes / 1e6 for start in starts]
        session.say(f"{subject.program} touches {raw / 1e6:.1f} MB of pages, {stored / 1e6:.2f} MB compressed")
        theirs = [stored / 1e6] * len(starts)
        figures += [
            ratio(f"5{letter}", f"{subject.program}: received of blobs", 1.10, fetched, theirs, raw_mb=[raw / 1e6]),
            ratio(f"5{letter}-link", "the same, all bytes on the link", None, link, theirs),
        ]
    return figures


def _working_set(session: Session, subject: Subject) -> tuple[int, int]:
    """Bytes of the pages in the recorded list, and what they are compressed, one behind another in order of touch."""
    entries = parse_prefetch(record_list(session, subject).read_bytes()).entries
    mount = LazyMount(session.place, session.lazy(subject, session.near))
    mount.mount()
    data = b"".join(_pages(mount.path, entries))
    mount.close()
    pieces = [data[start : start + _PIECE_BYTES] for start in range(0, len(data), _PIECE_BYTES)]
    level = hot_encoding(Encoding(Codec.ZSTD, 1, _PIECE_BYTES), len(data)).level
    return len(data), sum(len(compress(piece, Codec.ZSTD, level)[1]) for piece in pieces)


def _pages(tree: Path, entries: tuple[PrefetchEntry, ...]) -> Iterator[bytes]:
    seen: set[tuple[bytes, int]] = set()
    for entry in entries:
        name = literal_path(entry.pattern)
        assert name is not None, "profile run writes no patterns"
        with (tree / name.decode()).open("rb") as file:
            size = file.seek(0, 2)
            for start, end in entry.ranges or ((0, None),):
                for page in range(start // _PAGE, -(-(size if end is None else end) // _PAGE)):
                    if (name, page) not in seen:
                        seen.add((name, page))
                        file.seek(page * _PAGE)
                        yield file.read(_PAGE)
