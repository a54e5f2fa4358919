"""
A registry in trouble, seen by a container: what is cached is read, the rest ends in its errno in time; why and since
when is told; and when the trouble is over, everything goes on by itself. The table is in docs/operations.md.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from tests.convertkit import registry_with, tar_of
from tests.daemonkit import Daemon, end_daemon, start_daemon
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.mountkit import Machine, require_mounting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.registrykit import Registry

pytestmark = pytest.mark.mount
RNG = random.Random(64)
FILE_BYTES = 1_200_000       # more than a chunk: no two of them have all of theirs in common
COUNT = 13
FILES = {f"f{number:02}": RNG.randbytes(FILE_BYTES) for number in range(COUNT)}
TIMEOUT_S = 2.0
SLACK_S = 8.0                # of a machine with other work; a read that hangs would take a minute
RECOVERY_S = 40.0
BLOBS = "/blobs/"


@dataclass
class World:
    daemon: Daemon
    machine: Machine
    registry: Registry
    proxy: FaultProxy
    target: Path
    fresh: list[str] = field(default_factory=lambda: sorted(FILES)[1:])

    def read(self, name: str) -> int:
        """All of a file, past the page cache: 0, or the errno."""
        descriptor = os.open(self.target / name, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            data = b"".join(iter(lambda: os.read(descriptor, 1 << 17), b""))
        except OSError as error:
            return error.errno or -1
        finally:
            os.close(descriptor)
        assert data == FILES[name]
        return 0

    def sources(self) -> list[dict[str, Any]]:
        """Those that are not well."""
        found: list[dict[str, Any]] = self.daemon.health()["sources"]
        return found

    def blob(self) -> Path:
        """The largest file of the registry: the layer's blob."""
        return max(self.registry.storage.rglob("data"), key=lambda path: path.stat().st_size)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    require_mounting()
    machine = Machine(tmp_path_factory.mktemp("machine"))
    environment = {"LAZYFS_CACHE_FULL_COPY": "off", "HOME": str(machine.directory)}
    with registry_with(tmp_path_factory.mktemp("registry"), {"app": [tar_of(FILES)]}) as registry:
        daemon = start_daemon(machine, environment=environment)
        try:
            daemon.wait_ready()
            with FaultProxy(registry.host) as proxy:
                target = machine.target()
                machine.lazyfs("mount", f"{proxy.host}/app:lazy", target, "--insecure", "--no-prefetch",
                               "--driver", "fuse", "--read-timeout", str(TIMEOUT_S))    # EROFS makes EIO of everything
                made = World(daemon, machine, registry, proxy, target)
                assert made.read("f00") == 0
            yield made
        finally:
            end_daemon(daemon)


@pytest.fixture
def world(node: World) -> Iterator[World]:
    """With a proxy of its own, at the same address: what a fault keeps open ends with it."""
    port = int(node.proxy.host.rpartition(":")[2])
    with FaultProxy(node.registry.host, port=port) as proxy:
        node.proxy = proxy
        yield node


@dataclass(frozen=True)
class Trouble:
    """`errnos`: that a read of what is not here may end with; `states`: of the source then."""

    name: str
    errnos: set[int]
    states: set[str]
    fault: Fault | None = None
    begin: Callable[[World], None] = lambda _: None
    end: Callable[[World], None] = lambda _: None


AWAY = {"failing", "down", "probing"}


def hide_blob(world: World) -> None:
    path = world.blob()
    path.rename(path.with_name("data-that-is-gone"))


def show_blob(world: World) -> None:
    path = next(world.registry.storage.rglob("data-that-is-gone"))
    path.rename(path.with_name("data"))


TROUBLES = [
    Trouble("down", {errno.ETIMEDOUT}, AWAY, begin=lambda world: world.proxy.down(),
            end=lambda world: world.proxy.up()),
    Trouble("black hole", {errno.ETIMEDOUT}, AWAY, Fault(Kind.BLACK_HOLE, path=BLOBS)),
    Trouble("drips", {errno.ETIMEDOUT}, AWAY, Fault(Kind.DRIP, path=BLOBS, size=1, seconds=0.2)),
    Trouble("server error", {errno.ETIMEDOUT}, AWAY, Fault(Kind.STATUS, path=BLOBS, status=500)),
    Trouble("too many requests", {errno.EIO, errno.ETIMEDOUT}, {"paused", "failing"},
            Fault(Kind.STATUS, path=BLOBS, status=429, headers={"Retry-After": "2"})),
    Trouble("wrong bytes", {errno.EIO}, {"lying"}, Fault(Kind.FLIP, path=BLOBS, at=100)),
    Trouble("all instead of a part", {errno.ETIMEDOUT}, AWAY, Fault(Kind.IGNORE_RANGE, path=BLOBS)),
    Trouble("not logged in", {errno.EACCES}, {"refusing"}, Fault(Kind.STATUS, path=BLOBS, status=401)),
    Trouble("blob deleted", {errno.EIO}, {"refusing"}, begin=hide_blob, end=show_blob),
]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.name.replace(" ", "-"))
def test_what_is_cached_is_read_the_rest_ends_in_time_and_all_goes_on_afterwards(
    world: World, trouble: Trouble,
) -> None:
    name = world.fresh.pop()
    assert wait_until(lambda: not world.sources(), RECOVERY_S), "the trouble before is over"
    before = time.time()
    log = world.machine.directory / "daemon.log"
    said_before = len(log.read_text())
    if trouble.fault is not None:
        world.proxy.add(trouble.fault)
    trouble.begin(world)
    try:
        began = time.monotonic()
        assert world.read(name) in trouble.errnos
        assert time.monotonic() - began < TIMEOUT_S + SLACK_S
        assert world.read("f00") == 0, "it is here"
        (told,) = world.sources()
        assert told["source"] == world.proxy.host
        assert told["state"] in trouble.states
        assert told["why"]
        assert before - 1 <= told["since"] <= time.time()
        assert told["last_ok"] < before + 1
        said = log.read_text()[said_before:]
        assert any("read: " in line and world.proxy.host in line for line in said.splitlines()), "nobody said why"
    finally:
        world.proxy.clear()
        trouble.end(world)
    assert wait_until(lambda: world.read(name) == 0, RECOVERY_S), "it does not go on by itself"
    assert not world.sources()


def test_one_that_flaps_is_not_noticed_by_readers(world: World) -> None:
    assert wait_until(lambda: not world.sources(), RECOVERY_S)
    for _ in range(2):
        name = world.fresh.pop()
        world.proxy.add(Fault(Kind.RESET, path=BLOBS, at=-1, times=2))
        assert world.read(name) == 0
        world.proxy.clear()


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        with contextlib.suppress(AssertionError):
            if condition():
                return True
        time.sleep(0.1)
    return False
