"""Chunks that could not be stored, kept in memory for a while. Pure. Who calls: fetch.engine."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lazyfs.cache.store import CachedDevice

    Data = bytes | memoryview


class Spill:
    """
    The most recently used chunks, of at most `bytes_max` together.

    With a full disk a chunk of 256 KiB is read in two requests of 128 KiB; without this it would be fetched twice.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._chunks: OrderedDict[tuple[CachedDevice, int], Data] = OrderedDict()
        self.bytes_held = 0

    def put(self, cached: CachedDevice, index: int, data: Data) -> None:
        old = self._chunks.pop((cached, index), b"")
        self._chunks[cached, index] = data
        self.bytes_held += len(data) - len(old)
        while self.bytes_held > self._bytes_max:
            _, dropped = self._chunks.popitem(last=False)
            self.bytes_held -= len(dropped)

    def get(self, cached: CachedDevice, index: int) -> Data | None:
        data = self._chunks.get((cached, index))
        if data is not None:
            self._chunks.move_to_end((cached, index))
        return data

    def clear(self) -> None:
        self._chunks.clear()
        self.bytes_held = 0
