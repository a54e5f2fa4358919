"""
EROFS as lazyfs uses it: the metadata of a merged image, written and validated by us, mounted by the kernel.

Layer: lazyfs.image, pure: bytes in, bytes out. `write_image` makes an image, `ErofsImage.parse` validates one fully
before anything mounts it. Format: docs/format.md; Linux Documentation/filesystems/erofs.rst.
"""

from __future__ import annotations

from lazyfs.image.erofs.reader import ErofsImage, InodeStat
from lazyfs.image.erofs.writer import write_image

__all__ = ["ErofsImage", "InodeStat", "write_image"]
