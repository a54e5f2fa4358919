"""The gate: when tokens are asked for, renewed, shown, believed. On MockClock; the time of day goes with it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lazyfs.errors import PeerError, PeerRefusedError, SourceError
from lazyfs.peers import gate as gates
from lazyfs.peers.gate import OpenGate, TokenGate
from lazyfs.peers.tokens import Claims, NodeKey, PublicKeys, SigningKey, dump_keys, parse_keys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from trio.testing import MockClock

pytestmark = pytest.mark.trio

EPOCH = 1_900_000_000.0
A, B = "device/sha256:" + "a" * 64, "device/sha256:" + "b" * 64


def now() -> float:
    return EPOCH + trio.current_time()


class Tracker:
    """Signs what it is asked for; may be away, slow, or refuse."""

    def __init__(self, *members: str) -> None:
        self.signing = SigningKey(Ed25519PrivateKey.generate())
        self.asked: list[tuple[str, ...]] = []
        self.is_away = False
        self.delay_s = 0.0
        self.tells_time = True
        self.refused: set[str] = set()

    def of(self, member: str) -> Asker:
        return Asker(self, member)

    async def answer(self) -> None:
        await trio.sleep(self.delay_s)
        if self.is_away:
            raise PeerError("the tracker is away")


class Asker:
    """gate.Authority of one node."""

    def __init__(self, tracker: Tracker, member: str) -> None:
        self.tracker, self.member = tracker, member

    async def keys(self) -> PublicKeys:
        await self.tracker.answer()
        return parse_keys(dump_keys([self.tracker.signing.public], now() if self.tracker.tells_time else 0.0))

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    async def issue(self, keys: Sequence[str], holder: NodeKey) -> Mapping[str, tuple[str, float]]:
        self.tracker.asked.append(tuple(keys))
        await self.tracker.answer()
        if set(keys) <= self.tracker.refused:
            raise PeerRefusedError("not yours")
        sign = self.tracker.signing.sign
        return {key: (sign(Claims(self.member, "prod", key, now() + 600, holder.public), now()), 600.0)
                for key in keys if key not in self.tracker.refused}


@asynccontextmanager
async def running(tracker: Tracker, *members: str, grace_s: float = 0.0, by_resource: bool = True,
                  ) -> AsyncIterator[list[TokenGate]]:
    made = [TokenGate("prod", (one,), tracker.of(one), by_resource, grace_s, now) for one in members]
    async with trio.open_nursery() as nursery:
        for one in made:
            nursery.start_soon(one.run)
        await trio.sleep(0.1)
        yield made
        nursery.cancel_scope.cancel()


async def test_one_is_shown_and_admits(autojump_clock: MockClock) -> None:
    tracker = Tracker()
    async with running(tracker, "a", "b", "c") as (a, b, c):
        shown = await a.token(A, "b")
        member, seconds = b.admit(shown, A)
        assert member == "a"
        assert 590 < seconds <= 600
        assert b.admit(shown, A)[0] == "a"          # out of what is known
        for gate, key in ((c, A), (b, B), (a, A)):
            with pytest.raises(PeerRefusedError):
                gate.admit(shown, key)
        with pytest.raises(PeerRefusedError, match="no token"):
            b.admit("", A)
        assert (b.counts.admitted, b.counts.refused) == (2, 2)


@pytest.mark.parametrize("off_s", [-86_400.0, 86_400.0])
async def test_a_node_whose_clock_is_wrong_takes_part_by_the_trackers(
        off_s: float, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker()
    async with running(tracker, "a", "b") as (a, b):
        b.now = lambda: now() + off_s
        await trio.sleep(2 * gates.KEYS_EVERY_S)
        assert b.admit(await a.token(A, "b"), A)[0] == "a"
        assert a.admit(await b.token(A, "a"), A)[0] == "b"
        shown = await a.token(A, "b")
        await trio.sleep(600 + gates.SKEW_S + 1)               # and a token ends when the tracker says
        with pytest.raises(PeerRefusedError, match="ended"):
            b.admit(shown, A)
        assert sum("tokens are judged by the tracker's" in record.getMessage() for record in caplog.records) == 1
        tracker.tells_time = False                       # one of an older version
        await trio.sleep(2 * gates.KEYS_EVERY_S)
        with pytest.raises(PeerRefusedError, match="of the future" if off_s < 0 else "ended"):
            b.admit(await a.token(A, "b"), A)


async def test_why_there_is_no_token_is_told_and_logged_but_not_again_and_again(
        autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker()
    async with running(tracker, "a", "b") as (a, b):
        assert a.describe()["last_failed"] == a.describe()["last_refused"] == {}
        tracker.refused = {A}
        shown = await a.token(B, "b")
        for _ in range(50):                                    # a stranger that tries, and a reader
            for wrong in ("", "x" * 700, shown[:-3] + "AAA", "\u2028nonsense"):
                with pytest.raises(PeerRefusedError):
                    b.admit(wrong, A)
            with pytest.raises(PeerRefusedError, match="not yours"):
                await a.token(A, "b")
            await trio.sleep(1.0)
        found = a.describe()["last_failed"]
        assert isinstance(found, dict)
        assert found["why"] == "not yours"
        assert found["seconds_ago"] <= gates.REFUSED_S
        told = b.describe()["last_refused"]
        assert isinstance(told, dict)
        assert told["why"]
        said = [record.getMessage() for record in caplog.records]
        assert sum("no token to be had" in line and "not yours" in line for line in said) == 1
        assert sum("a token that was shown is refused: no token was shown ([peers] tokens" in line
                   for line in said) == 1
        assert not any(shown[:40] in line for line in (*said, str(told)))


async def test_many_readers_of_one_resource_ask_once(autojump_clock: MockClock) -> None:
    tracker = Tracker()
    tracker.delay_s = 1.0
    async with running(tracker, "a") as (a,), trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(a.token, A if number % 2 else B, f"peer-{number}")
    assert sorted(tracker.asked) == [(A,), (B,)]


async def test_it_is_renewed_while_it_is_used_and_no_reader_waits(autojump_clock: MockClock) -> None:
    tracker = Tracker()
    async with running(tracker, "a", "b") as (a, b):
        await a.token(A, "b")
        tracker.delay_s = 2.0                        # whoever asks from now on would be seen waiting
        for _ in range(100):
            await trio.sleep(60)
            began = trio.current_time()
            shown = await a.token(A, "b")
            assert trio.current_time() == began
            b.admit(shown, A)
        assert 10 <= len(tracker.asked) <= 14        # every eight minutes of a hundred
        await trio.sleep(gates.UNUSED_S + 1000)
        asked = len(tracker.asked)
        await trio.sleep(3600)
        assert len(tracker.asked) == asked           # nobody wants it any longer


async def test_the_layers_of_an_image_are_renewed_in_one_question(autojump_clock: MockClock) -> None:
    tracker = Tracker()
    async with running(tracker, "a") as (a,):
        for key in (A, B):
            await a.token(key, "b")
        await trio.sleep(550)
    assert tracker.asked == [(A,), (B,), (A, B)]


async def test_who_is_refused_is_not_asked_for_again_at_once(autojump_clock: MockClock) -> None:
    tracker = Tracker()
    tracker.refused = {A}
    async with running(tracker, "a") as (a,):
        for _ in range(10):
            with pytest.raises(PeerRefusedError, match="not yours"):
                await a.token(A, "b")
        assert len(tracker.asked) == 1
        tracker.refused = set()
        await trio.sleep(gates.REFUSED_S + 1)
        assert await a.token(A, "b")


async def test_a_right_that_is_taken_away_ends_with_the_token(autojump_clock: MockClock) -> None:
    tracker = Tracker()
    async with running(tracker, "a", "b") as (a, b):
        for key in (A, B):
            await a.token(key, "b")
        tracker.refused = {A}
        await trio.sleep(601)
        with pytest.raises(PeerRefusedError):
            await a.token(A, "b")
        b.admit(await a.token(B, "b"), B)


async def test_a_lost_tracker_costs_a_first_reader_little_and_others_nothing(autojump_clock: MockClock) -> None:
    tracker = Tracker()
    async with running(tracker, "a", "b") as (a, b):
        await a.token(A, "b")
        tracker.is_away, tracker.delay_s = True, 60.0
        began = trio.current_time()
        with pytest.raises(SourceError):
            await a.token(B, "b")
        assert trio.current_time() - began == pytest.approx(gates.ASK_S)
        with pytest.raises(SourceError) as caught:
            await a.token(B, "b")
        assert not isinstance(caught.value, PeerError)      # nobody must think that the peer is dead
        assert trio.current_time() - began == pytest.approx(gates.ASK_S)
        b.admit(await a.token(A, "b"), A)
        assert trio.current_time() - began == pytest.approx(gates.ASK_S)


@pytest.mark.parametrize("grace_s", [0.0, 7200.0])
async def test_swarms_go_on_without_the_tracker_for_the_time_that_was_set(
        grace_s: float, autojump_clock: MockClock) -> None:
    tracker = Tracker()
    async with running(tracker, "a", "b", grace_s=grace_s) as (a, b):
        await a.token(A, "b")
        tracker.is_away = True
        worked = []
        for _ in range(160):
            await trio.sleep(60)
            try:
                b.admit(await a.token(A, "b"), A)
            except SourceError:
                worked.append(False)
            else:
                worked.append(True)
        good = worked.index(False)
        assert not any(worked[good:])                # and then never again
        assert good * 60 == pytest.approx(660 + grace_s, abs=90)
        tracker.is_away = False
        await trio.sleep(70)
        b.admit(await a.token(A, "b"), A)


async def test_no_grace_for_a_node_whose_tracker_answers(autojump_clock: MockClock) -> None:
    """An old token does not count because the one who shows it says that there is no tracker."""
    tracker = Tracker()
    async with running(tracker, "a", "b", grace_s=7200.0) as (a, b):
        shown = await a.token(A, "b")
        b.admit(shown, A)
        await trio.sleep(700)
        with pytest.raises(PeerRefusedError, match="ended"):
            b.admit(shown, A)


async def test_a_new_key_is_learnt_in_seconds_and_an_old_one_forgotten(autojump_clock: MockClock) -> None:
    tracker = Tracker()
    async with running(tracker, "a", "b") as (a, b):
        old = await a.token(A, "b")
        b.admit(old, A)
        await trio.sleep(20)
        tracker.signing = SigningKey(Ed25519PrivateKey.generate())
        new = await a.token(B, "b")
        with pytest.raises(PeerRefusedError):
            b.admit(new, B)                          # makes it look
        await trio.sleep(gates.KEYS_AGAIN_S + 1)
        b.admit(new, B)
        with pytest.raises(PeerRefusedError):
            b.admit(old, A)


async def test_strangers_cannot_make_a_node_ask_the_tracker_often(autojump_clock: MockClock) -> None:
    tracker, looks = Tracker(), list[float]()
    asker = tracker.of("b")
    whole: Callable[[], object] = asker.keys

    async def counted() -> PublicKeys:
        looks.append(trio.current_time())
        return await whole()    # type: ignore[misc]

    asker.keys = counted  # type: ignore[method-assign]
    gate = TokenGate("prod", ("b",), asker, now=now)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gate.run)
        for number in range(1000):
            await trio.sleep(5 if number % 50 == 0 else 0)
            with pytest.raises(PeerRefusedError):
                gate.admit(f"x.y.{number}~z", A)
        nursery.cancel_scope.cancel()
    assert len(looks) <= 100 / gates.KEYS_AGAIN_S + 2


async def test_a_token_of_the_whole_cluster_does_not_count_where_resources_are_told_apart(
        autojump_clock: MockClock) -> None:
    tracker = Tracker()
    async with running(tracker, "a", "b", by_resource=False) as (a, b), running(tracker, "b") as (strict,):
        shown = await a.token(A, "b")
        assert b.admit(shown, A)[0] == b.admit(await a.token(B, "b"), B)[0] == "a"
        assert tracker.asked == [("*",)]
        with pytest.raises(PeerRefusedError, match="something else"):
            strict.admit(shown, A)


async def test_what_is_kept_is_bounded(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "TOKEN_COUNT_MAX", 8)
    monkeypatch.setattr(gates, "ADMITTED_COUNT_MAX", 8)
    tracker = Tracker()
    async with running(tracker, "a", "b") as (a, b):
        for number in range(40):
            key = f"device/sha256:{number:064x}"
            b.admit(await a.token(key, "b"), key)
        assert len(a._held) == len(b._admitted) == 8


async def test_without_tokens_everybody_is_admitted() -> None:
    gate = OpenGate()
    assert await gate.token(A, "b") == ""
    assert gate.admit("", A)[0] == ""
