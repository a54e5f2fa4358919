"""
A few long tasks side by side in threads of our own, first error wins.

Unlike an executor's, these threads are daemons and joined only for a moment after an error: neither a ^C nor an error
must wait for a registry that has stopped answering. Who calls: converter.build, converter.hot. Layer: converter.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")
STOP_WAIT_S = 5.0
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(Exception):
    """Another task failed, or the user wants to stop: never seen outside this package."""


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """
    Hold back ^C and SIGTERM for a moment: something is made that the clean-up would not know of yet.

    Python runs signal handlers in its main thread only, so elsewhere there is nothing to hold back. (Blocking the
    signals would not do: a library's thread takes them, and the main thread runs the handler all the same.)
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in _INTERRUPTS}
    try:
        yield
    finally:
        for interrupt, handler in before.items():
            signal.signal(interrupt, handler or signal.SIG_DFL)
        for number in came:
            signal.raise_signal(number)


class Parallel(Generic[T]):
    """Runs tasks; each must call check() often, which ends it once another one has failed."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, Callable[[], T]]] = []
        self._results: dict[int, T] = {}
        self._error: BaseException | None = None
        self._ended = threading.Semaphore(0)      # released by each thread at its end

    def check(self) -> None:
        """Raises StoppedError when the calling task should end."""
        if self._stop.is_set():
            raise StoppedError

    def run(self, tasks: Sequence[Callable[[], T]], at_once: int) -> list[T]:
        """
        The tasks' results, in their order; they start in their order too.

        Raises: what the first task to fail raised, or what interrupted the calling thread.
        """
        self._waiting = list(enumerate(tasks))[::-1]
        count = min(at_once, len(tasks))
        threads = [threading.Thread(target=self._work, name=f"layer-{n}", daemon=True) for n in range(count)]
        try:
            for thread in threads:
                thread.start()
            for _ in threads:
                self._ended.acquire()
                self._raise_error()
        except BaseException:
            self._stop.set()
            deadline = time.monotonic() + STOP_WAIT_S
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(0.0, deadline - time.monotonic()))
            raise
        for thread in threads:
            thread.join()      # it has done its last task
        return [self._results[index] for index in range(len(tasks))]

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            self._work_off()
        finally:
            self._ended.release()

    def _work_off(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                if not self._waiting:
                    return
                index, task = self._waiting.pop()
            try:
                self._results[index] = task()
            except BaseException as error:  # noqa: BLE001  (handed to the caller's thread)
                with self._lock:
                    if self._error is None:
                        self._error = error
                self._stop.set()
