"""The full copy in the background, under a running daemon: when, how gently, and what it is good for."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from lazyfs.node import protocol
from tests import daemonkit
from tests.convertkit import registry_with, tar_of
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.mountkit import Machine, require_mounting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from tests.daemonkit import Daemon

pytestmark = pytest.mark.mount
MIB = 1 << 20
FILE_COUNT, FILE_BYTES = 6, 4 * MIB
IMAGE_BYTES = FILE_COUNT * FILE_BYTES
WAIT_S = 60.0                    # for what takes a second or two where nobody else works


def content(image: str, number: int) -> bytes:
    return random.Random(f"{image}{number}").randbytes(FILE_BYTES)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`app`: 25 MB in two layers; `small`: 4 MB."""
    require_mounting()
    app = [tar_of({f"f{number}": content("app", number) for number in numbers}) for numbers in (range(3), range(3, 6))]
    images = {"app": app, "small": [tar_of({"f0": content("small", 0)})]}
    with registry_with(tmp_path_factory.mktemp("registry"), images) as running:
        yield running.host


@pytest.fixture
def registry(upstream: str) -> Iterator[FaultProxy]:
    with FaultProxy(upstream) as proxy:
        yield proxy


def daemon_with(machine: Machine, **settings: str) -> AbstractContextManager[Daemon]:
    """With keys of section [cache]; the copy begins at once."""
    settings = {"full_copy": "on", "full_copy_after_s": "0", "full_copy_rate": "0", **settings}
    return daemonkit.daemon_with(machine, **settings)


def mount(machine: Machine, registry: FaultProxy, image: str = "app", *words: str) -> Path:
    target = machine.target(image)
    machine.lazyfs("mount", f"{registry.host}/{image}:lazy", target, "--insecure", *words)
    return target


def read_all(target: Path, image: str = "app") -> None:
    """Every byte, past the page cache of the mount."""
    for number in range(FILE_COUNT if image == "app" else 1):
        with (target / f"f{number}").open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert file.read() == content(image, number), f"{image}: f{number}"


def touch(target: Path) -> None:
    """A first read: one page."""
    with (target / "f0").open("rb") as file:
        assert file.read(4096)


def copies(daemon: Daemon) -> dict[str, Any]:
    with protocol.ControlClient.connect(daemon.directory.socket) as client:
        found: dict[str, Any] = client.request(protocol.COPIES, 20)
        return found


def state(daemon: Daemon, image: str = "app") -> dict[str, Any]:
    return next(one for one in copies(daemon)["copies"] if f"/{image}:" in one["image"])


