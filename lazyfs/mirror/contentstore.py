"""
containerd's content store, read as files: what is there is served without a second copy.

Layer: mirror. Who calls: mirror.blobs, mirror.pieces (for peers). State: none. containerd gives a blob its name only
after it has checked the digest, and never changes it then; it may remove it at any time, which an open file survives.
What is wrong with a file here is noticed by size; by digest at whoever gets it (containerd, a peer).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lazyfs.image.digest import Digest

_BLOBS = "io.containerd.content.v1.content/blobs/sha256"


@dataclass(frozen=True, slots=True)
class OpenBlob:
    """A blob that is open; `close` it. `file`: a descriptor."""

    file: int
    size: int

    def close(self) -> None:
        os.close(self.file)


class ContentStore:
    """`root`: containerd's (config: mirror.containerd_root); empty: nothing is ever found. Thread-safe."""

    def __init__(self, root: str) -> None:
        self._blobs = blobs_directory(root) if root else None

    def open(self, digest: Digest, size: int | None = None) -> OpenBlob | None:
        """
        A blob of this digest; None: it is not there, or has not `size` bytes, or cannot be read.

        Opens and stats one file: quick enough for the loop, unless the disk hangs; then a thread's work.

        """
        if self._blobs is None:
            return None
        try:
            file = os.open(self._blobs / digest.hex, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or (size is not None and status.st_size != size):
            os.close(file)
            return None
        return OpenBlob(file, status.st_size)


def blobs_directory(root: str) -> Path:
    """Where containerd keeps its blobs below its root."""
    return Path(root, _BLOBS)
