"""The quick loop: one reader at a time, nobody forgotten, EAGAIN survived, others get their turn."""

from __future__ import annotations

import errno
import os

import pytest
import trio
import trio.testing

from lazyfs.fs import loop


def test_the_lock_is_taken_again_without_a_hand_over_and_handed_over_on_demand():
    async def main() -> None:
        lock = loop.ReadLock()
        order: list[str] = []

        async def second() -> None:
            async with lock:
                order.append("second")

        async with trio.open_nursery() as nursery:
            async with lock:
                nursery.start_soon(second)
                await trio.testing.wait_all_tasks_blocked()
            async with lock:    # free, though somebody waits
                order.append("first again")
            await trio.testing.wait_all_tasks_blocked()
            assert order == ["first again"]
            lock.hand_over()
        assert order == ["first again", "second"]

    trio.run(main)


def test_a_hand_over_while_somebody_reads_wakes_nobody():
    async def main() -> None:
        lock = loop.ReadLock()
        async with trio.open_nursery() as nursery:
            async def wait() -> None:
                async with lock:
                    pass

            async with lock:
                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                lock.hand_over()
                assert lock._waiters.statistics().tasks_waiting == 1
            lock.wake_all()

    trio.run(main)


def test_a_reader_that_meets_eagain_begins_again_and_wakes_all_at_its_end():
    async def main() -> None:
        quick = loop.QuickLoop()
        tries = []

        async def reader(limit: int) -> None:
            tries.append(limit)
            if len(tries) < limit:
                raise OSError(errno.EAGAIN, "withdrawn")

        async def parked() -> None:
            async with quick.Lock():
                pass

        async with quick.open_nursery() as nursery:
            async with quick.Lock():
                nursery.start_soon(parked)
                await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(reader, 3, name="reader")
        assert tries == [3, 3, 3]

    trio.run(main)


def test_other_errors_of_a_reader_are_not_hidden():
    async def main() -> None:
        async def reader() -> None:
            raise OSError(errno.EIO, "broken")

        async with loop.QuickLoop().open_nursery() as nursery:
            nursery.start_soon(reader)

    with pytest.raises(BaseExceptionGroup) as info:
        trio.run(main)
    assert info.group_contains(OSError, match="broken")


def test_other_tasks_get_a_turn_under_constant_traffic():
    async def main() -> None:
        reader, writer = os.pipe()
        os.write(writer, b"x")    # readable for ever
        lowlevel = loop.QuickLoop().lowlevel
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await trio.lowlevel.checkpoint()

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(other)
                for _ in range(10 * loop.STREAK_MAX):
                    await lowlevel.wait_readable(reader)
                nursery.cancel_scope.cancel()
        finally:
            os.close(reader)
            os.close(writer)
        assert turns >= 8

    trio.run(main)


def test_waiting_for_what_does_not_come_is_trios_own_wait():
    async def main() -> None:
        reader, writer = os.pipe()
        lowlevel = loop.QuickLoop().lowlevel
        try:
            with trio.move_on_after(0.05) as scope:
                await lowlevel.wait_readable(reader)
            assert scope.cancelled_caught
            os.write(writer, b"x")
            await lowlevel.wait_readable(reader)
        finally:
            os.close(reader)
            os.close(writer)

    trio.run(main)
