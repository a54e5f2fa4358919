"""
Which ranges of which files each chunk of a hot device holds: what the kernel is to read when that chunk has arrived.

Layer: node, pure. Who calls: node.warming, in a thread. Several files may have the same blocks; one of them is named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lazyfs import limits
from lazyfs.image.hot import hot_starts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lazyfs.image.erofs import ErofsImage
    from lazyfs.image.erofs.runs import FileRuns
    from lazyfs.image.hot import Extents

    Int64s = NDArray[np.int64]

_BLOCK_SHIFT = limits.BLOCK_SIZE_BYTES.bit_length() - 1
EXTENT_COUNT_MAX = 1 << 18       # a start of tensorflow has 29,000; rows take 150 bytes each
_DEVICE_SHIFT = 32               # block addresses have 32 bits


@dataclass(frozen=True, slots=True)
class WarmPlan:
    """
    A row a range, in the order of the hot device.

    `chunks`: the chunk of the hot device that has the last of it; `nids`: the file; `starts`, `sizes`: bytes.
    `paths`: of the files, from the root of the image on, without a slash in front.
    """

    chunks: list[int]
    nids: list[int]
    starts: list[int]
    sizes: list[int]
    paths: dict[int, bytes]


def make_warm_plan(extents: Extents, chunk_size: int, tree: ErofsImage) -> WarmPlan:
    """Of a hot device in chunks of so many bytes. Empty where there are too many extents, or runs of files."""
    runs = tree.file_runs() if len(extents) <= EXTENT_COUNT_MAX else None
    if runs is None or not len(runs.nid):
        return WarmPlan([], [], [], [], {})
    chunk, key, end = _pieces(extents, chunk_size.bit_length() - 1 - _BLOCK_SHIFT)
    chunk, nid, file_block, count = _in_files(chunk, key, end, runs)
    same = (chunk[1:] == chunk[:-1]) & (nid[1:] == nid[:-1]) & (file_block[1:] == (file_block + count)[:-1])
    begins = np.concatenate([[0], np.flatnonzero(~same) + 1]) if len(nid) else np.zeros(0, dtype=np.int64)
    sizes = np.add.reduceat(count, begins) if len(nid) else count
    paths = tree.paths(nid)
    return WarmPlan(chunk[begins].tolist(), nid[begins].tolist(), (file_block[begins] << _BLOCK_SHIFT).tolist(),
                    (sizes << _BLOCK_SHIFT).tolist(), paths)


def _pieces(extents: Extents, shift: int) -> tuple[Int64s, Int64s, Int64s]:
    """The extents, cut where the hot device's chunks end: chunk; first block and its end, with the device above."""
    start, count = hot_starts(extents), extents["count"].astype(np.int64)
    spans = ((start + count - 1) >> shift) - (start >> shift) + 1
    extent = np.repeat(np.arange(len(extents)), spans)
    chunk = (start >> shift)[extent] + np.arange(len(extent)) - np.repeat(np.cumsum(spans) - spans, spans)
    low = np.maximum(chunk << shift, start[extent])
    high = np.minimum((chunk + 1) << shift, (start + count)[extent])
    key = (extents["device"].astype(np.int64) << _DEVICE_SHIFT) + extents["first"] - start
    return chunk, key[extent] + low, key[extent] + high


def _in_files(chunk: Int64s, key: Int64s, end: Int64s, runs: FileRuns) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    """Of pieces of devices those parts that are files': chunk, nid, block in the file, blocks."""
    run_key = (runs.device << _DEVICE_SHIFT) + runs.first
    run_end = run_key + runs.count
    first = np.maximum(np.searchsorted(run_key, key, side="right") - 1, 0)
    spans = np.maximum(np.searchsorted(run_key, end, side="left") - first, 0)
    piece = np.repeat(np.arange(len(key)), spans)
    run = first[piece] + np.arange(len(piece)) - np.repeat(np.cumsum(spans) - spans, spans)
    low, high = np.maximum(key[piece], run_key[run]), np.minimum(end[piece], run_end[run])
    kept = np.flatnonzero(low < high)
    piece, run, low, high = piece[kept], run[kept], low[kept], high[kept]
    return chunk[piece], runs.nid[run], runs.file_block[run] + low - run_key[run], high - low
