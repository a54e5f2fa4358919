"""When the start of an image with a hot part is over."""

from __future__ import annotations

from lazyfs.node.hotstart import COLD_BYTES_MAX, QUIET_S, HotStart


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_start_that_has_not_begun_is_not_over() -> None:
    clock = Clock()
    start = HotStart(clock)
    clock.now += 100 * QUIET_S
    assert not start.is_over(0, 0)


def test_it_is_over_when_nothing_was_read_for_a_while() -> None:
    clock = Clock()
    start = HotStart(clock)
    for count in range(1, 10):
        assert not start.is_over(count, 0)
        clock.now += QUIET_S - 0.1
        assert not start.is_over(count, 0)
    clock.now += 0.2
    assert start.is_over(9, 0)


def test_it_is_over_when_the_program_reads_what_is_not_hot() -> None:
    start = HotStart(Clock())
    assert not start.is_over(0, COLD_BYTES_MAX)
    assert start.is_over(0, COLD_BYTES_MAX + 1)


def test_after_a_takeover_it_ends_even_if_nothing_is_read_any_more() -> None:
    clock = Clock()
    start = HotStart(clock, begun=True)
    assert not start.is_over(0, 0)
    clock.now += QUIET_S
    assert start.is_over(0, 0)
