"""Who is sent to whom for a piece that many read: in the order in which they asked, and never in a ring."""

from __future__ import annotations

import random

import pytest

from lazyfs.peers import referrals
from lazyfs.peers.referrals import Referrals

KEY = "device/sha256:00"


class Directory:
    """`gone`: members that nobody is to be sent to."""

    def __init__(self, name: str, *, has: bool = False) -> None:
        self.name = name
        self.has = has
        self.gone: set[str] = set()
        self.referrals = Referrals()

    def ask(self, asker: str, index: int = 0) -> str:
        return self.referrals.source(KEY, index, asker, here=lambda: self.name if self.has else "",
                                     usable=lambda member: member not in self.gone)


def test_the_first_goes_to_the_origin_and_each_other_to_one_that_asked_before_two_to_each() -> None:
    directory = Directory("d")
    assert [directory.ask(asker) for asker in "abcdefg"] == list("aaabbcc")


def test_what_the_directory_has_it_gives_itself_twice() -> None:
    directory = Directory("d", has=True)
    assert [directory.ask(asker) for asker in "abcefg"] == list("ddaabb")


def test_a_directory_that_reads_itself_is_one_of_them() -> None:
    directory = Directory("d")
    assert [directory.ask(asker) for asker in ("a", "d", "b", "c")] == ["a", "a", "a", "d"]


def test_each_piece_has_its_own_order() -> None:
    directory = Directory("d")
    assert [directory.ask("a", 0), directory.ask("b", 1), directory.ask("b", 0)] == ["a", "b", "a"]


def test_who_asks_again_is_not_sent_anywhere() -> None:
    directory = Directory("d")
    assert [directory.ask("a"), directory.ask("b"), directory.ask("a"), directory.ask("b")] == ["a", "a", "", ""]


def test_nobody_is_sent_to_one_that_is_gone() -> None:
    directory = Directory("d")
    for asker in "abc":
        directory.ask(asker)
    directory.gone = {"b"}
    assert [directory.ask(asker) for asker in "xy"] == ["a", "a"]
    directory.gone = set("abcx")
    assert directory.ask("z") == "y"
    directory.gone |= {"y", "z"}
    assert directory.ask("w") == "w"        # nobody is left: the origin, once
    assert directory.ask("v") == "w"


@pytest.mark.parametrize("seed", range(20))
def test_whoever_is_gone_and_asks_again_each_waits_for_one_that_was_told_before(seed: int) -> None:
    draw = random.Random(seed)
    directory, told = Directory("d", has=draw.random() < 0.5), ["d"]
    for _ in range(200):
        asker = f"m{draw.randrange(60)}"
        directory.gone = {f"m{draw.randrange(60)}" for _ in range(draw.randrange(40))} - {asker}
        source = directory.ask(asker)
        if source == "":
            continue
        assert source == asker or source in told
        told.append(asker)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(referrals, "PIECES_MAX", 2)
    monkeypatch.setattr(referrals, "ASKERS_MAX", 3)
    directory = Directory("d")
    for index in (0, 1, 2):
        assert directory.ask("a", index) == "a"
    assert directory.ask("b", 0) == "b"      # forgotten: somebody asks the origin once more
    for asker in "cd":
        directory.ask(asker, 2)
    assert {directory.ask(f"late{number}", 2) for number in range(6)} == {"a", "c", "d"}
    directory.referrals.forget(KEY)
    assert directory.ask("z", 2) == "z"
