"""
The threads that do the blocking work, and their way back into the loop.

Own threads instead of trio.to_thread: a transfer costs no task, no limiter and no thread hand-over back into one, and
threads that hang in a source can be left behind when the worker ends (they are daemons). Who calls: fetch.engine.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from typing import TYPE_CHECKING

import trio

from lazyfs.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs.fetch.transfer import Transfer

_log = logging.getLogger(__name__)


class Workers:
    """At most `thread_count_max` threads, started when needed. Methods are for the loop."""

    def __init__(
        self, thread_count_max: int, finished: Callable[[Transfer], None], nearly_done: Callable[[], None]
    ) -> None:
        self._thread_count_max = thread_count_max
        self._finished = finished
        self._nearly_done = nearly_done
        self._token = trio.lowlevel.current_trio_token()
        self._inbox: queue.SimpleQueue[Transfer | None] = queue.SimpleQueue()
        self._thread_count = 0
        self._closed = False
        self._drained = trio.Event()
        self.running: set[Transfer] = set()

    def start(self, transfer: Transfer) -> None:
        """
        Never more at once than there may be threads: the engine's limits see to that.

        Where the machine gives no further thread it waits for one of those there are; if there is none, it fails.
        """
        self.running.add(transfer)
        if len(self.running) > self._thread_count:
            assert self._thread_count < self._thread_count_max, "more transfers than threads"
            try:
                name = f"lazyfs-fetch-{self._thread_count + 1}"
                threading.Thread(target=self._work, name=name, daemon=True).start()
                self._thread_count += 1
            except RuntimeError as error:    # the limit of a cgroup or a user; it may pass
                _log.warning("no further thread to fetch with, besides %d: %s", self._thread_count, error)
                if not self._thread_count:
                    transfer.give_up(ResourceError(f"{transfer.source.name}: no thread to fetch with: {error}",
                                                   hint="raise the limit of tasks (TasksMax=, pids.max)"))
                    self._token.run_sync_soon(self._end, transfer)
                    return
        self._inbox.put(transfer)

    def close(self) -> None:
        """Idle threads end; busy ones end after their transfer, which is told to give up."""
        for transfer in self.running:
            transfer.cancelled = True
        for _ in range(self._thread_count):
            self._inbox.put(None)
        self._thread_count = 0
        self._closed = True
        if not self.running:
            self._drained.set()

    async def drained(self) -> None:
        """After close(): until no thread works any more."""
        await self._drained.wait()

    def wake(self, function: Callable[[], None]) -> None:
        """From any thread: call a function on the loop, if there is one still."""
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(function)

    def _work(self) -> None:
        while (transfer := self._inbox.get()) is not None:
            transfer.execute(self.wake, self._nearly_done)
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._end, transfer)
            del transfer

    def _end(self, transfer: Transfer) -> None:
        self.running.discard(transfer)
        self._finished(transfer)
        if self._closed and not self.running:
            self._drained.set()
