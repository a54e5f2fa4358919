"""
A node under load while things go wrong: what tests/fault/test_soak.py and test_fault_pairs.py are made of.

    with running_world(tmp_path) as world:
        world.start_readers()
        for fault in FAULTS.values(): fault.begin(world); ...; fault.end(world)
        report = world.finish_readers()

    python -m tests.soakkit SECONDS [SEED]        # a soak by itself; prints a Report as JSON

World: docker-registry, a proxy that misbehaves in front of it, a daemon whose cache is a small disk of its own and
whose quota is less than the images need (so that there is always something to fetch), two images, each mounted by both
drivers. Readers are processes (tests/soakreader.py), so that a hang or a signal is theirs.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyfs.errors import SourceError
from lazyfs.image.prefetch import parse_prefetch
from lazyfs.registry import RegistryOptions
from tests.convertkit import Layout, run_convert, tar_of
from tests.daemonkit import Daemon, end_daemon, start_daemon
from tests.diskkit import ext4, mounted_disks
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.mountkit import Machine
from tests.registrykit import Registry, running_registry
from tests.soakreader import WAYS, content_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IMAGES = ("one", "two")
DRIVERS = ("erofs", "fuse")
DISK_BYTES, QUOTA = 48 << 20, "12MiB"
READ_TIMEOUT_S = 30
BOUND_S = 2 * READ_TIMEOUT_S + 30.0      # the kernel asks again for a page that failed; a machine with other work
HANG_S = 10                      # a machine with other work gives no turn for seconds, and that is no fault here
SETTLE_S = 90.0
OPTIONS = RegistryOptions(insecure=True)


@dataclass
class Report:
    """
    Of all readers together.

    :dead: readers and workers that died of themselves.
    :before: and `after`: of the worker, World.gauges().
    """

    seed: int = 0
    seconds: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)
    compared_bytes: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    longest_s: float = 0.0
    hung: list[str] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    workers: int = 0
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)


@dataclass
class World:
    """See the module."""

    machine: Machine
    registry: Registry
    proxy: FaultProxy
    daemon: Daemon
    disk: Path
    chance: random.Random = field(default_factory=random.Random)
    readers: list[tuple[str, subprocess.Popen[str]]] = field(default_factory=list)
    targets: dict[Path, str] = field(default_factory=dict)

    def mount_all(self) -> None:
        for image in IMAGES:
            for driver in DRIVERS:
                target = self.machine.target(f"{image}-{driver}")
                assert self.mount(image, driver, target)
                self.targets[target] = image

    def mount(self, image: str, driver: str, target: Path) -> bool:
        """Whether it could be done: registry or disk may be away."""
        return self.ask("mount", f"{self.proxy.host}/{image}:lazy", target, "--insecure", "--driver", driver,
                        "--read-timeout", str(READ_TIMEOUT_S))

    def ask(self, *words: str | Path) -> bool:
        """Run `lazyfs`, which may be refused, but neither hangs nor breaks. Whether it worked."""
        with self.machine.start(*words) as process:
            try:
                _, errors = process.communicate(timeout=SETTLE_S)
            except BaseException:
                process.kill()
                raise
        assert "Traceback" not in errors, errors
        assert process.returncode >= 0, f"{words}: {process.returncode}: {errors}"
        return process.returncode == 0

    def start_readers(self, ways: tuple[str, ...] = WAYS) -> None:
        """Each way of reading once, on targets in turn."""
        for number, way in enumerate(ways):
            target = list(self.targets)[number % len(self.targets)]
            self.start_reader(target, way)

    def start_reader(self, target: Path, way: str) -> None:
        order = {"target": str(target), "image": self.targets[target], "way": way, "bound_s": BOUND_S,
                 "seed": self.chance.randrange(1 << 30)}
        process = subprocess.Popen([sys.executable, "-m", "tests.soakreader", json.dumps(order)], text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.readers.append((f"{target.name} {way}", process))

    def finish_readers(self, report: Report) -> None:
        """End them, and take in what they saw. One that does not end hangs in a read."""
        for _, process in self.readers:
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None
        for name, process in self.readers:
            try:
                output, _ = process.communicate(timeout=BOUND_S)
            except subprocess.TimeoutExpired:
                report.hung.append(f"{name}: does not end")
                process.kill()
                process.communicate()
                continue
            if process.returncode:
                report.dead.append(f"{name}: {process.returncode}")
                continue
            found = json.loads(output)
            report.compared_bytes += found["compared_bytes"]
            report.wrong += found["wrong"]
            report.hung += found["hung"]
            report.errors = dict(Counter(report.errors) + Counter(found["errors"]))
            report.longest_s = max(report.longest_s, found["longest_s"])
        self.readers.clear()

    def settle(self, *targets: Path) -> None:
        """Every file of every mount (of `targets`) can be read, and is right."""
        self.daemon.wait_ready()
        for target in targets or self.targets:
            image = self.targets[target]
            for name, data in content_of(image).items():
                deadline = time.monotonic() + SETTLE_S
                while (found := read(target / name)) != data:
                    assert isinstance(found, OSError), f"{target / name}: wrong bytes"
                    assert time.monotonic() < deadline, f"{target / name}: {found}"
                    time.sleep(0.2)

    def gauges(self) -> dict[str, int]:
        """Of the worker: what must not grow."""
        process = Path(f"/proc/{self.daemon.worker()}")
        status = dict(line.split(":", 1) for line in process.joinpath("status").read_text().splitlines())
        keeper = Path(f"/proc/{self.daemon.process.pid}/fd")
        return {"rss_mb": int(status["VmRSS"].split()[0]) >> 10, "threads": int(status["Threads"]),
                "descriptors": len(list(process.joinpath("fd").iterdir())),
                "keeper_descriptors": len(list(keeper.iterdir()))}

    def close(self) -> None:
        for _, process in self.readers:
            process.kill()
            process.communicate()
        for target in self.targets:
            with contextlib.suppress(AssertionError):
                self.machine.umount(target, "--lazy")


def read(path: Path) -> bytes | OSError:
    """Past the page cache."""
    try:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return file.read()
    except OSError as error:
        return error


@contextlib.contextmanager
def running_world(directory: Path, seed: int = 0) -> Iterator[World]:
    """All of it, mounted. Taken away at the end."""
    machine = Machine(directory)
    with contextlib.ExitStack() as stack:
        registry = stack.enter_context(running_registry(directory / "registry"))
        source = Layout(directory / "source")
        for image in IMAGES:
            source.add_image(image, [tar_of(content_of(image))])
            listed = parse_prefetch(b"medium0\nsmall1\n") if image == IMAGES[0] else None
            run_convert(source.reference(image), f"docker://{registry.host}/{image}:lazy", registry=OPTIONS,
                        prefetch=listed)
        proxy = stack.enter_context(FaultProxy(registry.host))
        mount_disk = stack.enter_context(mounted_disks(directory))
        disk = mount_disk("-o", "loop", ext4(directory / "disk.img", DISK_BYTES), name="disk")
        daemon = start_daemon(
            machine, "--hang-timeout", str(HANG_S), "--cache-dir", str(disk / "cache"),
            environment={"LAZYFS_CACHE_QUOTA_BYTES": QUOTA, "LAZYFS_CACHE_FREE_FLOOR_BYTES": "1MiB"})
        stack.callback(end_daemon, daemon)
        daemon.wait_ready()
        world = World(machine, registry, proxy, daemon, disk, random.Random(seed))
        stack.callback(world.close)
        world.mount_all()
        yield world


# --- faults ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trouble:
    """`begin` makes it, `end` takes it away. `replaces`: it costs a worker."""

    begin: Callable[[World], object]
    end: Callable[[World], object] = lambda _: None
    replaces: bool = False


def _signal_worker(number: int) -> Callable[[World], None]:
    def send(world: World) -> None:
        with contextlib.suppress(ProcessLookupError, OSError, ValueError):     # it may be between two
            os.kill(world.daemon.worker(), number)

    return send


def _proxied(**words: Any) -> Callable[[World], object]:
    return lambda world: world.proxy.add(Fault(path="/blobs/", **words))


def _fill(world: World) -> None:
    """No byte is left."""
    with contextlib.suppress(OSError), (world.disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))


def _damage_records(world: World) -> None:
    """What is written down of what is cached is cut off; then the worker that knows it goes."""
    for path in (world.disk / "cache").rglob("*"):
        if path.is_file() and path.stat().st_size < 4096 and "lock" not in path.name:
            with contextlib.suppress(OSError):
                os.truncate(path, world.chance.randrange(path.stat().st_size + 1))
    _signal_worker(signal.SIGKILL)(world)


def _restart_registry(world: World) -> None:
    world.registry.restart()


def _clear_proxy(world: World) -> None:
    world.proxy.up()
    world.proxy.clear()
    world.proxy.disconnect()     # who waits in a black hole


def _remount(world: World) -> None:
    """An image comes and goes under everybody's feet; what nobody uses is evicted."""
    image, driver = world.chance.choice(IMAGES), world.chance.choice(DRIVERS)
    target = world.machine.target(f"again-{image}-{driver}")
    if world.mount(image, driver, target):
        name, data = world.chance.choice(sorted(content_of(image).items()))
        found = read(target / name)
        assert isinstance(found, OSError) or found == data, f"{target / name}: wrong bytes"
        deadline = time.monotonic() + SETTLE_S
        while not world.ask("umount", target, "--lazy"):     # its worker may be about to be replaced
            assert time.monotonic() < deadline
    world.ask("cache", "gc", "--all")


