"""
Blobs that lie in files of this machine: the reading half of a source.

Layer: registry. Who calls: layout.py and dockerarchive.py, whose sources are such. No state.
"""

from __future__ import annotations

import abc
import time
from typing import TYPE_CHECKING

from lazyfs.errors import DeadlineError, FormatError, IntegrityError
from lazyfs.limits import BOOTSTRAP_BYTES_MAX
from lazyfs.registry.documents import check_blob
from lazyfs.registry.streams import read_exactly

if TYPE_CHECKING:
    from lazyfs.image.digest import Digest
    from lazyfs.registry.files import Extent
    from lazyfs.registry.streams import FileStream


class FileBlobs(abc.ABC):
    """place.ImageSource's three ways to read a blob. Whoever derives from it says where a blob lies."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """As place.ImageSource has it."""

    @abc.abstractmethod
    def _locate(self, digest: Digest) -> Extent:
        """Raises NotFoundError, SourceError."""

    def open_blob(self, digest: Digest, size: int) -> FileStream:
        """As place.ImageSource has it. Raises IntegrityError if the blob has another size."""
        extent, what = self._locate(digest), self._what(digest)
        if size != extent.size:
            extent.stream(what).close()
            raise IntegrityError(f"{what}: {extent.size} bytes, expected {size}",
                                 hint="the blob is damaged or was cut short: write the image there again")
        return extent.stream(what)

    def read_blob(self, digest: Digest, size: int) -> bytes:
        """As place.ImageSource has it."""
        if size > BOOTSTRAP_BYTES_MAX:
            raise FormatError(f"{self._what(digest)}: {size} bytes are too many to be read at once")
        with self.open_blob(digest, size) as stream:
            return check_blob(read_exactly(stream, size), digest, size, self.name)

    def read_range(self, digest: Digest, offset: int, size: int, deadline: float) -> FileStream:
        """As place.ImageSource has it: local files are waited for, but not begun with after the deadline."""
        assert offset >= 0
        assert size >= 0
        extent, what = self._locate(digest), self._what(digest)
        error: IntegrityError | DeadlineError | None = None
        if offset + size > extent.size:
            error = IntegrityError(f"{what}: {extent.size} bytes, expected at least {offset + size}")
        elif time.monotonic() >= deadline:
            error = DeadlineError(f"{what}: no time left")
        if error is not None:
            extent.stream(what).close()
            raise error
        return extent.stream(what, offset, size)

    def _what(self, digest: Digest) -> str:
        return f"{self.name}: blob {digest.short}"
