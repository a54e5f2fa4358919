"""
The same question asked by several at once is asked once.

Layer: mirror. Who calls: mirror.manifests, mirror.access. State: the questions that are being asked. A question goes
on when who asked it first has gone: others may wait for it, and its answer is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

import trio

from lazyfs.errors import LazyfsError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

T = TypeVar("T")


class _Flight(Generic[T]):
    def __init__(self) -> None:
        self.done = trio.Event()
        self.result: T | None = None
        self.error: LazyfsError | None = None


class Flights(Generic[T]):
    """`nursery`: where questions are asked; they end with it."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._running: dict[Hashable, _Flight[T]] = {}

    async def once(self, key: Hashable, ask: Callable[[], Awaitable[T]]) -> T:
        """
        ask()'s result, of the one that runs for this key already or of a new one.

        Raises:
            LazyfsError: what it raised; everybody who waits gets that.

        """
        flight = self._running.get(key)
        if flight is None:
            flight = self._running[key] = _Flight()
            self._nursery.start_soon(self._run, key, flight, ask)
        await flight.done.wait()
        if flight.error is not None:
            raise flight.error.with_traceback(None)    # one error for several: none keeps another's frames
        return flight.result  # type: ignore[return-value]

    async def _run(self, key: Hashable, flight: _Flight[T], ask: Callable[[], Awaitable[T]]) -> None:
        try:
            flight.result = await ask()
        except LazyfsError as error:
            flight.error = error.with_traceback(None)
        finally:
            del self._running[key]
            flight.done.set()
