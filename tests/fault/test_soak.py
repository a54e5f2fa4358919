"""
Mixed load while things go wrong at random, for minutes: zero wrong bytes, zero hangs, nothing that grows.

`--soak MINUTES` (default 2; tests/conftest.py), `--soak-seed N`: the same faults in the same order. What was seen is
printed (pytest -s shows it also when all is well).
"""

from __future__ import annotations

import faulthandler
import json
import random
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest

from tests.diskkit import needs_mounts
from tests.mountkit import require_mounting
from tests.soakkit import soak

if TYPE_CHECKING:
    from pathlib import Path

RSS_GROWTH_MB = 64               # of the worker: the arenas of malloc, and the chunks of the last reads
BUSY = 4                         # threads and connections of what a worker does at any moment; a leak grows with faults
pytestmark = [pytest.mark.mount, needs_mounts]


@pytest.mark.timeout(0)          # each part has a bound of its own (tests/soakkit.py)
def test_soak(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    require_mounting()
    faulthandler.cancel_dump_traceback_later()    # so long a test is no hang
    seed = request.config.getoption("--soak-seed")
    seed = random.randrange(1 << 30) if seed is None else seed
    print(f"seed {seed}", flush=True)
    report = soak(tmp_path, 60 * request.config.getoption("--soak"), seed)
    print(json.dumps(asdict(report), indent=1))
    assert report.wrong == []
    assert report.hung == []
    assert report.dead == []
    assert report.compared_bytes > 0
    assert report.after["descriptors"] <= report.before["descriptors"] + BUSY
    assert report.after["threads"] <= report.before["threads"] + BUSY
    assert report.after["keeper_descriptors"] <= report.before["keeper_descriptors"]
    assert report.after["rss_mb"] <= report.before["rss_mb"] + RSS_GROWTH_MB
