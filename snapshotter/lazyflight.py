"""
One at a time, and one for all: callers that want the same thing at the same time share one attempt.

Layer: snapshotter. Who calls: lazy. State: the attempts under way, and a lock a key while somebody wants it.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lazyfs.errors import DeadlineError, LazyfsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(slots=True, eq=False)
class _Attempt:
    """`error`: how it failed; read after `done`."""

    done: threading.Event = field(default_factory=threading.Event)
    error: LazyfsError | None = None


@dataclass(slots=True, eq=False)
class _Turn:
    """A lock, and how many want it: the last one takes it away."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    wanted: int = 0


class Flights:
    """Attempts by key. `alone()` and `shared()` of one key exclude each other."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._attempts: dict[str, _Attempt] = {}
        self._turns: dict[str, _Turn] = {}

    def shared(self, key: str, attempt: Callable[[], None], timeout_s: float) -> None:
        """
        Do `attempt()`, or wait for the one under way and end as it ends.

        Raises:
            LazyfsError: what the attempt raised. DeadlineError: it has not ended after `timeout_s`.

        """
        with self._mutex:
            mine = _Attempt()
            current = self._attempts.setdefault(key, mine)
        if current is mine:
            self._lead(key, mine, attempt)
            return
        if not current.done.wait(timeout_s):
            raise DeadlineError(f"another caller's attempt has not ended after {timeout_s:g} s")
        if current.error is not None:   # each waiter gets an exception of its own: tracebacks would pile up in one
            raise type(current.error)(str(current.error), hint=current.error.hint)

    @contextlib.contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """Exclude all others with this key: nobody else is in here, or makes an attempt."""
        with self._mutex:
            turn = self._turns.setdefault(key, _Turn())
            turn.wanted += 1
        try:
            with turn.lock:
                yield
        finally:
            with self._mutex:
                turn.wanted -= 1
                if not turn.wanted:
                    del self._turns[key]

    def _lead(self, key: str, mine: _Attempt, attempt: Callable[[], None]) -> None:
        try:
            with self.alone(key):
                attempt()
        except LazyfsError as error:
            mine.error = error
            raise
        except BaseException as error:
            mine.error = LazyfsError(f"{type(error).__name__}: {error}")
            raise
        finally:
            with self._mutex:
                del self._attempts[key]
            mine.done.set()
