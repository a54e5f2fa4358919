"""A full copy's plan against a model: what is missing, once, in the blobs' order; and when its windows may start."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyfs.cache.space import Limits
from lazyfs.cache.store import CacheDir
from lazyfs.config.kinds import Amount
from lazyfs.fetch.copying import Copies, CopyHandle, CopyTerms
from lazyfs.fetch.device import FetchDevice
from lazyfs.fetch.transfer import Priority
from lazyfs.image.codec import Codec
from lazyfs.image.digest import Digest
from lazyfs.image.table import ROW, parse_table
from lazyfs.node.copyplan import CopyPlan, Share, missing_bytes
from lazyfs.node.fullcopy import ROOM_BYTES, has_room
from tests.fetchkit import CHUNK, MemorySource

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOB_COUNT = 3
OTHERS = [Priority.FOREGROUND, Priority.PREFETCH, Priority.BACKGROUND]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[CacheDir]:
    with CacheDir.open(tmp_path / "cache") as opened:
        yield opened


def device_of(cache: CacheDir, draw: random.Random, count: int) -> FetchDevice:
    """A device whose chunks lie anywhere in three blobs, some of them zeros; nothing is ever fetched from these."""
    rows = np.zeros(count, dtype=ROW)
    ends = [0] * BLOB_COUNT
    for index in draw.sample(range(count), count):
        if draw.random() < 0.1:
            rows[index] = (0, 0, 0, Codec.ZERO, 0, bytes(32))
            continue
        blob, size = draw.randrange(BLOB_COUNT), draw.randrange(1, 4096)
        rows[index] = (ends[blob], size, blob, Codec.LZ4, 0, draw.randbytes(32))
        ends[blob] += size
    device_size = count * CHUNK - draw.randrange(CHUNK // 4096) * 4096
    table = parse_table(rows.tobytes(), CHUNK, device_size, ends)
    cached = cache.device(Digest(f"sha256:{draw.randbytes(32).hex()}"), CHUNK, device_size)
    source = MemorySource({})
    return FetchDevice(table, cached, [(source, Digest.of(bytes([number])), end) for number, end in enumerate(ends)])


@given(seed=st.integers(0, 2**32), counts=st.lists(st.integers(1, 40), min_size=0, max_size=4), share=st.floats(0, 1))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_plan_is_what_is_missing_in_the_order_of_the_blobs(
    cache: CacheDir, seed: int, counts: list[int], share: float
) -> None:
    draw = random.Random(seed)
    devices = [device_of(cache, draw, count) for count in counts]
    try:
        for device in devices:
            for index in range(device.table.chunk_count):
                if draw.random() < share and not device.cached.present(index, index):
                    device.cached.write(index, bytes(device.table.chunk_bytes(index)))
        missing = [(device, index) for device in devices for index in device.cached.missing(
            0, device.table.chunk_count - 1)]
        plan = list(CopyPlan([*devices, *devices[:1]]))    # a layer that an image has twice
        assert len(plan) == len(missing)
        assert set(plan) == set(missing)
        places = [device.table.rows[index].item()[:3] for device, index in plan]
        assert [(blob, offset) for offset, _, blob in places] == sorted((blob, offset) for offset, _, blob in places)
        found = Share.of(devices)
        assert found.left_bytes == sum(size for _, size, _ in places)
        assert found.total_bytes == sum(int(size) for device in devices for size in device.table.rows["stored_size"])
        assert missing_bytes(devices) == len(missing) * CHUNK
        assert plan[1:3] == list(CopyPlan(devices)[1:3])
    finally:
        for device in devices:
            device.cached.release()


@given(steps=st.lists(st.tuples(st.floats(0.01, 3), st.sampled_from(["begin", "end", "look", "hold", "go"])),
                      max_size=40))
def test_a_window_starts_only_after_quiet_or_at_the_end_of_patience(steps: list[tuple[float, str]]) -> None:
    copies = Copies()
    handle = CopyHandle([], CopyTerms(quiet_s=0.5, patience_s=5.0), copies.traffic)
    copies.handles.append(handle)
    now, quiet_since, waiting_since = 100.0, -math.inf, None
    running: list[Priority] = []
    for seconds, step in steps:
        now += seconds
        if step == "begin":
            running.append(OTHERS[len(running) % 3])
            copies.begin(running[-1])
        elif step == "end" and running:
            copies.end(running.pop(), now)
            quiet_since = now
        elif step in {"hold", "go"}:
            handle.hold(held=step == "hold")
        ready, later = copies.ready(now)
        if handle.held:
            waiting_since = None
            assert (ready, later) == ([], math.inf)
            continue
        waiting_since = now if waiting_since is None else waiting_since
        quiet = not running and now - quiet_since >= 0.5
        patient = now - waiting_since >= 5.0
        assert bool(ready) == (quiet or patient)
        assert handle.making_way == (not ready)
        if not ready:
            assert now < later <= waiting_since + 5.0     # there is always a time at which it is looked at again


@pytest.mark.parametrize(("quota", "used", "wanted", "fits"), [
    (0, 10**15, 10**6, True),                             # no quota
    (10**9, 0, 10**9 - ROOM_BYTES, True),
    (10**9, 0, 10**9 - ROOM_BYTES + 1, False),
    (10**8, 0, 9 * 10**7, True),                          # of a small quota a tenth is left for reads
    (10**8, 1, 9 * 10**7, False),
])
def test_copies_leave_room_below_the_quota(cache: CacheDir, quota: int, used: int, wanted: int, fits: bool) -> None:
    cache.space.limits = Limits(quota_bytes=quota)
    cache.space.correct(used - cache.space.used_bytes)
    assert has_room(cache, wanted) is fits


def test_copies_leave_the_floor_free(cache: CacheDir) -> None:
    cache.space.limits = Limits(floor=Amount(percent=100.0))
    assert not has_room(cache, 1)
