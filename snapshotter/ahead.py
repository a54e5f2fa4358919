"""
What is worth doing though nobody asks for it: one thread, and a queue that takes no more than it can hold.

Layer: snapshotter, above nothing of it. Who calls: core, to have lazy images mounted as soon as they are pulled, and
to say that no container uses one any more. Nobody waits for it, and nothing depends on it: what fails is logged, what
has no room is left out, what hangs is left behind. State: the queue; the thread is started by the first work.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from typing import TYPE_CHECKING, Final

from lazyfs.errors import LazyfsError

if TYPE_CHECKING:
    from collections.abc import Callable

WAITING_MAX: Final = 256         # a node pulls some at once; one more is mounted by its container, as ever
CLOSE_S: Final = 3.0             # for what is under way: of the snapshotter's 25 s
_LOG = logging.getLogger("lazyfs.snapshotter")


class Ahead:
    """Work in the order in which it came. For any number of threads."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[tuple[str, Callable[[], object]]] = queue.Queue(WAITING_MAX)
        self._mutex = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ended = False

    def soon(self, what: str, work: Callable[[], object]) -> None:
        """Have `work` done. `what`: for the log. Does not wait, does not fail."""
        with self._mutex:
            if self._ended:
                return
            with contextlib.suppress(queue.Full):
                self._waiting.put_nowait((what, work))
            if self._thread is None:   # not a pool's: those are waited for when the process ends
                self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """What has not begun is left out; what is under way has CLOSE_S."""
        with self._mutex:
            self._ended = True
            with contextlib.suppress(queue.Empty):
                while True:
                    self._waiting.get_nowait()
            self._waiting.put_nowait(("", lambda: None))   # wakes the thread
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while not self._ended:
            what, work = self._waiting.get()
            try:
                work()
            except LazyfsError as error:
                _LOG.info("%s is left alone: %s", what, error)
            except Exception:   # noqa: BLE001 - the next one may do
                _LOG.exception("%s: unexpected", what)
