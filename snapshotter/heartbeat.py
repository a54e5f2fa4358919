"""
A server's sign of life for the door: now and then it reads its records, and says so.

A server that hangs (stopped, thrashing, a lock that nobody gives back) does not die, so the door would pass requests
on to it for ever. Waiting for the daemon, or for a disk for a while, is no hang.

Layer: snapshotter, above nothing of it. Who calls: cli.snapshotter. State: one thread.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable

_CLOSE_S = 1.0
_LOG = logging.getLogger("lazyfs.snapshotter")


class Heartbeat:
    """`check`, then `tell`, every `every_s` seconds, until the block is left."""

    def __init__(self, check: Callable[[], object], tell: Callable[[], object], every_s: float) -> None:
        self._check, self._tell, self._every_s = check, tell, every_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while not self._end.wait(self._every_s):
            try:
                self._check()
            except Exception as error:  # noqa: BLE001 - it answers: what is wrong is said to who asks for something
                _LOG.debug("heartbeat: %s", error)
            try:
                self._tell()
            except OSError:              # the door is gone, and we with it
                return
