"""
A part of a blob as bytes, whole and of the right size, tried again after what passes.

Layer: converter. Who calls: converter.reuse, converter.filesums, converter.hot. No state.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lazyfs import limits
from lazyfs.errors import IntegrityError
from lazyfs.registry.retry import with_retries

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs.image.digest import Digest
    from lazyfs.registry.place import ImageSource

RATE_MIN = limits.MIB      # bytes a second below which reading is given up


def read_range(
    source: ImageSource, digest: Digest, offset: int, size: int, *, check: Callable[[bytes], None] | None = None
) -> bytes:
    """
    Bytes [offset, offset + size) of a blob.

    Args:
        source: where the blob is.
        digest: of the blob.
        offset: of the first byte.
        size: how many.
        check: raises IntegrityError if the bytes are not the right ones; they are then asked for once more.

    Raises:
        IntegrityError: fewer, more or other bytes came.
        SourceError: they could not be read.

    """
    deadline = time.monotonic() + limits.REQUEST_DEADLINE_S + size / RATE_MIN

    def attempt() -> bytes:
        parts, received = [], 0
        with source.read_range(digest, offset, size, deadline) as stream:
            # To the end, so that the connection can be used again.
            while received <= size and (part := stream.read(limits.MIB)):
                parts.append(part)
                received += len(part)
        if received != size:
            raise IntegrityError(f"blob {digest.short} gave {received} bytes at {offset}, expected {size}")
        data = b"".join(parts)
        if check is not None:
            check(data)
        return data

    return with_retries(attempt, deadline)
