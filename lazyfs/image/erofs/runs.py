"""
Where the data of all regular files of an image lies, as arrays: for questions from a device's blocks back to files.

Layer: lazyfs.image, pure. Who calls: reader.py. The views belong to an image that was checked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lazyfs.image.erofs import ondisk
from lazyfs.image.erofs.inodes import inode_columns
from lazyfs.image.erofs.ondisk import BLOCK_BYTES, BLOCK_SHIFT, INDEX_BYTES, Int64s, Views

RUN_COUNT_MAX = 1 << 22          # 160 bytes of memory each while they are made; images of files have one a file


@dataclass(frozen=True, slots=True, eq=False)
class FileRuns:
    """
    Blocks of devices that are files', a row a run, by device and then first block.

    `device` counts from 0; `first` block and block `count` in it; `nid` of the file and `file_block` where it is in it.
    """

    device: Int64s
    first: Int64s
    count: Int64s
    nid: Int64s
    file_block: Int64s


def file_runs(views: Views, nids: Int64s) -> FileRuns | None:
    """Of these inodes. None: there are more than RUN_COUNT_MAX."""
    inodes = inode_columns(views, nids)
    rows = np.flatnonzero(inodes.index_counts)
    counts = inodes.index_counts[rows]
    total = int(counts.sum())
    if total > RUN_COUNT_MAX:
        return None
    files = np.repeat(np.arange(len(rows)), counts)
    units = np.arange(total, dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    tables = (inodes.bodies[rows] + INDEX_BYTES - 1) // INDEX_BYTES
    indexes = views.indexes[tables[files] + units]
    shifts = (inodes.rows["u"][rows] & ondisk.CHUNK_SHIFT_MASK).astype(np.int64)[files]
    file_blocks = ((inodes.sizes[rows] + BLOCK_BYTES - 1) >> BLOCK_SHIFT)[files]
    begin = units << shifts
    length = np.minimum(file_blocks - begin, np.int64(1) << shifts)
    device, first = indexes["device"].astype(np.int64) - 1, indexes["block"].astype(np.int64)
    stored = np.flatnonzero(indexes["block"] != ondisk.HOLE_BLOCK)
    order = stored[np.lexsort((first[stored], device[stored]))]
    return FileRuns(device[order], first[order], length[order], inodes.nids[rows[files[order]]], begin[order])
