"""Mirrors that are slow, silent or flapping: a second one is asked in time, rarely, and the slow one is left alone."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import NotFoundError, SourceError
from lazyfs.registry import RegistryOptions, mirrors, open_destination, open_source
from lazyfs.registry.hedge import Race
from lazyfs.registry.mirrors import HEALTH, HEDGE_FIRST_S, HEDGE_SHARE, HEDGE_STOCK_FIRST
from lazyfs.registry.streams import read_exactly
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.registrykit import running_registry
from tests.smallimage import SmallImage, write_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lazyfs.registry.place import ImageSource
    from tests.registrykit import Registry

LAYER = bytes(range(256)) * 500
DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Registry, SmallImage]]:
    with running_registry(tmp_path_factory.mktemp("registry")) as registry:
        destination = open_destination(f"{registry.host}/team/app:1", RegistryOptions())
        image = write_image(destination, [LAYER])
        destination.close()
        yield registry, image


class World:
    """`first` and `second` are the mirrors of `upstream`."""

    def __init__(self, image: SmallImage, source: ImageSource, proxies: list[FaultProxy]) -> None:
        self.image, self.source = image, source
        self.upstream, self.first, self.second = proxies

    def read(self, times: int = 1) -> float:
        """The slowest one's seconds."""
        slowest = 0.0
        for _ in range(times):
            began = time.monotonic()
            with self.source.read_range(self.image.digest, 10, 100, began + DEADLINE_S) as stream:
                assert read_exactly(stream, 100) == LAYER[10:110]
            slowest = max(slowest, time.monotonic() - began)
        return slowest

    def asked(self, proxy: FaultProxy) -> int:
        return len(proxy.seen(path="/blobs/"))


