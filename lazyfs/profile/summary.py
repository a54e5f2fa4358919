"""
A profile in figures: totals, files, shares, layers, and how many bytes were wanted when.

Layer: lazyfs.profile, pure. Who calls: `lazyfs profile show`, picture.py. Without an image only sizes that the list
itself states are known, and nothing about layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lazyfs.image.prefetch import PrefetchHeader, format_pattern, literal_path
from lazyfs.profile.coverage import Chunks, chunks_in, count_chunks

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs.profile.files import ImageFiles
    from lazyfs.profile.parts import Profile

_BIN_COUNT: Final = 20           # of the time line: fits a terminal's height
_BAR_CHARS: Final = 40
_PATH_CHARS: Final = 80


@dataclass(slots=True)
class FileUse:
    """What is wanted of one file. `first_place`: of its first range, in the order."""

    text: str
    first_place: int
    first_ms: float | None
    size_bytes: int = 0
    range_count: int = 0


@dataclass(frozen=True, slots=True)
class LayerUse:
    """What is wanted of one layer device: the bytes themselves, and the chunks that hold them."""

    number: int
    digest: str
    size_bytes: int
    chunks: Chunks


@dataclass(frozen=True, slots=True)
class Bin:
    """Bytes first wanted from `start_ms` on, before `end_ms` (the last one: up to it)."""

    start_ms: float
    end_ms: float
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Summary:
    """
    Figures of a profile.

    Attributes:
        header: where it comes from.
        size_bytes: of all ranges whose size is known.
        range_count: of all ranges.
        open_count: ranges whose size is not known (to the end of a file, or of every file of a glob).
        files: largest first.
        shares: (share, bytes), largest share first.
        times: empty where the list tells no times.
        layers: empty without an image.
        chunks: None without an image.

    """

    header: PrefetchHeader
    size_bytes: int
    range_count: int
    open_count: int
    files: tuple[FileUse, ...]
    shares: tuple[tuple[float, int], ...]
    times: tuple[Bin, ...]
    layers: tuple[LayerUse, ...] = ()
    chunks: Chunks | None = None

    def as_json(self) -> dict[str, Any]:
        """For --json; a contract: names are only added."""
        chunks = self.chunks
        return {
            "image": self.header.image,
            "tool": self.header.tool,
            "runs": self.header.runs,
            "bytes": self.size_bytes,
            "ranges": self.range_count,
            "rangesWithoutSize": self.open_count,
            "chunks": None if chunks is None else chunks.count,
            "chunkBytes": None if chunks is None else chunks.size_bytes,
            "storedBytes": None if chunks is None else chunks.stored_bytes,
            "files": [{"path": one.text, "bytes": one.size_bytes, "ranges": one.range_count, "place": one.first_place,
                       "firstMs": one.first_ms} for one in self.files],
            "shares": [{"share": share, "bytes": size} for share, size in self.shares],
            "times": [{"startMs": one.start_ms, "endMs": one.end_ms, "bytes": one.size_bytes} for one in self.times],
            "layers": [{"layer": one.number, "device": one.digest, "bytes": one.size_bytes,
                        "chunks": one.chunks.count, "storedBytes": one.chunks.stored_bytes} for one in self.layers],
        }


def summarize(profile: Profile, files: ImageFiles | None = None) -> Summary:
    """With `files`, the profile's patterns must be paths of that image (coverage.cover, files.profile_of_recording)."""
    uses: dict[bytes, FileUse] = {}
    shares: dict[float, int] = {}
    for place, part in enumerate(profile.parts):
        use = uses.setdefault(part.pattern, FileUse(format_pattern(part.pattern), place, part.first_ms))
        use.size_bytes += part.size or 0
        use.range_count += 1
        shares[part.share] = shares.get(part.share, 0) + (part.size or 0)
    open_count = sum(part.size is None or literal_path(part.pattern) is None for part in profile.parts)
    layers, chunks = ((), None) if files is None else _layers(profile, files)
    by_size = sorted(uses.values(), key=lambda use: (-use.size_bytes, use.first_place))
    return Summary(profile.header, profile.size_bytes, len(profile.parts), open_count, tuple(by_size),
                   tuple(sorted(shares.items(), reverse=True)), _times(profile), layers, chunks)