def _convert(world: World) -> None:
    """Another image is pushed to the same registry, past the proxy."""
    name = f"more{world.chance.randrange(1 << 20)}"
    with tempfile.TemporaryDirectory(dir=world.machine.directory) as directory:
        source = Layout(Path(directory) / "in")
        source.add_image(name, [tar_of({"x": world.chance.randbytes(300_000)})])
        with contextlib.suppress(SourceError):      # the registry may be restarting
            run_convert(source.reference(name), f"docker://{world.registry.host}/{name}:lazy", registry=OPTIONS)


FAULTS = {
    "worker killed": Trouble(_signal_worker(signal.SIGKILL), replaces=True),
    "worker stopped": Trouble(_signal_worker(signal.SIGSTOP), _signal_worker(signal.SIGCONT), replaces=True),
    "upgrade": Trouble(lambda world: world.ask("daemon", "upgrade"), replaces=True),
    "records damaged": Trouble(_damage_records, replaces=True),
    "registry down": Trouble(lambda world: world.proxy.down(), _clear_proxy),
    "registry restarted": Trouble(_restart_registry),
    "black hole": Trouble(_proxied(kind=Kind.BLACK_HOLE), _clear_proxy),
    "bits flipped": Trouble(_proxied(kind=Kind.FLIP, at=1000), _clear_proxy),
    "cut short": Trouble(_proxied(kind=Kind.CUT, at=50_000), _clear_proxy),
    "wrong range": Trouble(_proxied(kind=Kind.WRONG_RANGE, size=4096), _clear_proxy),
    "whole blob": Trouble(_proxied(kind=Kind.IGNORE_RANGE), _clear_proxy),
    "overloaded": Trouble(_proxied(kind=Kind.STATUS, status=503, headers={"Retry-After": "1"}), _clear_proxy),
    "slow": Trouble(_proxied(kind=Kind.DELAY, seconds=1.0), _clear_proxy),
    "dripping": Trouble(_proxied(kind=Kind.DRIP, size=2000, seconds=0.05), _clear_proxy),
    "disk full": Trouble(_fill, lambda world: (world.disk / "filler").unlink(missing_ok=True)),
}
# Not faults, but what else happens on a node.
EVENTS = {"mount, unmount, evict": Trouble(_remount), "conversion": Trouble(_convert)}


