"""`lazyfs cache fetch`, `pin` and `unpin`: through a daemon and without one, interrupted, and beside eviction."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.convertkit import registry_with, tar_of
from tests.daemonkit import running_daemon
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.mountkit import Machine, require_mounting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.mount
MIB = 1 << 20
FILE_COUNT, FILE_BYTES = 4, 3 * MIB
WAIT_S = 60.0
NOT_FOUND, BUSY, USAGE = 21, 42, 2


def content(image: str, number: int) -> bytes:
    return random.Random(f"{image}{number}").randbytes(FILE_BYTES)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`one` and `two`, 13 MB each."""
    require_mounting()
    images = {image: [tar_of({f"f{number}": content(image, number) for number in range(FILE_COUNT)})]
              for image in ("one", "two")}
    with registry_with(tmp_path_factory.mktemp("registry"), images) as running:
        yield running.host


@pytest.fixture
def registry(upstream: str) -> Iterator[FaultProxy]:
    with FaultProxy(upstream) as proxy:
        yield proxy


def cache(machine: Machine, *words: str, code: int = 0) -> dict[str, Any]:
    """`lazyfs cache ... --json`; on failure {"errors": what it wrote}."""
    with machine.start("cache", "--cache-dir", machine.cache, *words, "--json") as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    found: dict[str, Any] = json.loads(output) if output else {"errors": errors}
    return found


def listed(machine: Machine) -> dict[str, dict[str, Any]]:
    """Images by their short name."""
    return {one["image"].rpartition("/")[2].partition(":")[0]: one for one in cache(machine, "ls")["images"]}


def reference(registry: FaultProxy, image: str) -> str:
    return f"{registry.host}/{image}:lazy"


def check(machine: Machine, registry: FaultProxy, image: str) -> None:
    """Mount it where only manifests can be had, and compare every byte."""
    fault = registry.add(Fault(Kind.STATUS, path=r"/blobs/", status=500))
    target = machine.target(f"check-{image}")
    machine.mount(reference(registry, image), target, "--insecure")
    try:
        for number in range(FILE_COUNT):
            assert (target / f"f{number}").read_bytes() == content(image, number)
    finally:
        machine.umount(target)
    assert not fault.applied
    registry.clear()


def hold_after_two_windows(registry: FaultProxy) -> None:
    """The bootstrap comes, and 8 of 13 MB; what is asked for then is not answered."""
    registry.add(Fault(Kind.BLACK_HOLE, path=r"/blobs/", skip=3))


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


def test_an_image_is_fetched_without_a_daemon_and_starts_without_blobs(machine: Machine, registry: FaultProxy) -> None:
    found = cache(machine, "fetch", reference(registry, "one"), "--insecure")
    assert found["state"] == "complete"
    assert found["presentBytes"] == found["totalBytes"] >= FILE_COUNT * FILE_BYTES
    assert listed(machine)["one"]["present"] == 1
    check(machine, registry, "one")
    count = len(registry.seen("GET", "/blobs/"))
    assert cache(machine, "fetch", reference(registry, "one"), "--insecure")["state"] == "complete"
    assert len(registry.seen("GET", "/blobs/")) == count


def test_an_image_is_fetched_by_the_daemon_and_what_is_wrong_is_said(machine: Machine, registry: FaultProxy) -> None:
    with running_daemon(machine):
        assert cache(machine, "fetch", reference(registry, "one"), "--insecure")["state"] == "complete"
        check(machine, registry, "one")
        gone = cache(machine, "fetch", f"{registry.host}/nothing:lazy", "--insecure", code=NOT_FOUND)
        assert "nothing" in gone["errors"]
        registry.add(Fault(Kind.STATUS, path=r"/blobs/", status=404))
        broken = cache(machine, "fetch", reference(registry, "two"), "--insecure", code=NOT_FOUND)
        assert registry.host in broken["errors"]


