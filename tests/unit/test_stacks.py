"""Where a process is: on a signal, without stopping, also when its loop or the interpreter hangs."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from lazyfs import stacks
from lazyfs.node import dumping
from lazyfs.node.dumping import Dumps
from tests.fetchbench import bench
from tests.unit.test_read_log import ReadLog

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WAIT_S = 30.0


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (stacks.SIGNAL, stacks.HARD_SIGNAL)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_each_thread_has_a_line_innermost_first() -> None:
    go = threading.Event()
    thread = threading.Thread(target=go.wait, name="waits-for-go")
    thread.start()
    try:
        lines = list(stacks.threads())
    finally:
        go.set()
        thread.join()
    (line,) = [one for one in lines if one.startswith("thread waits-for-go:")]
    assert "threading.py" in line
    assert line.index(" wait") < line.index("_bootstrap")
    assert any("test_each_thread_has_a_line_innermost_first" in one for one in lines)


def test_the_signal_tells_and_does_not_stop() -> None:
    told: list[str] = []
    stacks.install(told.extend)
    os.kill(os.getpid(), stacks.SIGNAL)
    assert any("test_the_signal_tells_and_does_not_stop" in one for one in told)


def test_a_process_that_has_nothing_to_tell_yet_survives_it() -> None:
    stacks.ignore()
    for number in (stacks.SIGNAL, stacks.HARD_SIGNAL):
        os.kill(os.getpid(), number)


def test_a_thread_that_holds_the_interpreter_is_seen_from_outside() -> None:
    """A regular expression that never ends: no line of Python runs meanwhile, no handler of Python's either."""
    program = textwrap.dedent("""
        import re, sys
        from lazyfs import stacks
        stacks.enable_hard()
        def hangs():
            re.match("(a+)+b", "a" * 60)
        sys.stdout.write("go\\n"); sys.stdout.flush()
        hangs()
    """)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"go\n"
        try:
            process.send_signal(stacks.HARD_SIGNAL)
            line = b""
            deadline = time.monotonic() + WAIT_S
            while b"hangs" not in line:
                line = process.stderr.readline()
                assert line or time.monotonic() < deadline
                if not line or b"<module>" in line:    # it had not come there yet
                    assert time.monotonic() < deadline
                    process.send_signal(stacks.HARD_SIGNAL)
            assert process.poll() is None
        finally:
            process.kill()


@pytest.mark.trio
async def test_a_dump_names_tasks_reads_and_chunks(tmp_path: Path) -> None:
    log = ReadLog()
    async with bench(tmp_path) as b:
        b.source.gate.clear()

        async def one_that_reads() -> None:
            with log.reading(2, 7, 0, 100, 0):
                await b.read(0, 100)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one_that_reads)
            await trio.testing.wait_all_tasks_blocked()
            lines = list(Dumps(log, b.fetcher).lines())
            b.source.gate.set()
    text = "\n".join(lines)
    assert "1 reads wait, 1 chunks on their way" in lines[0]
    (task,) = [line for line in lines if line.startswith("task") and "one_that_reads" in line.split(":")[0]]
    assert "fetch/engine.py" in task
    assert "100 bytes at 0" in text
    assert "chunk 0 of" in text
    assert "not answered" in text


@pytest.mark.trio
async def test_a_dump_is_bounded_and_goes_to_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dumping, "TASK_COUNT_MAX", 20)
    log = ReadLog()
    async with bench(tmp_path) as b, trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(trio.sleep_forever)
        await trio.testing.wait_all_tasks_blocked()
        dumps = Dumps(log, b.fetcher)
        lines = list(dumps.lines())
        assert sum(line.startswith("task") for line in lines) == 20
        assert "and more tasks" in lines
        dumps.install()
        with caplog.at_level(logging.WARNING, "lazyfs.dump"):
            os.kill(os.getpid(), stacks.SIGNAL)
            for thread in [one for one in threading.enumerate() if one.name == "lazyfs-dump"]:
                await trio.to_thread.run_sync(thread.join, WAIT_S)
        nursery.cancel_scope.cancel()
    assert any("and more tasks" in record.getMessage() for record in caplog.records)
