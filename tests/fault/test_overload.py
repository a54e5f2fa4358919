"""Overload: hundreds of readers of cold data within a bound of memory, and with too few descriptors, and no disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from lazyfs.errors import DeadlineError
from lazyfs.fetch.budget import Budget, NoRoomError
from lazyfs.fetch.constants import IN_FLIGHT_BYTES_MAX
from lazyfs.image.digest import Digest
from lazyfs.registry import RegistryOptions, open_destination
from tests import overloadreads
from tests.diskkit import mounted_disks, needs_mounts
from tests.registrykit import running_registry

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
READER_COUNT = 500
# Besides what is in flight: tasks, flights and requests of the readers, what malloc keeps, urllib3's connections.
MEMORY_SLACK_KB = 48 * 1024


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        stored, _ = overloadreads.make_image()
        destination = open_destination(f"{running.host}/repo:tag", RegistryOptions())
        destination.put_bytes(stored, Digest.of(stored))
        destination.close()
        yield running.host


def run(host: str, cache: Path, readers: int, size: int, *words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.overloadreads", host, str(cache), str(readers), str(size), *words],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["wrong"] == 0
    return found


def test_hundreds_of_readers_stay_within_the_memory_budget(registry: str, tmp_path: Path) -> None:
    found = run(registry, tmp_path / "cache", READER_COUNT, 4096)
    assert not found["errors"]
    assert found["peak_kb"] - found["before_kb"] < IN_FLIGHT_BYTES_MAX // 1024 + MEMORY_SLACK_KB


@needs_mounts
def test_they_do_where_the_cache_has_no_room_and_reads_hold_their_chunks(registry: str, tmp_path: Path) -> None:
    with mounted_disks(tmp_path) as mount:
        disk = mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", name="small")
        found = run(registry, disk / "cache", READER_COUNT, 1 << 20)
    assert not found["errors"], found["errors"][:3]
    assert found["not_stored"] > READER_COUNT / 2
    assert found["peak_kb"] - found["before_kb"] < IN_FLIGHT_BYTES_MAX // 1024 + MEMORY_SLACK_KB


def test_too_few_descriptors_make_reads_wait_and_are_no_fault_of_the_registry(registry: str, tmp_path: Path) -> None:
    found = run(registry, tmp_path / "cache", 200, 4096, "--files", "3")
    assert not found["errors"], found["errors"][:3]
    (told,) = found["sources"]
    assert told["state"] == "ok"
    assert told["failures"] == 0


# --- the budget itself ------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_who_finds_no_room_gets_its_turn_in_order(autojump_clock: object) -> None:
    budget = Budget(100)
    order: list[str] = []

    async def read(name: str, size: int) -> None:
        with budget.reserve(size) as room:
            try:
                room.take()
            except NoRoomError:
                await room.wait(trio.current_time() + 1e9)
            assert budget.bytes_held <= 100
            order.append(name)
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        for name, size in (("a", 60), ("b", 60), ("c", 100), ("d", 10)):
            nursery.start_soon(read, name, size)
            await trio.testing.wait_all_tasks_blocked()
    assert order == ["a", "b", "c", "d"]
    assert budget.bytes_held == 0


@pytest.mark.trio
async def test_a_read_larger_than_the_budget_gets_it_alone() -> None:
    budget = Budget(100)
    with budget.reserve(1000) as large:
        large.take()
        with budget.reserve(1) as small, pytest.raises(NoRoomError):
            small.take()
    with budget.reserve(1) as small:
        small.take()


@pytest.mark.trio
async def test_a_turn_that_does_not_come_is_an_error_at_the_deadline_and_leaves_nothing() -> None:
    budget = Budget(100)
    with budget.reserve(100) as held:
        held.take()
        with budget.reserve(50) as late, pytest.raises(DeadlineError):
            await late.wait(0.0)
        assert not budget._waiting
    with budget.reserve(100) as again:
        again.take()


def test_one_chunk_needs_no_room() -> None:
    budget = Budget(100)
    with budget.reserve(1000) as large:
        large.take()
        with budget.reserve(0) as nothing:
            nothing.take()
