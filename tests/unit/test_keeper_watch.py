"""What the keeper makes of beats, of the kernel's count, and of time; its connection is a real one in tests/node."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from lazyfs.node import keeperwatch
from lazyfs.node.keeperchild import Child
from lazyfs.node.keeperwatch import Connection, Watch

if TYPE_CHECKING:
    from collections.abc import Iterator

HANG_S, ABORT_S = 10.0, 120.0


class Counted(Connection):
    """The kernel's count is what a test says."""

    count: int | None = 0

    def waiting(self) -> int | None:
        return self.count


class World:
    """A watch, its worker and the time, which goes on in steps as the keeper's turns do."""

    goes_on = False    # also after trouble

    def __init__(self, child: Child) -> None:
        self.connection = Counted("/nowhere")
        self.child = child
        self.now = 1000.0
        child.last_sign = self.now
        self.watch = Watch(self.connection, HANG_S, ABORT_S, self.now)
        self.watch.begin(self.now)

    def turns(self, seconds: float, beat: bytes = b"") -> str:
        """Half a second each; `beat` in every second one. Returns the first trouble."""
        for number in range(round(seconds * 2)):
            self.now += 0.5
            if beat and number % 2:
                self.child.last_sign = self.now
                self.watch.hear(beat)
            self.watch.look(self.child, self.now)
            if trouble := self.watch.trouble(self.child, self.now):
                self.child.last_sign = self.now    # as the keeper does after a kill
                if not self.goes_on:
                    return trouble
        return ""


@pytest.fixture
def world() -> Iterator[World]:
    child = Child(os.getpid(), None)
    child.channel = object()    # type: ignore[assignment] - that there is one
    child.ready = True
    yield World(child)
    os.close(child.pidfd)


def test_silence_is_noticed_and_suspected_before(world: World):
    assert world.turns(HANG_S / 2) == ""
    assert not world.watch.is_suspicious(world.child, world.now)
    assert 0 < world.watch.next_s(world.child, world.now - 0.1, 0.5) < 0.5, "the keeper wakes up for it"
    assert world.turns(1) == ""
    assert world.watch.is_suspicious(world.child, world.now)
    assert "no sign of life for 10 s" in world.turns(HANG_S)
    assert world.now - 1000.0 == HANG_S + 0.5


def test_a_worker_that_beats_is_left_alone(world: World):
    assert world.turns(300, b"beat 5 0") == ""
    assert world.turns(300, b"beat") == "", "of another version"
    assert world.turns(300, b"beat x y") == ""


def test_requests_that_wait_in_vain_are_noticed(world: World):
    world.connection.count = 3
    assert world.turns(HANG_S - 1, b"beat 5 2") == ""
    assert "answered nothing for 10 s" in world.turns(5, b"beat 5 2")


@pytest.mark.parametrize(("count", "beat"), [
    (3, b"beat 5 3"),       # all of them wait for data
    (2000, b"beat 5 -1"),   # so many that the kernel may hold some back
    (None, b"beat 5 0"),    # no fusectl
    (0, b"beat 5 0"),
])
def test_requests_that_wait_for_data_are_not_taken_for_lost(world: World, count: int | None, beat: bytes):
    world.connection.count = count
    assert world.turns(300, beat) == ""


def test_a_worker_that_answers_is_not_stuck(world: World):
    world.connection.count = 3
    for answered in range(60):
        assert world.turns(5, b"beat %d 0" % answered) == ""


def test_what_the_next_worker_does_not_get_either_is_not_tried_for_ever(world: World):
    world.connection.count = 1
    replaced = 0
    for _ in range(100):
        if world.turns(60, b"beat 5 0"):
            replaced += 1
            world.watch.begin(world.now)
    assert 5 <= replaced <= 20


def test_nobody_serves_for_too_long(world: World):
    assert not world.watch.has_hope(world.now), "it has not begun"
    world.turns(1, b"beat 5 0")
    world.child.ready, world.goes_on = False, True
    world.connection.count = 1
    for _ in range(8):
        world.turns(ABORT_S / 8)
        assert not world.watch.is_given_up(world.now)
    world.turns(1)
    assert world.watch.is_given_up(world.now)
    assert not world.watch.is_given_up(world.now), "once"
    assert world.watch.has_hope(world.now), "a keeper that is restarted now would begin to count again"
    world.turns(keeperwatch.HOPE_S)
    assert not world.watch.has_hope(world.now)
    world.child.ready = True
    world.turns(1, b"beat 5 0")
    assert world.watch.has_hope(world.now)


def test_a_connection_that_nobody_waits_for_is_not_given_up(world: World):
    world.child.ready, world.goes_on = False, True
    world.turns(ABORT_S * 2)
    assert not world.watch.is_given_up(world.now)


def test_a_worker_that_was_killed_and_does_not_end_does_not_serve(world: World):
    world.child.killed, world.goes_on = True, True
    world.connection.count = 1
    world.turns(ABORT_S + 1, b"beat 5 0")
    assert world.watch.is_given_up(world.now)


def test_time_in_which_we_slept_too_does_not_count(world: World):
    """A machine that was suspended, a keeper that was stopped: the worker had no turn either."""
    world.connection.count = 1
    world.turns(2, b"beat 5 1")
    world.now += 1000.0
    assert world.turns(HANG_S - 2) == ""
    assert not world.watch.is_given_up(world.now)
    assert "no sign of life" in world.turns(HANG_S)


def test_the_connection_is_found_by_its_mount_point():
    assert keeperwatch._minor_of("/nowhere at all") == ""
    assert keeperwatch._minor_of("/proc").isdigit()