def until(condition: Callable[[], object], seconds: float = WAIT_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


def until_complete(daemon: Daemon, image: str = "app") -> None:
    with contextlib.suppress(AssertionError):
        until(lambda: state(daemon, image)["state"] == "complete")
    assert state(daemon, image)["state"] == "complete", copies(daemon)


def blob_bytes(registry: FaultProxy) -> int:
    """What was asked for of blobs, by ranges."""
    total = 0
    for seen in registry.seen("GET", r"/blobs/"):
        start, _, end = seen.headers.get("range", "").partition("=")[2].partition("-")
        total += int(end) - int(start) + 1 if end else 0
    return total


@pytest.mark.parametrize("driver", ["erofs", "fuse"])
def test_an_image_that_is_read_is_copied_and_then_needs_no_network(
    machine: Machine, registry: FaultProxy, driver: str
) -> None:
    with daemon_with(machine) as daemon:
        target = mount(machine, registry, "app", "--driver", driver)
        touch(target)
        until_complete(daemon)
        described = state(daemon)
        assert described["present_bytes"] == described["total_bytes"] >= IMAGE_BYTES
        until(lambda: copies(daemon)["statistics"]["completed"] == 1)    # all is durable, too
        registry.down()
        read_all(target)                              # the running mount
        machine.lazyfs("umount", target)
        registry.up()
        registry.add(Fault(Kind.STATUS, path=r"/blobs/", status=500))    # a new mount asks for the manifest only
        again = mount(machine, registry, "app", "--driver", driver)
        with protocol.ControlClient.connect(daemon.directory.socket) as client:
            assert client.request(protocol.LIST, 20)[0]["complete"]
        records = [path.read_text() for path in daemon.directory.mounts.glob("*.json")]
        if driver == "erofs":
            assert '"device_indexes": [-1, -1]' in records[0]            # the kernel reads the cache's own files
        registry.down()
        read_all(again)


def test_nothing_is_copied_before_it_was_read_nor_where_that_is_off(machine: Machine, registry: FaultProxy) -> None:
    with daemon_with(machine) as daemon:
        mount(machine, registry, "small")
        off = mount(machine, registry, "app", "--full-copy", "off")
        touch(off)
        until(lambda: state(daemon)["state"] == "off")
        assert state(daemon, "small")["state"] == "waiting"
        assert state(daemon, "small")["present_bytes"] == 0
        assert copies(daemon)["statistics"]["started"] == 0
        assert blob_bytes(registry) < 6 * MIB           # the chunks of a page, and what the kernel read ahead


def test_the_smallest_rest_comes_first_and_the_others_say_what_they_wait_for(
    machine: Machine, registry: FaultProxy
) -> None:
    with daemon_with(machine, full_copy_rate="4MiB") as daemon:
        app, small = mount(machine, registry, "app"), mount(machine, registry, "small")
        touch(small)
        touch(app)
        until_complete(daemon, "small")
        assert state(daemon)["state"] != "complete"
        until(lambda: state(daemon)["state"] in {"copying", "paused"})
        rate = max(state(daemon)["rate_bytes_s"] for _ in range(3))
        assert rate < 6 * MIB, rate                     # 4 MiB/s, and what a clock of a busy machine adds


def test_a_copy_waits_while_somebody_reads_all_the_time(machine: Machine, registry: FaultProxy) -> None:
    with daemon_with(machine, full_copy="idle") as daemon:
        target = mount(machine, registry)
        touch(target)
        with (target / "f0").open("rb") as file:
            until(lambda: read_one_page(file) and state(daemon)["state"] == "paused")
            described = state(daemon)
            assert described["reason"] == "reads"
        until_complete(daemon)                          # 5 s after the last read


def read_one_page(file: Any) -> bool:
    """From the worker, not from the page cache."""
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    return len(os.read(file.fileno(), 4096)) == 4096


def test_a_killed_worker_fetches_little_again(machine: Machine, registry: FaultProxy) -> None:
    with daemon_with(machine, full_copy_rate="6MiB") as daemon:
        target = mount(machine, registry)
        touch(target)
        for share in (0.3, 0.6):
            until(lambda share=share: state(daemon)["present_bytes"] > share * IMAGE_BYTES)
            worker = daemon.worker()
            os.kill(worker, signal.SIGKILL)
            daemon.wait_ready(not_worker=worker)
        until_complete(daemon)
        again = blob_bytes(registry) - state(daemon)["total_bytes"]
        assert again <= 2 * 8 * MIB + MIB               # twice killed; and the bootstrap
        read_all(target)


def test_a_registry_that_is_gone_is_said_and_the_copy_goes_on_when_it_is_back(
    machine: Machine, registry: FaultProxy
) -> None:
    with daemon_with(machine, full_copy_rate="4MiB") as daemon:
        target = mount(machine, registry)
        touch(target)
        until(lambda: state(daemon)["present_bytes"] > 6 * MIB)
        registry.down()
        until(lambda: registry.host in state(daemon)["reason"])
        described = state(daemon)
        assert described["state"] in {"paused", "failed"}
        assert described["since"] <= time.time()
        registry.up()
        until_complete(daemon)                          # tried again soon, or 15 s after it gave up


def test_a_full_cache_is_waited_for_and_nothing_of_others_goes(machine: Machine, registry: FaultProxy) -> None:
    with daemon_with(machine, quota_bytes="24MiB", evict_interval_s="1") as daemon:
        small = mount(machine, registry, "small")
        touch(small)
        until_complete(daemon, "small")
        machine.lazyfs("umount", small)
        target = mount(machine, registry)
        touch(target)
        until(lambda: state(daemon)["reason"] == "the cache is full")
        assert state(daemon)["state"] == "paused"
        listed = machine_json(machine, "ls")
        assert {one["image"].rpartition("/")[2]: one["present"] for one in listed["images"]}["small:lazy"] == 1
        read_all(target)                                # is served all the same


def test_the_copy_ends_with_the_last_container_until_the_next(machine: Machine, registry: FaultProxy) -> None:
    with daemon_with(machine, full_copy_rate="1MiB") as daemon:
        target = mount(machine, registry)
        touch(target)
        until(lambda: state(daemon)["state"] == "copying")
        ask(daemon, protocol.REST, target=str(target))
        until(lambda: state(daemon)["reason"] == "no container uses it")
        until(lambda: copies(daemon)["copies"][0]["rate_bytes_s"] == 0)
        count = len(registry.seen("GET", r"/blobs/"))
        started = copies(daemon)["statistics"]["started"]
        assert machine_json(machine, "ls")["images"][0]["copy"]["reason"] == "no container uses it"    # takes a second
        assert len(registry.seen("GET", r"/blobs/")) == count
        registered = next(daemon.directory.mounts.glob("*.json"))
        again = json.loads(registered.read_text())["order"]
        ask(daemon, protocol.MOUNT, order=again, ensure=True)      # as the snapshotter does for the next container
        until(lambda: copies(daemon)["statistics"]["started"] == started + 1)


def ask(daemon: Daemon, operation: str, **arguments: Any) -> Any:
    with protocol.ControlClient.connect(daemon.directory.socket) as client:
        return client.request(operation, 20, **arguments)


def machine_json(machine: Machine, *words: str) -> dict[str, Any]:
    """`lazyfs cache ... --json`."""
    with machine.start("cache", "--cache-dir", machine.cache, *words, "--json") as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    found: dict[str, Any] = json.loads(output)
    return found
