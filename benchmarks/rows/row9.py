"""Row 9: peak memory of converting a 2 GB layer, and of the mounted worker after reading the whole tree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, plain
from benchmarks.kit.memory import PeakSampler, tree_peak_mb
from benchmarks.rows.row7 import convert_fresh
from benchmarks.rows.trees import open_mount, read_tree

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "peak memory: converting a 2 GB layer, and the worker after reading the whole tree"


def measure(session: Session) -> list[Figure]:
    layout = session.large_layout
    converted: dict[str, list[float]] = {"lz4": [], "zstd": []}
    for _ in range(session.runs):
        for codec, peaks in converted.items():
            with PeakSampler() as sampler:
                convert_fresh(session, layout, codec)
            peaks.append(sampler.peak_mb)
    worst = max(converted.values(), key=max)
    workers: dict[str, list[float]] = {"erofs": [], "fuse": []}
    for _ in range(session.runs):
        for driver, peaks in workers.items():
            mount = open_mount(session, driver)
            read_tree(mount.path)
            peaks.append(tree_peak_mb(mount.worker_pid()))
            mount.close()
    worst_worker = max(workers.values(), key=max)
    return [
        plain("9a", "converter, 2 GB layer, larger of both codecs", 400.0, "MB", worst, **converted),
        plain("9b", "worker, larger of both drivers", 120.0, "MB", worst_worker, **workers),
    ]
