"""
Images and devices for tests of profiles, made without a conversion.

    files = image_files([("a", 0, 4096), ("b/c", 65536, 70000)])     # path, offset in the device, size
    recording([(0, 0, 4096, 1.5)])                                   # device, start, end, ms
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from converter.overlay import merge
from lazyfs.image.codec import Codec
from lazyfs.image.digest import Digest
from lazyfs.image.erofs import ErofsImage, write_image
from lazyfs.image.model import EMPTY_MAP, DataMap, LayerEntry
from lazyfs.image.table import ROW, ChunkTable
from lazyfs.profile.files import ImageFiles
from lazyfs.profile.recording import Recording, Touch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CHUNK = 1 << 16
DEVICE_BYTES = 1 << 20
STORED_BYTES = 1000      # of each chunk


def digest(device: int) -> str:
    return Digest.of(b"device %d" % device).text


def files_of(tree: ErofsImage, sizes: Sequence[int], digests: Sequence[str] = ()) -> ImageFiles:
    """Tables whose chunks all have data."""
    tables = []
    for size in sizes:
        rows = np.zeros(-(-size // CHUNK), dtype=ROW)
        rows["codec"], rows["stored_size"] = Codec.LZ4, STORED_BYTES
        tables.append(ChunkTable(CHUNK, size, rows))
    return ImageFiles(tree, tables, digests or [digest(index) for index in range(len(sizes))])


def image_files(*layers: Iterable[tuple[str, int, int]]) -> ImageFiles:
    """An image of these layers, each (path, offset in its device, size of the file)."""
    entries = [[_file(*one) for one in layer] for layer in layers]
    root = merge(entries, names=[f"layer {number}" for number in range(len(entries))])
    sizes = [DEVICE_BYTES] * len(layers)
    return files_of(ErofsImage.parse(write_image(root, sizes), sizes), sizes)


def _file(path: str, offset: int, size: int) -> LayerEntry:
    shift = max((size - 1).bit_length(), 12)
    data = DataMap(shift, ((0, 1, offset // 4096),)) if size else EMPTY_MAP
    return LayerEntry(path.encode(), size=size, data=data)


def recording(touches: Iterable[tuple[int, int, int, float]], devices: int = 1, **changes) -> Recording:
    made = tuple(Touch(*touch) for touch in touches)
    fields = {"image": "app@sha256:0", "tool": "lazyfs test", "containers": ("web",), **changes}
    return Recording(devices=tuple((digest(index), DEVICE_BYTES) for index in range(devices)), touches=made, **fields)
