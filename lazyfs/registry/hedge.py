"""
Ask a second server where the first takes longer than nearly always; the first good answer counts.

Layer: registry; used by client.py, only where there is another healthy server. A second request is one of few
(mirrors.HEDGE_SHARE), and never has one of its own. The loser's connection is shut down at once, so neither its thread
nor its bytes stay. Only the wait for the answer's header is hedged: the bytes of a body are checked by whoever reads
them, and a server that gives them slowly is blamed there.
State: one Race an answer, under its lock: who has won.
"""

from __future__ import annotations

import contextlib
import contextvars
import socket
import threading
import time
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from lazyfs.errors import LazyfsError
from lazyfs.registry.dial import CURRENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")
_WAIT_S = 0.5                    # beyond the second one's deadline, for its thread to say so
_FIRST: Final = "first"
_SECOND: Final = "second"


class Connection:
    """The connection of a request that may be given up by another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._cut = False

    def attach(self, sock: socket.socket) -> None:
        """The request goes over this one now."""
        with self._lock:
            self._sock = sock
            if self._cut:
                _shut(sock)

    def cut(self) -> None:
        """Have whoever waits on it fail at once."""
        with self._lock:
            self._cut = True
            if self._sock is not None:
                _shut(self._sock)

    def detach(self) -> None:
        """The answer is here: the connection is nobody's to cut any more."""
        with self._lock:
            self._sock = None


class Race(Generic[T]):
    """
    The first result of two servers.

    :second_won: the second was sooner, or the only one.
    :second_error: why the second one failed; None: it did not, was not asked, or is not done.
    """

    def __init__(self, second: Callable[[], T], delay_s: float, deadline: float,
                 may_start: Callable[[], bool]) -> None:
        """
        Nothing is sent yet.

        Args:
            second: asks the other server.
            delay_s: after which that is done.
            deadline: absolute; `second` ends by then.
            may_start: asked just before.

        """
        self._second = second
        self._delay_s = delay_s
        self._deadline = deadline
        self._may_start = may_start
        self._lock = threading.Lock()
        self._not_needed = threading.Event()
        self._second_ended = threading.Event()
        self._connections = {_FIRST: Connection(), _SECOND: Connection()}
        self._results: list[T] = []    # the second's
        self._second_runs = False
        self._winner = ""
        self.second_error: LazyfsError | None = None

    @property
    def second_won(self) -> bool:
        return self._winner == _SECOND

    def run(self, first: Callable[[], T]) -> T:
        """
        The result of whoever is first; `first()` is called in this thread.

        Raises:
            LazyfsError: the first's error, where the second has no result either.

        """
        context = contextvars.copy_context()    # the request's id
        thread = threading.Thread(target=context.run, args=(self._run_second,), name="lazyfs-hedge", daemon=True)
        try:
            thread.start()
        except RuntimeError:    # no thread to be had: then without
            return first()
        try:
            with _watched(self._connections[_FIRST]):
                found = first()
        except LazyfsError:
            if self._second_has_it():
                return self._results[0]
            raise
        finally:
            self._not_needed.set()
        if self._wins(_FIRST):
            return found
        _discard(found)
        return self._results[0]

    def _second_has_it(self) -> bool:
        """Where the first has failed. If the second was not asked yet, that is left to who called us."""
        with self._lock:
            self._not_needed.set()
            runs = self._second_runs
        if runs:
            self._second_ended.wait(max(0.0, self._deadline - time.monotonic()) + _WAIT_S)
        return not self._wins(_FIRST)    # too late from now on

    def _run_second(self) -> None:
        if self._not_needed.wait(self._delay_s):
            return
        with self._lock:
            if self._not_needed.is_set() or not self._may_start():
                return
            self._second_runs = True
        try:
            with _watched(self._connections[_SECOND]):
                found = self._second()
            if not self._wins(_SECOND, found):
                _discard(found)
        except LazyfsError as error:
            if not self._winner:    # else it failed because it was cut off
                self.second_error = error
        finally:
            self._second_ended.set()

    def _wins(self, who: str, *found: T) -> bool:
        """Whether `who` is the first; the other one is cut off then."""
        with self._lock:
            self._connections[who].detach()
            if self._winner:
                return False
            self._winner = who
            self._results.extend(found)
        self._connections[_SECOND if who == _FIRST else _FIRST].cut()
        return True


def _discard(found: object) -> None:
    close = getattr(found, "close", None)    # of an answer whose body has not been read
    if close is not None:
        close()


@contextlib.contextmanager
def _watched(connection: Connection) -> Iterator[None]:
    """What this thread sends now goes over a connection that can be cut."""
    CURRENT.connection = connection
    try:
        yield
    finally:
        CURRENT.connection = None


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)    # SSLSocket's own takes the TLS away from its reader
