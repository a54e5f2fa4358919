"""One at a time, and one for all: the attempts to mount that callers share."""

from __future__ import annotations

import threading

import pytest

from lazyfs.errors import DeadlineError, HostError, LazyfsError
from snapshotter.lazyflight import Flights

WAIT_S = 20.0


class Callers:
    """Threads that ask for one key while the first one's attempt is held."""

    def __init__(self, count: int, error: LazyfsError | None = None) -> None:
        self.flights = Flights()
        self.attempts = 0
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.ends: list[str] = []
        self._error = error
        self._threads = [threading.Thread(target=self._ask) for _ in range(count)]
        self._threads[0].start()
        assert self.begun.wait(WAIT_S)
        for thread in self._threads[1:]:
            thread.start()

    def _attempt(self) -> None:
        self.attempts += 1
        self.begun.set()
        assert self.go_on.wait(WAIT_S)
        if self._error is not None:
            raise self._error

    def _ask(self) -> None:
        try:
            self.flights.shared("key", self._attempt, WAIT_S)
            self.ends.append("done")
        except LazyfsError as error:
            self.ends.append(f"{type(error).__name__}: {error} ({error.hint})")

    def finish(self) -> None:
        self.go_on.set()
        for thread in self._threads:
            thread.join(WAIT_S)


def test_callers_at_the_same_time_share_an_attempt() -> None:
    callers = Callers(1)
    with pytest.raises(DeadlineError, match="has not ended"):
        callers.flights.shared("key", pytest.fail, 0.01)
    callers.finish()
    assert (callers.attempts, callers.ends) == (1, ["done"])
    callers.flights.shared("key", callers._attempt, WAIT_S)
    assert callers.attempts == 2, "what came later has an attempt of its own"


def test_all_of_them_learn_how_it_failed() -> None:
    callers = Callers(5, HostError("no daemon", hint="start it"))
    callers.finish()
    assert set(callers.ends) == {"HostError: no daemon (start it)"}
    assert len(callers.ends) == 5


def test_a_bug_in_an_attempt_leaves_nobody_waiting() -> None:
    flights = Flights()
    with pytest.raises(ZeroDivisionError):
        flights.shared("key", lambda: [1 // 0, None][1], WAIT_S)
    flights.shared("key", lambda: None, WAIT_S)


def test_alone_excludes_attempts_and_others_but_not_other_keys() -> None:
    callers = Callers(1)
    entered = threading.Event()

    def enter() -> None:
        with callers.flights.alone("key"):
            entered.set()

    thread = threading.Thread(target=enter)
    thread.start()
    with callers.flights.alone("another key"):
        assert not entered.wait(0.05)
    callers.finish()
    thread.join(WAIT_S)
    assert entered.is_set()
    assert callers.flights._turns == {}, "locks of keys that nobody wants are not kept"