@pytest.fixture
def world(stored: tuple[Registry, SmallImage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("HOME", str(tmp_path))
    HEALTH.__init__()  # type: ignore[misc]  # what earlier tests taught it
    monkeypatch.setattr(mirrors, "HEDGE_S_MIN", 0.75)      # beside other tests an answer may take a while
    monkeypatch.setattr(mirrors, "HEDGE_FIRST_S", 5.0)
    registry, image = stored
    with FaultProxy(registry.host) as upstream, FaultProxy(registry.host) as first, FaultProxy(registry.host) as second:
        place = tmp_path / upstream.host
        place.mkdir()
        (place / "hosts.toml").write_text("".join(f'[host."http://{proxy.host}"]\n' for proxy in (first, second)))
        source = open_source(f"{upstream.host}/team/app:1", RegistryOptions(hosts_dir=tmp_path))
        yield World(image, source, [upstream, first, second])
        source.close()
    for thread in threading.enumerate():
        if thread.name == "lazyfs-hedge":
            thread.join(10)
            assert not thread.is_alive(), "the loser's thread stays"


def test_a_mirror_that_is_silent_once_costs_no_more_than_its_usual_time(world: World) -> None:
    usual_s = world.read(times=20)
    world.first.add(Fault(Kind.BLACK_HOLE, path="/blobs/", times=1))
    took_s = world.read()
    assert (world.asked(world.first), world.asked(world.second)) == (21, 1)
    assert took_s < usual_s + DEADLINE_S / 3, "not its time-out"
    assert not world.upstream.requests
    world.read(times=3)
    assert world.asked(world.first) == 24, "once is an accident"


def test_a_black_holed_mirror_is_left_alone_soon_and_tried_again_later(
    world: World, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mirrors, "PAUSE_FIRST_S", 1.0)
    world.read(times=10)
    world.first.forget()
    for known in HEALTH._servers.values():
        known.stock = mirrors.HEDGE_STOCK_MAX
    fault = world.first.add(Fault(Kind.BLACK_HOLE, path="/blobs/"))
    assert world.read(times=3) < DEADLINE_S / 3
    assert world.asked(world.first) == 3
    state = next(one for one in HEALTH.describe() if one["server"].startswith(world.first.host))
    assert state["state"] == "left alone"
    assert "slower" in state["why"]
    assert state["since"] is not None
    world.read(times=5)
    assert world.asked(world.first) == 3
    world.first.clear()
    assert fault.applied == 3
    limit = time.monotonic() + 20
    while world.asked(world.first) == 3 and time.monotonic() < limit:
        world.read()
    assert world.asked(world.first) >= 4, "it gets another chance"
    state = next(one for one in HEALTH.describe() if one["server"].startswith(world.first.host))
    assert (state["state"], state["why"], state["since"]) == ("ok", "", None)


def test_second_requests_are_few(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mirror that is always slower than the wait for it must not double the load."""
    monkeypatch.setattr(mirrors, "HEDGE_S_MAX", 0.001)
    monkeypatch.setattr(mirrors, "HEDGE_S_MIN", 0.001)
    monkeypatch.setattr(mirrors, "BEATEN_COUNT_MAX", 1000)
    world.first.add(Fault(Kind.DELAY, path="/blobs/", seconds=0.05))
    world.read(times=60)
    assert world.asked(world.first) == 60
    assert world.asked(world.second) <= HEDGE_STOCK_FIRST + 60 * HEDGE_SHARE
    assert not world.upstream.requests


def test_a_hedge_is_not_hedged(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "HEDGE_FIRST_S", 0.05)
    for proxy in (world.first, world.second):
        proxy.add(Fault(Kind.DELAY, path="/blobs/", seconds=1.0))
    world.read()
    assert (world.asked(world.first), world.asked(world.second), world.asked(world.upstream)) == (1, 1, 0)


def test_both_fail_and_the_registry_is_asked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "HEDGE_FIRST_S", 0.05)
    world.second.add(Fault(Kind.STATUS, path="/blobs/", status=500))
    world.first.add(Fault(Kind.DELAY, path="/blobs/", seconds=0.6))
    world.first.upstream = "127.0.0.1:1"    # slow, and then nothing
    world.read()
    assert (world.asked(world.second), world.asked(world.upstream)) == (1, 1)


def test_one_request_tries_a_mirror_that_was_left_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "PAUSE_FIRST_S", 0.2)
    monkeypatch.setattr(mirrors, "HEDGE_FIRST_S", 0.3)
    world.first.add(Fault(Kind.STATUS, path="/blobs/", status=500, times=1))
    world.read()
    world.first.add(Fault(Kind.BLACK_HOLE, path="/blobs/"))
    time_up = time.monotonic() + 20
    while HEALTH.describe()[0]["state"] == "left alone" and time.monotonic() < time_up:
        threading.Event().wait(0.01)
    readers = [threading.Thread(target=world.read) for _ in range(8)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(20)
    assert world.asked(world.first) == 2, "eight readers, one of them tried it"


# --- the race itself --------------------------------------------------------------------------------------------------


class Result:
    closed = False

    def close(self) -> None:
        self.closed = True


def race(second: Callable[[], Result], delay_s: float = 0.0, *, allowed: bool = True) -> Race[Result]:
    return Race(second, delay_s, time.monotonic() + 10, lambda: allowed)


def test_the_second_is_not_begun_when_the_first_is_quick() -> None:
    begun: list[int] = []
    mine = Result()
    assert race(lambda: begun.append(1) or Result(), 5.0).run(lambda: mine) is mine  # type: ignore[func-returns-value]
    assert not begun


def test_without_stock_there_is_no_second() -> None:
    begun: list[int] = []
    waited = threading.Event()

    def first() -> Result:
        waited.wait(0.2)
        return Result()

    race(lambda: begun.append(1) or Result(), allowed=False).run(first)  # type: ignore[func-returns-value]
    assert not begun


def test_the_losers_answer_is_closed() -> None:
    ended, theirs, mine = threading.Event(), Result(), Result()

    def first() -> Result:
        ended.wait(10)
        return mine

    def second() -> Result:
        return theirs

    running = race(second)
    threading.Thread(target=lambda: _until(lambda: running.second_won) and ended.set()).start()
    assert running.run(first) is theirs
    assert mine.closed
    assert not theirs.closed


def test_the_firsts_error_counts_when_both_fail() -> None:
    def first() -> Result:
        _until(lambda: running.second_error is not None)
        raise SourceError("mine")

    def second() -> Result:
        raise NotFoundError("theirs")

    running = race(second)
    with pytest.raises(SourceError, match="mine"):
        running.run(first)
    assert str(running.second_error) == "theirs"


def _until(condition: Callable[[], bool]) -> bool:
    limit = time.monotonic() + 10
    while not condition() and time.monotonic() < limit:
        threading.Event().wait(0.005)
    return condition()


def test_the_first_wait_is_short_of_any_reads_deadline() -> None:
    assert HEDGE_FIRST_S < 2