# --- the soak --------------------------------------------------------------------------------------------------------


def soak(directory: Path, seconds: float, seed: int) -> Report:
    """
    Load and random faults for `seconds`; then all is well again, or an AssertionError says what is not.

    The first part has every fault. The last third has only those that cost no worker: what it leaks then shows.

    """
    report = Report(seed=seed, seconds=seconds)
    counts: Counter[str] = Counter()
    with running_world(directory, seed) as world:
        world.start_readers((*WAYS, *WAYS[:1]))
        began = time.monotonic()
        _trouble(world, began + seconds * 2 / 3, FAULTS | EVENTS, counts)
        world.settle()
        report.before = world.gauges()
        lasting = {name: one for name, one in (FAULTS | EVENTS).items() if not one.replaces}
        _trouble(world, began + seconds, lasting, counts)
        world.settle()
        world.finish_readers(report)
        world.settle()
        report.after = _rested(world, report.before)
        report.faults = dict(counts)
        deaths = [line for line in (directory / "daemon.log").read_text().splitlines() if " died: " in line]
        report.workers = len(deaths) + 1
        report.dead += [line for line in deaths if not line.endswith("signal 9")]     # of itself, not by us
    return report


def _trouble(world: World, until: float, kinds: dict[str, Trouble], counts: Counter[str]) -> None:
    """One after the other, each a few seconds, all of them before any comes again; at times two at once."""
    names: list[str] = []
    while time.monotonic() < until:
        if len(names) < 2:
            names = world.chance.sample(sorted(kinds), len(kinds))
        now = [names.pop() for _ in range(world.chance.choice((1, 1, 1, 2)))]
        for name in now:
            counts[name] += 1
            kinds[name].begin(world)
        time.sleep(world.chance.uniform(0.3, 3.0))      # the load goes on meanwhile: this is its time
        for name in now:
            kinds[name].end(world)
        time.sleep(world.chance.uniform(0.0, 1.0))


def _rested(world: World, before: dict[str, int]) -> dict[str, int]:
    """The gauges when nothing goes on any more: threads and connections end in their own time."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        after = world.gauges()
        if all(after[name] <= before[name] for name in ("threads", "descriptors")) or time.monotonic() > deadline:
            return after
        time.sleep(0.5)


def main() -> None:
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 30)
    print(f"seed {seed}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as directory:
        os.environ["LAZYFS_RUN_DIR"] = f"{directory}/none"
        print(json.dumps(asdict(soak(Path(directory) / "soak", float(sys.argv[1]), seed))))


if __name__ == "__main__":
    main()
