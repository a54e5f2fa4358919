"""Reads that wait: each ends, whatever its handler does, and sooner if nobody is left who wants it."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest
import trio

from lazyfs.errors import BugError, CacheError, DeadlineError, FormatError, IntegrityError, SourceError
from lazyfs.fs import operations, server, waiting, wire
from lazyfs.fs.waiting import WaitingReads, is_gone
from tests.unit.test_fs_server import SAMPLE, Kernel, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTENT = SAMPLE.files[b"f100000"][:4096]


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds of parts of a second: what hangs here hangs in real time."""
    monkeypatch.setattr(waiting, "BOUND_GRACE_S", 0.3)
    monkeypatch.setattr(waiting, "LOOK_S", 0.02)
    monkeypatch.setattr(operations, "_GRACE_S", 0.1)


@pytest.fixture
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "AGAIN_FIRST_S", 0.01)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as started:
        yield started
        started.kill()


async def read_for(kernel: Kernel, thread_id: int, unique: int) -> None:
    body = wire.READ_IN.pack(0, 0, 4096) + bytes(20)
    await kernel.end.send(
        wire.HEADER.pack(wire.HEADER.size + len(body), wire.READ, unique, kernel.file, 0, 0, thread_id, 0) + body)


async def is_served(kernel: Kernel) -> bool:
    return (await kernel.asked(wire.GETATTR, kernel.root, bytes(16)))[0] == 0


@pytest.mark.usefixtures("_soon")
def test_a_handler_that_cannot_be_cancelled_is_left_behind():
    async def main() -> None:
        async with serving() as kernel:
            ends = trio.Event()

            async def stubborn() -> None:
                with trio.CancelScope(shield=True):
                    await ends.wait()

            kernel.device.read_timeout_s = 0.1
            kernel.device.fail = lambda offset, size: stubborn()
            await kernel.read(unique=8)
            assert await is_served(kernel)
            assert await kernel.answer() == (8, errno.ETIMEDOUT, b"")
            kernel.device.fail = None
            ends.set()    # its answer comes too late, and must not be a second one
            await kernel.read(unique=10)
            assert await kernel.answer() == (10, 0, CONTENT)
            assert await is_served(kernel)

    trio.run(main)


@pytest.mark.usefixtures("_soon")
def test_a_handler_that_blocks_in_a_thread_is_left_behind():
    released = threading.Event()

    async def main() -> None:
        async with serving() as kernel:
            kernel.device.read_timeout_s = 0.1
            kernel.device.fail = lambda offset, size: trio.to_thread.run_sync(released.wait, 30)
            await kernel.read(unique=8)
            assert await kernel.answer() == (8, errno.ETIMEDOUT, b"")
            assert await is_served(kernel)
            released.set()

    trio.run(main)


