"""
A lazy image's source whose hot blob may be gone: its chunks are then read where they were copied from.

The bootstrap's tables name the hot blob alone for the chunks that it holds; the layers' blobs carry tables of their
own, behind their chunks. They come from the registry unchecked, and that is enough: they only say where to look, and
every chunk's digest is checked by whoever reads it. Who calls: node.mounted makes it, fetch threads read through it.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from lazyfs.errors import DeadlineError, FormatError, NotFoundError
from lazyfs.image.table import parse_table
from lazyfs.registry.streams import read_exactly

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from numpy.typing import NDArray

    from lazyfs.image.bootstrap import BlobRef
    from lazyfs.image.descriptor import Document
    from lazyfs.image.digest import Digest
    from lazyfs.image.table import ChunkTable
    from lazyfs.registry.place import ByteStream, ImageSource

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Place:
    """`size` bytes of a blob, from `offset`."""

    blob: Digest
    offset: int
    size: int


class HotCopies:
    """
    place.ImageSource over another one. Thread-safe.

    State of the search, under _lock: the layers' blobs not looked at yet, the devices not found yet, and where the
    chunks of the hot blob are, by their offset in it.
    """

    def __init__(self, source: ImageSource, blobs: Sequence[BlobRef],
                 devices: Sequence[tuple[Digest, ChunkTable]]) -> None:
        self._source = source
        self._hot = next((number for number, blob in enumerate(blobs) if blob.hot), -1)
        self._hot_digest = blobs[self._hot].digest if self._hot >= 0 else None
        self._lock = threading.Lock()
        self._is_gone = False
        self._unread = [blob for blob in blobs if not blob.hot]
        self._wanted = {digest: table for digest, table in devices if self._copied(table).any()}
        self._places: dict[int, _Place] = {}

    @property
    def name(self) -> str:
        return self._source.name

    def root(self) -> Document:
        return self._source.root()

    def document(self, digest: Digest) -> Document:
        return self._source.document(digest)

    def open_blob(self, digest: Digest, size: int) -> ByteStream:
        return self._source.open_blob(digest, size)

    def read_blob(self, digest: Digest, size: int) -> bytes:
        return self._source.read_blob(digest, size)

    def close(self) -> None:
        self._source.close()

    def read_range(self, digest: Digest, offset: int, size: int, deadline: float) -> ByteStream:
        if digest != self._hot_digest:
            return self._source.read_range(digest, offset, size, deadline)
        gone = None
        if not self._is_gone:
            try:
                return self._source.read_range(digest, offset, size, deadline)
            except NotFoundError as error:
                gone = error
        pieces = self._pieces(offset, size, deadline, gone)
        if pieces is None:   # no better idea; perhaps it has come back
            return self._source.read_range(digest, offset, size, deadline)
        return _Pieces(self._source, pieces, deadline)

    def _pieces(self, offset: int, size: int, deadline: float, gone: NotFoundError | None) -> list[_Place] | None:
        """Where the hot blob's bytes [offset, offset + size) are in other blobs, whole chunks; None: not known."""
        self._search(deadline, gone)
        found: list[_Place] = []
        end = offset + size
        while offset < end:
            place = self._places.get(offset)
            if place is None:
                return None
            offset += place.size
            last = found[-1] if found else None
            if last is not None and last.blob == place.blob and last.offset + last.size == place.offset:
                found[-1] = _Place(last.blob, last.offset, last.size + place.size)
            else:
                found.append(place)
        return found if offset == end else None

    def _search(self, deadline: float, gone: NotFoundError | None) -> None:
        """Read the tables of the layers' blobs; goes on where an earlier call was cut short. Raises SourceError."""
        if not self._lock.acquire(timeout=max(deadline - time.monotonic(), 0)):
            raise DeadlineError(f"{self.name}: the tables of the layers' blobs did not come in time")
        try:
            if not self._is_gone:
                _log.warning("%s: its hot blob is gone (%s); the layers' own blobs are read instead", self.name, gone)
                self._is_gone = True
            while self._wanted and self._unread:
                try:
                    self._read_tables(self._unread[0], deadline)
                except (FormatError, NotFoundError) as error:
                    _log.warning("%s: blob %s is of no help: %s", self.name, self._unread[0].digest.short, error)
                del self._unread[0]
        finally:
            self._lock.release()

    def _read_tables(self, blob: BlobRef, deadline: float) -> None:
        """Take over what one layer's blob says, if it is that of a device with copied chunks."""
        from lazyfs.image.blob import FOOTER_BYTES, parse_footer  # noqa: PLC0415 - start-up time, and hardly ever used

        footer = parse_footer(self._read(blob, blob.size - FOOTER_BYTES, FOOTER_BYTES, deadline), blob.size)
        shape = (footer.chunk_size, footer.device_size)
        if not any((table.chunk_size, table.device_size) == shape for table in self._wanted.values()):
            return   # also bounds what is read next: a device of this size is known
        own = parse_table(self._read(blob, *footer.table, deadline), *shape, [footer.data_size])
        table = self._wanted.pop(own.device_digest(), None)
        if table is None:
            return
        for number in np.flatnonzero(self._copied(table)).tolist():
            copy, row = table.rows[number], own.rows[number]
            if copy["stored_size"] == row["stored_size"] and copy["codec"] == row["codec"]:
                place = _Place(blob.digest, int(row["blob_offset"]), int(row["stored_size"]))
                self._places[int(copy["blob_offset"])] = place

    def _copied(self, table: ChunkTable) -> NDArray[np.bool_]:
        """Which chunks the hot blob holds."""
        copied: NDArray[np.bool_] = (table.rows["blob_index"] == self._hot) & (table.rows["stored_size"] > 0)
        return copied

    def _read(self, blob: BlobRef, offset: int, size: int, deadline: float) -> bytes:
        if offset < 0:
            raise FormatError(f"a blob of {blob.size} bytes")
        with self._source.read_range(blob.digest, offset, size, deadline) as stream:
            return read_exactly(stream, size)


class _Pieces:
    """place.ByteStream of ranges one after another, each asked for when it is reached."""

    def __init__(self, source: ImageSource, pieces: list[_Place], deadline: float) -> None:
        self._source = source
        self._todo = pieces[::-1]
        self._deadline = deadline
        self._stream: ByteStream | None = None

    def read(self, size: int) -> bytes:
        while True:
            if self._stream is None:
                if not self._todo:
                    return b""
                place = self._todo.pop()
                self._stream = self._source.read_range(place.blob, place.offset, place.size, self._deadline)
            data = self._stream.read(size)
            if data:
                return data
            self.close()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()
