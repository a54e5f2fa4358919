"""
How long the start of an image with a hot part lasts: until then the kernel reads nothing ahead on its mount.

Read-ahead asks for blocks beside the hot ones, and each of those costs a whole chunk of a layer: a start of numpy moved
19.3 MB with 128 KiB of it and 6.1 MB with one page, one of tensorflow 168 and 56 MB (hot: 4.3 and 54.5 MB). Afterwards
read-ahead saves requests again. A file keeps the read-ahead that it was opened with.

Layer: node, pure. Who calls: node.worker, now and then. State: one object a mount, from its making to the end of its
start; a worker that takes over begins anew.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lazyfs.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Callable

QUIET_S = 10.0                   # so long after the last read the start is over: what it wants now is in the page cache
# So much of the layers' chunks (uncompressed) and the list is of another start, or the start is over: what is read now
# is not hot. A start that the list fits touches a few.
COLD_BYTES_MAX = 64 * MIB


class HotStart:
    """`begun`: the program may have read all that is hot already, as far as we know: a worker that took over."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, begun: bool = False) -> None:
        self._clock = clock
        self._read_count = 0
        self._last_read: float | None = clock() if begun else None

    def is_over(self, read_count: int, cold_bytes: int) -> bool:
        """
        Whether the start is over now.

        Args:
            read_count: of reads so far that reached us. Until the first one there is no start: an image may be mounted
                long before its container.
            cold_bytes: of the layers' chunks that were read so far, uncompressed.

        """
        now = self._clock()
        if read_count != self._read_count:
            self._read_count, self._last_read = read_count, now
        if cold_bytes > COLD_BYTES_MAX:
            return True
        return self._last_read is not None and now - self._last_read >= QUIET_S