@pytest.mark.usefixtures("_soon")
def test_a_worker_full_of_handlers_that_do_not_end_ends_itself(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(waiting, "STUCK_COUNT_MAX", 2)
    ends = threading.Event()

    async def main() -> None:
        async with serving() as kernel:
            kernel.device.read_timeout_s = 0.05
            kernel.device.fail = lambda offset, size: trio.to_thread.run_sync(ends.wait, 30)
            for unique in (8, 10, 12):
                await kernel.read(unique=unique)
            assert {(await kernel.answer())[1] for _ in range(3)} == {errno.ETIMEDOUT}
            ends.set()    # the threads; what they were for is noticed before
            await trio.sleep(30)

    with pytest.raises(BaseExceptionGroup) as found:
        trio.run(main)
    assert found.group_contains(BugError, match="do not end")


def test_the_whole_read_has_one_deadline(monkeypatch: pytest.MonkeyPatch):
    """A file in two places of its device: the second must not get a time of its own."""
    deadlines: list[float] = []

    async def main() -> None:
        async with serving() as kernel:
            status = await kernel.asked(wire.LOOKUP, kernel.root, b"holes\0")
            holes = struct.unpack_from("<Q", status[1])[0]
            real = kernel.device.read

            async def read(offset: int, size: int, deadline: float) -> bytes:
                deadlines.append(deadline)
                await trio.sleep(0.05)
                return await real(offset, size, deadline)

            monkeypatch.setattr(kernel.device, "read", read)
            await kernel.ask(wire.READ, holes, wire.READ_IN.pack(0, 0, 1 << 20) + bytes(20))
            assert await kernel.answer() == (2, 0, SAMPLE.files[b"holes"])

    trio.run(main)
    assert len(deadlines) == 2
    assert deadlines[0] == deadlines[1]


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize("reaped", [True, False])
def test_a_read_whose_reader_was_killed_ends(process: subprocess.Popen[bytes], reaped: bool):
    async def main() -> None:
        async with serving() as kernel:
            arrived = trio.Event()
            kernel.device.fail = lambda offset, size: arrived.wait()
            for thread_id, unique in ((process.pid, 8), (os.getpid(), 10), (0, 12)):
                await read_for(kernel, thread_id, unique)
            assert await is_served(kernel)
            process.kill()
            if reaped:
                process.wait()
            assert await kernel.answer() == (8, errno.EINTR, b"")
            await trio.sleep(0.1)
            arrived.set()
            assert sorted([await kernel.answer() for _ in range(2)]) == [(10, 0, CONTENT), (12, 0, CONTENT)]

    trio.run(main)


def test_who_is_gone(process: subprocess.Popen[bytes]):
    assert not is_gone(0)
    assert not is_gone(threading.get_native_id())
    assert not is_gone(process.pid)
    process.send_signal(signal.SIGSTOP)
    assert not is_gone(process.pid)
    process.kill()
    deadline = time.monotonic() + 20
    while not is_gone(process.pid):
        assert time.monotonic() < deadline
    process.wait()
    assert is_gone(process.pid)


@pytest.mark.usefixtures("_at_once")
@pytest.mark.parametrize("error", [SourceError("down"), DeadlineError("late"), IntegrityError("bad"),
                                   trio.TooSlowError()])
def test_patience_asks_a_source_that_fails_again(error: Exception):
    async def main() -> None:
        async with serving(patient=True) as kernel:
            asked = []

            def fail(offset: int, size: int) -> None:
                asked.append(offset)
                if len(asked) < 4:
                    raise error

            kernel.device.fail = fail
            await kernel.read()
            assert await kernel.answer() == (2, 0, CONTENT)
            assert len(asked) == 4

    trio.run(main)


@pytest.mark.usefixtures("_at_once")
@pytest.mark.parametrize("error", [BugError("x"), FormatError("x"), CacheError("x"), ValueError("x")])
def test_patience_is_for_sources_only(error: Exception):
    async def main() -> None:
        async with serving(patient=True) as kernel:
            def fail(offset: int, size: int) -> None:
                raise error

            kernel.device.fail = fail
            await kernel.read()
            assert (await kernel.answer())[:2] == (2, errno.EIO)

    trio.run(main)


@pytest.mark.usefixtures("_at_once", "_soon")
def test_patience_ends_with_its_reader_and_with_its_mount(process: subprocess.Popen[bytes]):
    async def main() -> None:
        async with serving(patient=True) as kernel:
            asked = trio.Event()

            async def fail() -> None:
                asked.set()
                await trio.sleep(0.01)
                raise SourceError("down")

            kernel.device.fail = lambda offset, size: fail()
            await read_for(kernel, process.pid, 8)
            await asked.wait()
            process.kill()
            assert await kernel.answer() == (8, errno.EINTR, b"")
            kernel.device.fail = lambda offset, size: trio.sleep_forever()   # noqa: ASYNC105 - MemoryDevice awaits it
            await kernel.read(unique=10)
            with trio.fail_after(20):
                while not kernel.device.waiting:   # noqa: ASYNC110 - a set
                    await trio.sleep(0.01)
            for scope in kernel.device.waiting:    # as an unmount does
                scope.cancel()
            assert await kernel.answer() == (10, errno.ETIMEDOUT, b"")

    trio.run(main)


def test_waiting_reads_are_looked_at_only_while_there_are_some(autojump_clock: trio.testing.MockClock):
    refused: list[tuple[int, int]] = []

    async def main() -> None:
        reads = WaitingReads(lambda unique, code: refused.append((unique, code)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reads.watch)
            await trio.sleep(1000)
            read = reads.begin(4, 0)
            reads.bound(read, 10.0)
            before = trio.current_time()
            while not refused:   # noqa: ASYNC110 - a list
                await trio.sleep(0.1)
            assert 10 + waiting.BOUND_GRACE_S <= trio.current_time() - before < 10 + waiting.BOUND_GRACE_S + 1
            assert not reads.end(read)
            assert not reads
            nursery.cancel_scope.cancel()

    trio.run(main, clock=autojump_clock)
    assert refused == [(4, errno.ETIMEDOUT)]
