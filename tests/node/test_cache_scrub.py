"""
Damage in the cache of a running node: found, dropped, fetched again; also below an EROFS mount that reads the cache's
files without us.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.convertkit import registry_with, tar_of
from tests.daemonkit import WAIT_S, end_daemon, running_daemon, start_daemon
from tests.mountkit import Machine, require_mounting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.mount
FILE_COUNT, FILE_BYTES = 6, 700_000


def content(number: int) -> bytes:
    return random.Random(number).randbytes(FILE_BYTES)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    require_mounting()
    layers = {"app": [tar_of({f"file{number}": content(number) for number in range(FILE_COUNT)})]}
    with registry_with(tmp_path_factory.mktemp("registry"), layers) as running:
        yield f"{running.host}/app:lazy"


def mount(machine: Machine, image: str, driver: str = "auto") -> Path:
    target = machine.target()
    machine.lazyfs("mount", image, target, "--insecure", "--driver", driver)
    return target


def read(target: Path, number: int) -> bytes:
    """Past the page cache of the mount's files."""
    with (target / f"file{number}").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


def scrub(machine: Machine, *words: str, code: int) -> dict[str, Any]:
    with machine.start("cache", "--cache-dir", machine.cache, "scrub", *words, "--json") as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    found: dict[str, Any] = json.loads(output)
    return found


def scrubbed(machine: Machine) -> float:
    """When the one device was looked through, as `lazyfs cache ls` has it."""
    with machine.start("cache", "--cache-dir", machine.cache, "ls", "--json") as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return float(json.loads(output)["devices"][0]["scrubbed"])


def spoil(machine: Machine, number: int) -> None:
    """Overwrite a part of a file's bytes in the cache, as rot does."""
    (data_file,) = (machine.cache / "v1").glob("*/data.*")
    place = data_file.read_bytes().index(content(number)[4096 * 20 : 4096 * 21])
    with data_file.open("r+b") as file:
        file.seek(place)
        file.write(b"rotten" * 100)
        file.flush()
        os.fsync(file.fileno())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_below_a_native_mount_the_right_bytes_are_written_in_place(machine: Machine, image: str) -> None:
    with running_daemon(machine):
        target = mount(machine, image)
        assert all(read(target, number) == content(number) for number in range(FILE_COUNT))
        machine.umount(target)
        target = mount(machine, image, "erofs")
        spoil(machine, 3)
        assert (target / "file3").read_bytes() != content(3), "the kernel asks nobody"
        before = next((machine.cache / "v1").glob("*/data.*")).stat().st_ino
        found = scrub(machine, image, code=51)
        assert len(found["damaged"]) == 1
        assert (target / "file3").read_bytes() == content(3), "also its pages in the page cache are made anew"
        assert next((machine.cache / "v1").glob("*/data.*")).stat().st_ino == before
        counters = machine.statistics()["cache"]
        assert (counters["chunks_damaged"], counters["repaired_chunks"]) == (1, 1)
        found = scrub(machine, code=0)
        assert scrubbed(machine) > time.time() - 300
        assert found["checkedBytes"] >= FILE_COUNT * FILE_BYTES
        assert found["damaged"] == []
        machine.umount(target)


@pytest.mark.parametrize("driver", ["erofs", "fuse"])
def test_what_is_served_through_us_is_fetched_again_when_it_is_read(machine: Machine, image: str, driver: str) -> None:
    with running_daemon(machine):
        target = mount(machine, image, driver)
        assert all(read(target, number) == content(number) for number in range(FILE_COUNT))
        spoil(machine, 1)
        fetched = machine.statistics()["fetch"]["chunks_fetched"]
        assert len(scrub(machine, code=51)["damaged"]) == 1
        assert all(read(target, number) == content(number) for number in range(FILE_COUNT))
        assert machine.statistics()["fetch"]["chunks_fetched"] == fetched + 1
        assert scrub(machine, code=0)["damaged"] == []
        machine.umount(target)


def test_without_a_daemon_damage_is_dropped_and_the_next_mount_fetches_it(machine: Machine, image: str) -> None:
    target = machine.target()
    machine.mount(image, target, "--insecure")
    assert all(read(target, number) == content(number) for number in range(FILE_COUNT))
    machine.umount(target)
    spoil(machine, 2)
    assert scrub(machine, "--rate", "200MiB", code=51)["devices"] == 1
    machine.lazyfs("cache", "--cache-dir", machine.cache, "scrub", "nothing:here", code=21)
    machine.lazyfs("cache", "--cache-dir", machine.cache, "scrub", "--rate", "much", code=2)
    machine.mount(image, target, "--insecure")
    assert all(read(target, number) == content(number) for number in range(FILE_COUNT))
    machine.umount(target)


def test_in_the_background_each_device_has_its_turn(machine: Machine, image: str) -> None:
    daemon = start_daemon(machine, environment={"LAZYFS_CACHE_SCRUB_INTERVAL_S": "1"})
    with contextlib.ExitStack() as stack:
        stack.callback(end_daemon, daemon)
        daemon.wait_ready()
        target = mount(machine, image)
        assert all(read(target, number) == content(number) for number in range(FILE_COUNT))
        until(lambda: bool(machine.statistics()["cache"]["scrubbed_bytes"] >= FILE_COUNT * FILE_BYTES))
        spoil(machine, 4)
        until(lambda: bool(machine.statistics()["cache"]["chunks_damaged"] == 1))
        assert all(read(target, number) == content(number) for number in range(FILE_COUNT))
        machine.umount(target)
