"""
Directories for the next snapshots, made before they are wanted: nobody waits for the disk then but for a rename.

    <root>/spare/<n>/         fs, work: as in snapshots/<id>; empty, ours, with the modes of directories.py

It matters where snapshots come and go: ext4 gives no inode again that was freed within the last five seconds, and each
mkdir looks at all of these first.

Layer: snapshotter, above nothing of it. Who calls: directories. State: the spares that are ready; a thread makes more.
What a kill leaves in spare/ is removed by the next start.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

COUNT: Final = 4                 # of containers that are prepared at once; for more, directories are made as they come
_LOG = logging.getLogger("lazyfs.snapshotter")


class Spares:
    """For any number of threads."""

    def __init__(self, place: Path, make: Callable[[str], None]) -> None:
        """
        `place`: for them alone. `make`: makes one, at a path.

        Raises:
            OSError: `place` cannot be made.

        """
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(mode=0o700, exist_ok=True)
        self._place = str(place)
        self._make = make
        self._ready: deque[str] = deque()
        self._numbers = itertools.count()
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="spare")

    def move_to(self, path: str) -> bool:
        """Whether there was one that could be moved; it is at `path` now, and its times are of now."""
        try:
            spare = self._ready.popleft()
            os.utime(f"{spare}/fs")
            os.rename(spare, path)   # noqa: PTH104 - no Path: see directories
        except (IndexError, OSError):   # somebody has cleaned up: one is made as without us
            return False
        return True

    def replenish(self) -> None:
        """Have another one made, if there is room. Does not wait."""
        if len(self._ready) < COUNT:
            with contextlib.suppress(RuntimeError):   # closed meanwhile
                self._maker.submit(self._add)

    def close(self) -> None:
        self._maker.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self._place, ignore_errors=True)

    def _add(self) -> None:
        if len(self._ready) >= COUNT:
            return
        path = f"{self._place}/{next(self._numbers)}"
        try:
            self._make(path)
        except Exception as error:   # noqa: BLE001 - who wants a snapshot will be told
            _LOG.debug("no spare directory: %s", error)
            shutil.rmtree(path, ignore_errors=True)
        else:
            self._ready.append(path)
