"""
A quicker way round the loop for pyfuse3: what it asks trio for, answered without a trip through the scheduler.

pyfuse3's session loop takes a lock and waits for /dev/fuse before each request: two task switches and an epoll cycle,
about as long as answering a read of cached data takes. A request is nearly always followed by the next within
microseconds, and nearly every handler answers without waiting. So the task that has answered keeps the right to read
the next request (no hand-over), and looks for it with a short select(2) before it goes to sleep in trio.

`install()` puts an object with what pyfuse3 uses of trio in the place of its module variable `trio`, as pyfuse3.asyncio
does. Layer: fs. Who calls: fs.session; fs.operations calls `hand_over` before it waits. Invariants: as long as the
session lives and its reader waits in a handler, another task is woken to read (hand_over); other tasks run at least
every STREAK_MAX requests; when one reader ends, because the mount is gone, all are woken and end.

The descriptor must be non-blocking: between "readable" and the read the kernel may withdraw a request (its caller was
killed), and a blocking read would then stop everything. pyfuse3 raises EAGAIN as OSError; the reader begins again.
"""

from __future__ import annotations

import errno
import select
from typing import TYPE_CHECKING, Any, Self

import pyfuse3
import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

HOT_WAIT_S = 50e-6               # a caller on another core needs 10 to 40 us for its next request
STREAK_MAX = 64                  # requests answered in a row before other tasks get a turn
_SELECT_FD_MAX = 1023            # FD_SETSIZE - 1


class ReadLock:
    """Who may read the next request. Unlike trio.Lock: free again without waking anybody, taken without waiting."""

    def __init__(self) -> None:
        self._held = False
        self._waiters = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._held:
            await self._waiters.park()
        self._held = True

    async def __aexit__(self, *_: object) -> None:
        self._held = False

    def hand_over(self) -> None:
        """Its last holder is going to wait for something else: let another task read."""
        if not self._held:
            self._waiters.unpark()

    def wake_all(self) -> None:
        self._waiters.unpark_all()


class _Lowlevel:
    """What pyfuse3 uses of trio.lowlevel."""

    current_task = staticmethod(trio.lowlevel.current_task)
    current_trio_token = staticmethod(trio.lowlevel.current_trio_token)
    notify_closing = staticmethod(trio.lowlevel.notify_closing)

    def __init__(self) -> None:
        self._streak = 0

    async def wait_readable(self, descriptor: int) -> None:
        self._streak += 1
        quick = self._streak < STREAK_MAX and descriptor <= _SELECT_FD_MAX
        if quick and select.select((descriptor,), (), (), HOT_WAIT_S)[0]:
            return
        self._streak = 0
        await trio.lowlevel.wait_readable(descriptor)


class _Nursery:
    """Starts readers that survive EAGAIN, and end together."""

    def __init__(self, loop: QuickLoop) -> None:
        self._loop = loop
        self._manager: AbstractAsyncContextManager[trio.Nursery] = trio.open_nursery()

    async def __aenter__(self) -> Self:
        self._nursery = await self._manager.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._manager.__aexit__(kind, error, trace)

    def start_soon(self, reader: Callable[..., Awaitable[None]], *arguments: Any, name: str | None = None) -> None:
        self._nursery.start_soon(self._read, reader, arguments, name=name)

    async def _read(self, reader: Callable[..., Awaitable[None]], arguments: tuple[Any, ...]) -> None:
        while True:
            try:
                await reader(*arguments)
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    raise
            else:
                self._loop.wake_all()
                return


class QuickLoop:
    """Stands in for the module trio within pyfuse3."""

    ClosedResourceError = trio.ClosedResourceError
    from_thread = trio.from_thread

    def __init__(self) -> None:
        self.lowlevel = _Lowlevel()
        self._lock = ReadLock()

    def Lock(self) -> ReadLock:  # noqa: N802 - trio's name
        return self._lock

    def open_nursery(self) -> _Nursery:
        return _Nursery(self)

    def hand_over(self) -> None:
        """Call before a handler waits for anything."""
        self._lock.hand_over()

    def wake_all(self) -> None:
        self._lock.wake_all()


def install() -> QuickLoop:
    """Make pyfuse3 use a new QuickLoop. Before pyfuse3.main()."""
    loop = QuickLoop()
    pyfuse3.trio = loop  # type: ignore[attr-defined]
    return loop
