"""
The zombie test: what made remote disks feared is a container that cannot be killed.

Twenty containers read and execute from a lazy image, by both drivers. Then the network is cut, the registry says
nothing any more, the worker is stopped, the cache's disk is full; each alone, and in pairs. All containers must be
killable, leave nothing, cause no traffic when they are gone; and everything works again when the fault is over.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from lazyfs.fs import mountapi
from lazyfs.registry import RegistryOptions
from tests import diskkit
from tests.convertkit import Layout, run_convert
from tests.daemonkit import Daemon, end_daemon, start_daemon
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.registrykit import running_registry
from tests.zombiekit import Containers, adopting, require_zombies, zombie_layer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.diskkit import Mounts
    from tests.mountkit import Machine

pytestmark = pytest.mark.mount
READ_TIMEOUT_S = 3.0
HANG_S = 4.0
KILLABLE_S = READ_TIMEOUT_S + 12.0          # beside other tests
QUIET_S = 1.0                    # no byte, no request, no connection for so long
COUNT, PAIR_COUNT = 20, 6        # containers a round; pairs with fewer: starting them is most of this test
DISK_BYTES = 160 << 20
FAULTS = ("cut", "silence", "stop", "full")
PAIRS = [f"{one}-{other}" for one, other in itertools.combinations(FAULTS, 2)]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    require_zombies()
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        source = Layout(tmp_path_factory.mktemp("source") / "in")
        source.add_image("app", [zombie_layer((*FAULTS, *PAIRS), COUNT)])
        run_convert(source.reference("app"), f"docker://{running.host}/app:lazy",
                    registry=RegistryOptions(insecure=True))
        yield running.host


class Trouble:
    """The faults, by name; each can be lifted."""

    def __init__(self, proxy: FaultProxy, daemon: Daemon, cache: Path) -> None:
        self._proxy = proxy
        self._daemon = daemon
        self._filler = cache / "filler"

    def begin(self, names: list[str]) -> None:
        """All but the worker's: what is asked for must have reached it."""
        if "cut" in names:
            self._proxy.down()
        if "silence" in names:
            self._proxy.add(Fault(Kind.BLACK_HOLE, path=r"/blobs/"))
        if "full" in names:
            with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass

    def stop_worker(self, names: list[str]) -> int:
        """Returns its pid, or 0: it goes on."""
        if "stop" not in names:
            return 0
        worker = self._daemon.worker()
        os.kill(worker, signal.SIGSTOP)
        return worker

    def lift(self, stopped: int) -> None:
        self._proxy.clear()
        self._proxy.up()
        self._filler.unlink(missing_ok=True)
        self._daemon.wait_ready(not_worker=stopped)

    def traffic(self) -> tuple[int, int, int]:
        return len(self._proxy.requests), self._proxy.body_bytes_sent, self._proxy.refused

    def wait_quiet(self, within_s: float) -> None:
        """Until the registry is left alone."""
        deadline = time.monotonic() + within_s
        before, since = self.traffic(), time.monotonic()
        while time.monotonic() - since < QUIET_S:
            assert time.monotonic() < deadline, f"still asked for the dead: {before}, then {self.traffic()}"
            time.sleep(0.02)
            if self.traffic() != before:
                before, since = self.traffic(), time.monotonic()


@pytest.fixture
def cache(machine: Machine, mounts: Mounts, tmp_path: Path) -> Iterator[Path]:
    """The daemon's cache, on a disk of its own that can be filled."""
    image = diskkit.ext4(tmp_path / "disk", DISK_BYTES)
    place = mounts("-o", "loop", image, name=machine.cache.name)
    place.chmod(0o700)
    assert place == machine.cache
    yield place
    if os.path.ismount(place):    # else the machine's end has taken it along
        diskkit.umount(place)
    diskkit.wait_detached(image)


@pytest.mark.parametrize("rounds", [FAULTS, PAIRS], ids=["alone", "in pairs"])
def test_every_container_can_be_killed_whatever_fails(
    machine: Machine, cache: Path, registry: str, rounds: list[str]
) -> None:
    environment = {"LAZYFS_DAEMON_HEARTBEAT_S": "0.5", "LAZYFS_CACHE_FULL_COPY": "off"}   # copies are for the node
    daemon = start_daemon(machine, "--hang-timeout", str(HANG_S), environment=environment)
    with FaultProxy(registry) as proxy, adopting():
        try:
            daemon.wait_ready()
            lowers = [mounted(machine, proxy.host, driver) for driver in ("erofs", "fuse")]
            trouble = Trouble(proxy, daemon, cache)
            for name in rounds:
                play(machine, trouble, lowers, name)
            for lower in lowers:
                machine.umount(lower)
            assert not [entry for entry in mountapi.mounts() if entry.fs_type == "overlay"
                        and entry.target.startswith(f"{machine.directory}/")]
            daemon.stop()
        finally:
            end_daemon(daemon)
    machine.assert_clean()


def play(machine: Machine, trouble: Trouble, lowers: list[Path], name: str) -> None:
    """One round: start, fault, kill, look, lift. What `up` says is that the round before has left nothing broken."""
    faults = name.split("-")
    count = COUNT if len(faults) == 1 else PAIR_COUNT
    with Containers(machine.directory / "containers", lowers, name, count) as group:
        group.wait("up")
        trouble.begin(faults)
        group.go()
        group.wait("begun")
        stopped = trouble.stop_worker(faults)
        if faults == ["full"]:
            group.wait("done")    # reads are served from memory
        group.kill(KILLABLE_S)
    trouble.wait_quiet(KILLABLE_S + HANG_S)
    trouble.lift(stopped)


def mounted(machine: Machine, host: str, driver: str) -> Path:
    target = machine.target(driver)
    machine.lazyfs("mount", f"{host}/app:lazy", target, "--insecure", "--driver", driver, "--no-prefetch",
                   "--read-timeout", str(READ_TIMEOUT_S))
    return target
