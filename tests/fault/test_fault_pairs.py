"""Two faults at once, each pair: a crash in a recovery, a full disk while damage is fetched again (faults, row 41)."""

from __future__ import annotations

import itertools
import random
import time
from typing import TYPE_CHECKING

import pytest

from tests.diskkit import needs_mounts
from tests.mountkit import require_mounting
from tests.soakkit import FAULTS, SETTLE_S, Report, World, running_world

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.mount, needs_mounts]
# Of the node, and of where the bytes come from.
NODE = ("worker killed", "records damaged", "disk full")
SOURCE = ("registry down", "bits flipped")
PAIRS = [*itertools.combinations_with_replacement(NODE, 2), *itertools.product(NODE, SOURCE)]


@pytest.mark.timeout(900)
def test_two_faults_at_once(tmp_path: Path) -> None:
    require_mounting()
    report = Report()
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    with running_world(tmp_path, seed) as world:
        world.start_readers(("random", "mmap"))
        targets = itertools.cycle(world.targets)
        for first, second in PAIRS:
            print(first, "+", second, flush=True)
            with_worker_gone(world, first, second)
            world.settle(next(targets))
        world.finish_readers(report)
        world.settle()
    assert report.wrong == []
    assert report.hung == []
    assert report.dead == []
    assert report.compared_bytes > 0


def with_worker_gone(world: World, first: str, second: str) -> None:
    """The second one while the first is being recovered from: as soon as its worker is another one."""
    before = world.daemon.worker()
    FAULTS[first].begin(world)
    deadline = time.monotonic() + SETTLE_S
    while FAULTS[first].replaces and world.daemon.worker() == before:
        assert time.monotonic() < deadline, f"{first}: no other worker came"
        time.sleep(0.01)
    FAULTS[second].begin(world)
    if "killed" not in second and "damaged" not in second:
        time.sleep(0.5)           # the load meets it: readers do not stop
    for name in (second, first):
        FAULTS[name].end(world)