def test_nobody_goes_on_where_there_is_no_daemon(machine: Machine, registry: FaultProxy) -> None:
    refused = cache(machine, "fetch", reference(registry, "one"), "--insecure", "--no-wait", code=USAGE)
    assert "daemon" in refused["errors"]
    assert not machine.cache.exists() or not listed(machine)


def test_the_next_worker_goes_on_with_what_was_asked_for(machine: Machine, registry: FaultProxy) -> None:
    with running_daemon(machine) as daemon:
        hold_after_two_windows(registry)
        begun = cache(machine, "fetch", reference(registry, "one"), "--insecure", "--no-wait", "--pin")
        assert begun["state"] in {"opening", "fetching"}
        until(lambda: listed(machine).get("one", {}).get("present", 0) > 0.1)
        described = listed(machine)["one"]
        assert described["copy"]["state"] == "fetching"
        assert described["pinned"]
        busy = cache(machine, "rm", reference(registry, "one"), code=BUSY)
        assert "being fetched" in busy["errors"]
        registry.clear()
        worker = daemon.worker()
        os.kill(worker, signal.SIGKILL)
        daemon.wait_ready(not_worker=worker)
        until(lambda: listed(machine)["one"]["present"] == 1)
        until(lambda: not list(daemon.directory.root.glob("fetch-*.json")))
        asked = sum(1 for _ in registry.seen("GET", "/blobs/"))
        check(machine, registry, "one")
        assert len(registry.seen("GET", "/blobs/")) == asked


def test_an_interrupted_fetch_stops_and_keeps_what_has_come(machine: Machine, registry: FaultProxy) -> None:
    with running_daemon(machine) as daemon:
        hold_after_two_windows(registry)
        fetch = machine.start("cache", "--cache-dir", machine.cache, "fetch", reference(registry, "one"), "--insecure")
        with fetch:
            until(lambda: listed(machine).get("one", {}).get("present", 0) > 0)
            fetch.send_signal(signal.SIGINT)
            _, errors = fetch.communicate(timeout=WAIT_S)
        assert fetch.returncode == 130, errors
        assert not list(daemon.directory.root.glob("fetch-*.json"))
        until(lambda: (listed(machine)["one"]["copy"] or {}).get("state") != "fetching")
        assert 0 < listed(machine)["one"]["present"] < 1
        registry.clear()
        registry.disconnect()
        assert cache(machine, "fetch", reference(registry, "one"), "--insecure")["state"] == "complete"


# --- pins -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("served", [True, False])
def test_a_pinned_image_outlives_every_eviction_until_it_is_unpinned(
    machine: Machine, registry: FaultProxy, served: bool
) -> None:
    with running_daemon(machine) if served else contextlib.nullcontext():
        one, two = reference(registry, "one"), reference(registry, "two")
        cache(machine, "fetch", one, "--insecure", "--pin")
        cache(machine, "fetch", two, "--insecure")
        cache(machine, "gc", "--all")
        assert set(listed(machine)) == {"one"}
        refused = cache(machine, "rm", one, code=BUSY)["errors"]
        assert "pinned" in refused
        assert f"lazyfs cache unpin {one}" in refused
        device = listed(machine)["one"]["devices"][0]
        assert "pinned" in cache(machine, "rm", device, code=BUSY)["errors"]
        assert cache(machine, "pin", one)["changed"] == 0
        assert listed(machine)["one"]["pinned"]
        assert cache(machine, "unpin", listed(machine)["one"]["bootstrap"])["changed"] == 1
        assert cache(machine, "unpin", one)["changed"] == 0
        cache(machine, "rm", one)
        assert not listed(machine)


def test_what_is_not_there_is_not_pinned(machine: Machine, registry: FaultProxy) -> None:
    cache(machine, "fetch", reference(registry, "one"), "--insecure")
    assert "cache fetch --pin" in cache(machine, "pin", "nothing", code=NOT_FOUND)["errors"]