def as_lines(summary: Summary, size: Callable[[int], str], top_count: int = 10) -> list[str]:
    """For people. `size`: writes a number of bytes."""
    header, chunks = summary.header, summary.chunks
    named = [("image", header.image), ("made by", header.tool), ("made", header.made)]
    lines = [f"{name:<9}{text}" for name, text in named if text]
    lines.append(f"{'total':<9}{size(summary.size_bytes)} in {summary.range_count} ranges of {len(summary.files)} "
                 f"files, {header.runs} run{'s' * (header.runs != 1)}")
    if summary.open_count:
        lines.append(f"{'':<9}and {summary.open_count} ranges whose size only the image knows (--image IMAGE)")
    if chunks is not None:
        lines.append(f"{'chunks':<9}{chunks.count}, {size(chunks.size_bytes)}, {size(chunks.stored_bytes)} stored")
    if len(summary.shares) > 1:
        shares = [f"{share:.0%} of runs: {size(wanted)}" for share, wanted in summary.shares]
        lines.append(f"{'shares':<9}{', '.join(shares)}")
    lines += [f"layer {one.number:<3}{size(one.size_bytes)}, {one.chunks.count} chunks, "
              f"{size(one.chunks.stored_bytes)} stored  {one.digest[:19]}" for one in summary.layers]
    lines += ["", "largest files"]
    lines += [f"  {size(use.size_bytes):>8}  {_shortened(use.text)}" for use in summary.files[:top_count]]
    if len(summary.files) > top_count:
        lines.append(f"  and {len(summary.files) - top_count} more")
    if summary.times:
        lines += ["", "bytes first wanted, by time", *_bars(summary.times, size)]
    return lines


def _bars(times: tuple[Bin, ...], size: Callable[[int], str]) -> list[str]:
    largest = max(one.size_bytes for one in times) or 1
    return [f"  {one.start_ms:>8.0f} ms  {'#' * math.ceil(_BAR_CHARS * one.size_bytes / largest):<{_BAR_CHARS}}  "
            f"{size(one.size_bytes)}" for one in times]


def _shortened(text: str) -> str:
    return text if len(text) <= _PATH_CHARS else f"{text[: _PATH_CHARS // 2]}…{text[-_PATH_CHARS // 2 :]}"


def _times(profile: Profile) -> tuple[Bin, ...]:
    timed = [(part.first_ms, part.size or 0) for part in profile.parts if part.first_ms is not None]
    if not timed:
        return ()
    end_ms = max(first_ms for first_ms, _ in timed) or 1.0
    step_ms = end_ms / _BIN_COUNT
    sizes = [0] * _BIN_COUNT
    for first_ms, wanted in timed:
        sizes[min(int(first_ms / step_ms), _BIN_COUNT - 1)] += wanted
    return tuple(Bin(round(number * step_ms, 3), round((number + 1) * step_ms, 3), wanted)
                 for number, wanted in enumerate(sizes))


def _layers(profile: Profile, files: ImageFiles) -> tuple[tuple[LayerUse, ...], Chunks]:
    sizes = [0] * len(files.tables)
    for part in profile.parts:
        for device, _, length in files.extents(part):
            if device >= 0:
                sizes[device] += length
    chunks = chunks_in(profile, files)
    own: list[list[tuple[int, int]]] = [[] for _ in files.tables]
    for device, chunk in chunks:
        own[device].append((device, chunk))
    return tuple(
        LayerUse(device + 1, digest, sizes[device], count_chunks(own[device], files.tables))
        for device, digest in enumerate(files.digests)
    ), count_chunks(chunks, files.tables)
