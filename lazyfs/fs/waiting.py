"""
Reads that wait for data: each has a bound that does not depend on its handler, and somebody who asked for it.

The handler ends a read at its deadline. Should it not, whatever it hangs in, the read is answered here a little later,
and the handler is left behind. And a read that nobody waits for any more is ended: the kernel tells us of no killed
reader (it would tell of every signal, and only where the reader itself waits for the answer), so a look at the thread
that asked says it. That frees a killed process which the kernel would keep until the answer (O_DIRECT), and ends what
is fetched for the dead.

Layer: fs. Who calls: fs.server. State: the reads that wait, by request number; all on the trio thread.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from lazyfs.errors import BugError

if TYPE_CHECKING:
    from collections.abc import Callable

LOOK_S = 0.25
LOOK_SHARE = 20                  # looking at many readers takes no more of the loop's time than one part in so many
BOUND_GRACE_S = 4.0              # behind a read's time: fs.operations, which has a grace too, is to end it first
STUCK_COUNT_MAX = 64             # handlers left behind; then the worker ends, and the next one begins without them
_KILLED = 1 << 8                 # SIGKILL in a signal mask of /proc; every deadly signal becomes one in the kernel
_log = logging.getLogger("lazyfs.fs")


@dataclass(slots=True, eq=False)
class WaitingRead:
    """
    One request that was not answered yet.

    Attributes:
        thread_id: who asks, as the kernel calls it in our PID namespace; 0: nobody there.
        until: trio's clock; the bound of the attempt under way.
        scope: of its handler.
        answered: without its handler, which is left behind.

    """

    unique: int
    thread_id: int
    until: float = float("inf")
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    answered: bool = False


class WaitingReads:
    """See the module. `refuse(unique, errno)` answers the kernel."""

    def __init__(self, refuse: Callable[[int, int], None]) -> None:
        self._refuse = refuse
        self._reads: dict[int, WaitingRead] = {}
        self._some = trio.Event()
        self.stuck_count = 0

    def __len__(self) -> int:
        return len(self._reads)

    def begin(self, unique: int, thread_id: int) -> WaitingRead:
        """A read has to wait from now on."""
        read = self._reads[unique] = WaitingRead(unique, thread_id)
        self._some.set()
        return read

    def bound(self, read: WaitingRead, timeout_s: float) -> None:
        """An attempt begins, which may take so long."""
        read.until = trio.current_time() + timeout_s + BOUND_GRACE_S

    def end(self, read: WaitingRead) -> bool:
        """Its handler is through. Returns whether it has to be answered still."""
        if read.answered:
            self.stuck_count -= 1
            return False
        del self._reads[read.unique]
        return True

    async def watch(self) -> None:
        """
        End what nobody waits for, and what its handler does not end, for ever. Checkpoint: yes.

        Raises:
            BugError: too many handlers do not end.

        """
        while True:
            if not self._reads:
                self._some = trio.Event()
                await self._some.wait()
            began = time.perf_counter()
            self.look()
            await trio.sleep(max(LOOK_S, (time.perf_counter() - began) * LOOK_SHARE))

    def look(self) -> None:
        """Once. Raises BugError: as watch()."""
        now = trio.current_time()
        gone: dict[int, bool] = {}
        for read in list(self._reads.values()):
            if read.thread_id not in gone:
                gone[read.thread_id] = is_gone(read.thread_id)
            if gone[read.thread_id]:
                self._give_up(read, errno.EINTR)
            elif now > read.until:
                _log.error("request %d: its handler did not end in time, and is left behind", read.unique)
                self._give_up(read, errno.ETIMEDOUT)
        if self.stuck_count > STUCK_COUNT_MAX:
            raise BugError(f"{self.stuck_count} reads do not end when they are told to")

    def _give_up(self, read: WaitingRead, code: int) -> None:
        del self._reads[read.unique]
        read.answered = True
        self.stuck_count += 1    # until its handler has noticed
        self._refuse(read.unique, code)
        read.scope.cancel()


def is_gone(thread_id: int) -> bool:
    """Whether a thread of our PID namespace has ended, or has been killed and ends as soon as the kernel lets it."""
    if not thread_id:
        return False
    try:
        with open(f"/proc/{thread_id}/status", "rb") as file:  # noqa: PTH123 - many of them
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        # Where not even process 1 is seen, there is no /proc, or it hides others from us (hidepid).
        return os.path.exists("/proc/1/status")  # noqa: PTH110 - likewise
    except OSError:
        return False
    state = _field(text, b"State:")
    pending = _field(text, b"SigPnd:")
    return state[:1] in (b"Z", b"X") or bool(int(pending or b"0", 16) & _KILLED)


def _field(text: bytes, name: bytes) -> bytes:
    return text.partition(b"\n" + name)[2].partition(b"\n")[0].strip()
