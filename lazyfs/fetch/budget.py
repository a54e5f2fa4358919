"""
How much memory reads hold together while the cache does not store.

A read of several chunks keeps those that have come until the last one is there. As long as they are stored that costs
nothing; with a full disk a thousand readers would hold a thousand chunks. So a read takes room for all of its chunks
when the first of them turns out not to be stored; who finds none lets go of what it has, waits for its turn, and begins
again. Nobody holds something and waits for room, so there is no deadlock; a read larger than the whole budget gets it
alone. Layer: fetch. Who calls: fetch.engine, on the loop.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Self

import trio

from lazyfs.errors import DeadlineError

if TYPE_CHECKING:
    from types import TracebackType


class NoRoomError(Exception):
    """Let go of what you hold, and wait for the turn. Never leaves fetch.engine."""


class Budget:
    """:bytes_held: by reservations that have been taken."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._waiting: deque[Reservation] = deque()
        self.bytes_held = 0

    def reserve(self, size: int) -> Reservation:
        """A reservation of `size` bytes, not taken yet."""
        return Reservation(self, size)

    def has_room(self, size: int) -> bool:
        return not self.bytes_held or self.bytes_held + size <= self._bytes_max

    def is_free_for(self, reservation: Reservation) -> bool:
        """Whether it may be taken: in the order in which they came."""
        return self.has_room(reservation.size) and (not self._waiting or self._waiting[0] is reservation)

    def queue(self, reservation: Reservation) -> None:
        self._waiting.append(reservation)

    def leave(self, reservation: Reservation) -> None:
        self._waiting.remove(reservation)
        self.wake()

    def wake(self) -> None:
        """Tell the first in the queue to look."""
        if self._waiting and self.has_room(self._waiting[0].size):
            self._waiting[0].turn.set()


class Reservation:
    """
    One read's room; `with budget.reserve(size) as room`: given back at the end.

    :turn: set when it is first in the queue and there is room.
    """

    def __init__(self, budget: Budget, size: int) -> None:
        self._budget = budget
        self.size = size
        self._is_taken = False
        self.turn = trio.Event()

    def take(self) -> None:
        """Raises NoRoomError: there is none now."""
        if self._is_taken or not self.size:
            return
        if not self._budget.is_free_for(self):
            raise NoRoomError
        self._budget.bytes_held += self.size
        self._is_taken = True

    async def wait(self, deadline: float) -> None:
        """
        Until it is taken. Checkpoint: yes; on cancel: it is not.

        Raises:
            DeadlineError: not by `deadline`, time.monotonic().

        """
        self.turn = trio.Event()
        self._budget.queue(self)
        try:
            self._budget.wake()
            with trio.move_on_after(max(0.0, deadline - time.monotonic())):
                await self.turn.wait()
                self.take()
        finally:
            self._budget.leave(self)
        if not self._is_taken:
            raise DeadlineError("no memory to read into: the cache does not store, and many read",
                                hint="make room on the cache's disk")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._is_taken:
            self._is_taken = False
            self._budget.bytes_held -= self.size
            self._budget.wake()
