"""Tasks side by side: results in order, the first error wins and does not wait for those that hang."""

from __future__ import annotations

import threading

import pytest

from converter import parallel
from converter.parallel import Parallel, StoppedError


def test_results_are_in_the_order_of_the_tasks() -> None:
    gate = threading.Event()

    def first() -> int:
        assert gate.wait(30)
        return 1

    def second() -> int:
        gate.set()
        return 2

    assert Parallel[int]().run([first, second, lambda: 3], 2) == [1, 2, 3]
    assert Parallel[int]().run([], 2) == []


def test_an_error_ends_the_others_and_starts_no_more() -> None:
    started = threading.Event()
    ended: list[str] = []
    tasks = Parallel[None]()

    def fails() -> None:
        assert started.wait(30)
        raise KeyError("first")

    def goes_on() -> None:
        started.set()
        try:
            while True:
                tasks.check()
        except StoppedError:
            ended.append("stopped")
            raise

    with pytest.raises(KeyError, match="first"):
        tasks.run([fails, goes_on, lambda: ended.append("third")], 2)
    assert ended == ["stopped"]


def test_an_error_is_told_although_another_task_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for a server that no longer answers: its deadline may be a minute away."""
    monkeypatch.setattr(parallel, "STOP_WAIT_S", 0.1)
    hanging, answer, gone = threading.Event(), threading.Event(), threading.Event()

    def hangs() -> None:
        hanging.set()
        answer.wait()
        gone.set()

    def fails() -> None:
        assert hanging.wait(30)
        raise KeyError("told")

    failed: list[BaseException] = []

    def run() -> None:
        try:
            Parallel[None]().run([hangs, fails], 2)
        except KeyError as error:
            failed.append(error)

    runner = threading.Thread(target=run)
    runner.start()
    runner.join(10)
    told_in_time = bool(failed)
    answer.set()
    runner.join(30)
    assert gone.wait(30)
    assert told_in_time
