"""
A layer device as one image sees it: its table, its place in the cache, its blobs, and what was read of it.

Two images with the same layer have two of these over one CachedDevice. Who calls: node (makes them), fs (hands them
to Fetcher.read), fetch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lazyfs.errors import BugError, LazyfsError
from lazyfs.fetch.constants import (
    ERROR_MEMORY_COUNT_MAX,
    ERROR_MEMORY_S,
    READAHEAD_BYTES_MAX,
    READAHEAD_SEQUENCE_BYTES_MIN,
)
from lazyfs.fetch.readahead import Readahead
from lazyfs.image.codec import Codec
from lazyfs.peers.model import Kind, Resource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazyfs.cache.store import CachedDevice
    from lazyfs.fetch.hotview import HotView
    from lazyfs.image.digest import Digest
    from lazyfs.image.table import ChunkTable
    from lazyfs.registry.place import ImageSource

    Blob = tuple[ImageSource, Digest, int]


@dataclass(slots=True, eq=False)
class FetchDevice:
    """
    `blobs[i]` is where the rows with blob_index i are: (source, digest, size in bytes).

    :hot: which of its blocks are in the image's hot device too; None: there is none, or this is it.
    :resource: what peers call it.
    :image: what it is of, as its owner says it (node: MountOrder); None: nobody said.
    :origin_chunks: so many of its chunks this node has had from the registry since it was opened.
    :touched: one byte a chunk, 1 once a read asked for it (and was not answered by the hot device).
    :touched_stored_bytes: what these chunks are in their blobs; the least that the link has to carry.
    """

    table: ChunkTable
    cached: CachedDevice
    blobs: Sequence[Blob]
    hot: HotView | None = None
    resource: Resource = field(init=False)
    image: object = field(init=False, default=None)
    origin_chunks: int = field(init=False, default=0)
    touched: bytearray = field(init=False)
    touched_stored_bytes: int = field(init=False, default=0)
    shift: int = field(init=False)
    size: int = field(init=False)
    readahead: Readahead = field(init=False)
    _errors: dict[int, tuple[float, LazyfsError]] = field(init=False)

    def __post_init__(self) -> None:
        table, cached = self.table, self.cached
        if (cached.chunk_size, cached.device_size) != (table.chunk_size, table.device_size):
            raise BugError(f"device {cached.digest.short}: the cache has other sizes than the table")
        self.touched = bytearray(table.chunk_count)
        self.shift = table.chunk_size.bit_length() - 1
        self.size = table.device_size
        self.resource = Resource(Kind.DEVICE, cached.digest, table.device_size, table.chunk_size)
        size = table.chunk_size
        self.readahead = Readahead(max(1, READAHEAD_BYTES_MAX // size), max(2, READAHEAD_SEQUENCE_BYTES_MIN // size))
        self._errors = {}
        cached.mark_zeros(np.flatnonzero(table.rows["codec"] == Codec.ZERO).tolist())

    def touch(self, first: int, last: int) -> list[int]:
        """Note that a read asks for chunks `first` to `last`; returns those touched for the first time."""
        fresh = [index for index in range(first, last + 1) if not self.touched[index]]
        for index in fresh:
            self.touched[index] = 1
            self.touched_stored_bytes += int(self.table.rows["stored_size"][index])
        return fresh

    def remember_error(self, index: int, error: LazyfsError) -> None:
        """A read of this chunk within the next ERROR_MEMORY_S fails at once with the same error."""
        if len(self._errors) >= ERROR_MEMORY_COUNT_MAX:
            del self._errors[next(iter(self._errors))]
        self._errors[index] = (time.monotonic() + ERROR_MEMORY_S, error)

    def remembered_error(self, index: int) -> LazyfsError | None:
        until, error = self._errors.get(index, (0.0, None))
        if error is not None and time.monotonic() >= until:
            del self._errors[index]
            return None
        return error
