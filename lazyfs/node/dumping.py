"""
What a worker is doing at this moment, in lines: threads, trio tasks, reads that wait, chunks on their way.

Layer: node. Who calls: SIGUSR1 (install), node.control for DUMP. Made in the loop's thread, so nothing moves meanwhile;
written to the log by a thread of its own, for the signal may come in the middle of a log record. Bounded.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from typing import TYPE_CHECKING

import trio

from lazyfs import __version__, stacks

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lazyfs.fetch.engine import Fetcher
    from lazyfs.fs.readlog import ReadLog

TASK_COUNT_MAX = 300             # a waiting read is one; more say the same
_READ_COUNT_MAX = 50
_FLIGHT_COUNT_MAX = 50
_FRAME_COUNT_MAX = 16
_LINE_CHARS_MAX = 2000
_log = logging.getLogger("lazyfs.dump")


class Dumps:
    """Of one worker."""

    def __init__(self, reads: ReadLog, fetcher: Fetcher) -> None:
        self._reads = reads
        self._fetcher = fetcher

    def install(self) -> None:
        """From now on SIGUSR1 writes one to the log."""
        stacks.install(self._tell)

    def _tell(self, found: Iterable[str]) -> None:
        lines = list(self.lines(found))
        try:
            threading.Thread(target=_write, args=(lines,), name="lazyfs-dump", daemon=True).start()
        except RuntimeError:      # no thread is left, which is a reason to look
            stacks.tell_stderr(lines)

    def lines(self, found: Iterable[str] | None = None) -> Iterator[str]:
        """In the loop's thread. `found`: the threads' lines, if they are known."""
        reads = self._reads.waiting_longer(0.0)
        flights = list(self._fetcher.flights())
        yield (f"lazyfs {__version__}: {threading.active_count()} threads, {len(reads)} reads wait, "
               f"{len(flights)} chunks on their way")
        for line in (*(stacks.threads() if found is None else found), *_tasks(), *self._waiting(), *self._flying()):
            yield line[:_LINE_CHARS_MAX]

    def _waiting(self) -> Iterator[str]:
        reads = self._reads.waiting_longer(0.0)
        for trace in reads[:_READ_COUNT_MAX]:
            one = self._reads.describe(trace)
            chunks = ", ".join(f"{chunk['chunk']} of {chunk['blob'][7:19]}{'' if chunk['landed'] else ' missing'}"
                               for chunk in one["chunks"])
            yield (f"read {one['request']}: {one['seconds']:.1f} s, process {one['pid']}, inode {one['inode']}, "
                   f"{one['size']} bytes at {one['offset']} of {one.get('image', 'no image')}; "
                   f"chunks: {chunks or 'none'}")
        yield from _more(len(reads) - _READ_COUNT_MAX, "reads")

    def _flying(self) -> Iterator[str]:
        flights = list(self._fetcher.flights())
        now = time.monotonic()
        for flight in flights[:_FLIGHT_COUNT_MAX]:
            error = f", last error: {flight.last_error}" if flight.last_error else ""
            yield (f"chunk {flight.index} of {flight.blob.short}: {now - flight.made_at:.1f} s, {flight.waiters} wait, "
                   f"{'answered' if flight.answered_at else 'not answered'}, {flight.source.name}{error}")
        yield from _more(len(flights) - _FLIGHT_COUNT_MAX, "chunks")


def _tasks() -> Iterator[str]:
    """A line a task of trio's, parents first; nothing while no loop runs (or it has only begun)."""
    try:
        root = trio.lowlevel.current_root_task()
    except RuntimeError:
        return
    todo = [] if root is None else [(root, 0)]
    for _ in range(TASK_COUNT_MAX):
        if not todo:
            return
        task, depth = todo.pop()
        yield f"task {'  ' * min(depth, 20)}{task.name.rpartition('.')[2]}: {_stack(task)}"
        todo += [(child, depth + 1) for nursery in task.child_nurseries for child in nursery.child_tasks]
    yield "and more tasks"


def _stack(task: trio.lowlevel.Task) -> str:
    """Innermost first."""
    frames = itertools.islice(task.iter_await_frames(), 10 * _FRAME_COUNT_MAX)
    found = [stacks.place(frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in frames]
    return " < ".join(reversed(found[-_FRAME_COUNT_MAX:])) or "runs now"


def _more(count: int, what: str) -> Iterator[str]:
    if count > 0:
        yield f"and {count} {what} more"


def _write(lines: list[str]) -> None:
    for number, line in enumerate(lines, 1):
        _log.warning("dump %d/%d: %s", number, len(lines), line)
