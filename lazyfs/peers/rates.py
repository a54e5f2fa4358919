"""
Bytes a second: what a host sends and receives, all its peers and resources together; and what it really can give.

Layer: peers. Who calls: swarm (download), uploads and answering (upload), benchmarks.scale, all on the trio loop. Who
may not wait (a read that somebody sleeps on) takes at once, and those that can wait pay for it. Rates that nodes tell
each other are *steps*: the binary logarithm of bytes/s, in a byte; 0: not known.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass
from typing import Final

import trio

BURST_S = 0.1       # of the rate may pass at once; a piece passes whole when nothing is owed


class Rate:
    """At most `bytes_s` bytes a second, on trio's clock; 0: no limit."""

    def __init__(self, bytes_s: float) -> None:
        self.bytes_s = bytes_s
        self._paid_until = 0.0    # what has been taken is over at that time

    def take_now(self, size: int) -> None:
        """Take without waiting; later ones wait for it."""
        if self.bytes_s:
            self._paid_until = max(trio.current_time(), self._paid_until) + size / self.bytes_s

    def wait_s(self) -> float:
        """How long who takes now would wait; 0: not at all."""
        return max(0.0, self._paid_until - BURST_S - trio.current_time()) if self.bytes_s else 0.0

    async def take(self, size: int) -> None:
        """Take, in the order of the calls. Checkpoint: only if it waits; on cancel: nothing was taken."""
        pause = self.wait_s()
        self.take_now(size)
        if pause:
            try:
                await trio.sleep(pause)
            except trio.Cancelled:
                self._paid_until -= size / self.bytes_s
                raise


STEP_MAX: Final = 63             # of bytes/s
ASKERS_MIN: Final = 2            # who waits alone may be what is slow
WINDOW_S: Final = 0.1            # of giving, and
WINDOW_BYTES: Final = 1 << 20    # so much given, make one measurement;
WINDOW_BYTES_FAST: Final = 4 << 20    # or so much, however quick it was
WINDOWS: Final = 8               # the best of so many counts: askers that are slow make some of them small
PIECES: Final = 32               # of so many, what the second best went with was surely there
PIECE_BYTES: Final = 128 << 10   # fewer are in some buffer at once
HYSTERESIS: Final = 0.75         # steps that a rate must be off what was said before another one is


@dataclass(slots=True)
class _Window:
    """A measurement; times are of the busy clock. `crowded_s`: of it, with ASKERS_MIN members."""

    begin: float
    end: float
    crowded_s: float = 0.0
    bytes: float = 0.0

    @property
    def rate(self) -> float:
        return self.bytes / (self.end - self.begin) if self.end > self.begin else 0.0

    def take(self, size: int, begin: float, end: float) -> None:
        """Of bytes that left in that time its share."""
        overlap = min(end, self.end) - max(begin, self.begin)
        if overlap > 0:
            self.bytes += size * overlap / (end - begin)


class Giving:
    """
    What this host gives while more is wanted of it than it can give: by its link, its disk, its processor, its bound.

    The busy clock runs while pieces that are here are wanted; a window of it counts if half of it was so by ASKERS_MIN
    members at least. Pieces that went side by side share the windows that they passed through, so one that has just
    ended says nothing before the next has. `step`: the rate found; 0: it was never asked for so much. The best of the
    last windows counts, and what single pieces went with if that is more: others' slowness is not its own.
    """

    def __init__(self) -> None:
        self.step = 0
        self._askers: Counter[str] = Counter()
        self._at = 0.0
        self._now = _Window(0.0, 0.0)
        self._done: deque[_Window] = deque(maxlen=WINDOWS + 1)
        self._pieces: deque[float] = deque(maxlen=PIECES)

    def begin(self, asker: str) -> None:
        """A piece that is here is to be sent; from now on it takes time. `end` is called once for it."""
        self._pass()
        self._askers[asker] += 1

    def gave(self, size: int, seconds: float) -> None:
        """Bytes of a piece have left the host (not: entered a buffer) in that time alone; before its `end`."""
        self._pass()
        end = self._now.end
        for window in (*self._done, self._now):
            window.take(size, end - max(seconds, 1e-9), end)
        if size >= PIECE_BYTES and seconds > 0:
            self._pieces.append(size / seconds)
            if self.step and size / seconds > 2 ** (self.step + HYSTERESIS):
                self._find()

    def end(self, asker: str) -> None:
        """It has gone, or is not wanted any more."""
        self._pass()
        self._askers[asker] -= 1
        if not self._askers[asker]:
            del self._askers[asker]
        window = self._now
        busy_s = window.end - window.begin
        if window.bytes < (WINDOW_BYTES if busy_s >= WINDOW_S else WINDOW_BYTES_FAST) or not busy_s:
            return
        self._now = _Window(window.end, window.end)
        if 2 * window.crowded_s >= busy_s:
            self._done.append(window)
            self._find()

    def _find(self) -> None:
        pieces = sorted(self._pieces)[-2:]
        whole = list(self._done)[:-1] if self._askers else self._done    # others may yet say what they had of the last
        if not whole and not self.step:
            return
        exact = math.log2(max(2.0, *(window.rate for window in whole), *pieces[:-1]))
        if not self.step or abs(exact - self.step) > HYSTERESIS:
            self.step = min(STEP_MAX, round(exact))

    def forget(self) -> None:
        """It is to be found anew."""
        self.step = 0
        self._done.clear()
        self._pieces.clear()
        self._now = _Window(self._now.end, self._now.end)

    def _pass(self) -> None:
        now = trio.current_time()
        passed, self._at = now - self._at, now
        if self._askers:
            self._now.end += passed
        if len(self._askers) >= ASKERS_MIN:
            self._now.crowded_s += passed


class Rates:
    """
    What members have said that they can give, as steps, and what is usual among them.

    Usual is what the best quarter gives at least: where half of the nodes have a small link, these are slow.
    """

    SAID_MIN: Final = 3          # of fewer nothing is usual
    SLOW_STEPS: Final = 2        # below: a quarter of what is usual
    BELIEVED_S: Final = 900.0    # who is asked last says nothing new

    def __init__(self) -> None:
        self.usual = 0           # 0: nobody knows
        self._of: dict[str, int] = {}
        self._until: dict[str, float] = {}
        self._counts: Counter[int] = Counter()

    def say(self, member: str, step: int, now: float) -> bool:
        """True: it is another one than before, or the first. `step` may be any byte; 0: it knows nothing any more."""
        step, old = min(step, STEP_MAX), self._of.get(member, 0)
        self.forget(member)
        if step:
            self._of[member], self._until[member] = step, now + self.BELIEVED_S
            self._counts[step] += 1
        if step == old:
            return False
        beyond = len(self._of) / 4
        self.usual = 0
        if len(self._of) >= self.SAID_MIN:
            for one in sorted((+self._counts).keys(), reverse=True):
                beyond -= self._counts[one]
                if beyond <= 0:
                    self.usual = one
                    break
        return True

    def forget(self, member: str) -> None:
        self._until.pop(member, None)
        if member in self._of:
            self._counts[self._of.pop(member)] -= 1

    def steps_below(self, step: int) -> int:
        """How far a rate is below what is usual; 0: not enough to count, or nobody knows."""
        below = self.usual - step
        return below if step and below >= self.SLOW_STEPS else 0

    def is_slow(self, member: str, now: float) -> bool:
        return self.steps_below(self._of.get(member, 0)) > 0 and self._until[member] > now
