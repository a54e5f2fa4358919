"""
How much of the disk a directory uses, counted as containerd does (continuity's fs.DiskUsage): allocated blocks, inodes,
a hard link once, everything below and the directory itself; no link followed, no file opened.

Layer: snapshotter, above model. Who calls: core, never within a transaction. What vanishes meanwhile does not count.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from snapshotter.model import Usage

if TYPE_CHECKING:
    from pathlib import Path

_BLOCK_BYTES = 512               # the unit of st_blocks, whatever the file system's own blocks are


def disk_usage(directory: Path) -> Usage:
    """Count. Raises OSError: the directory itself cannot be looked at; what is below it is skipped then."""
    blocks, inodes = os.lstat(directory).st_blocks, 1
    linked: set[tuple[int, int]] = set()
    pending = [os.fspath(directory)]
    while pending:
        with suppress(FileNotFoundError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif status.st_nlink > 1:
                    if (status.st_dev, status.st_ino) in linked:
                        continue
                    linked.add((status.st_dev, status.st_ino))
                blocks += status.st_blocks
                inodes += 1
    return Usage(blocks * _BLOCK_BYTES, inodes)
