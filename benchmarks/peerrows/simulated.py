"""Simulated clusters for rows: two at once in processes of their own, each setting once a session."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks.scale.cluster import simulate
from benchmarks.scale.setting import Setting
from lazyfs.fetch.constants import READAHEAD_BYTES_MAX, READAHEAD_PEERED_TIMES
from lazyfs.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benchmarks.scale.result import Result

AT_ONCE = 2
# 500 nodes, every link 1 Gbit/s, the registry's ten: rows 3, 4 and 6.
HALF_A_THOUSAND = Setting(nodes=500, image_mib=200, piece_kib=1024)
# 10,000: pieces of 4 MiB, so that a run takes minutes.
TEN_THOUSAND = replace(HALF_A_THOUSAND, nodes=10_000, piece_kib=4096, window=32)
# Chunks of 1 MiB that a reader of a real node has under way (fetch.readahead).
READ_AHEAD = READAHEAD_PEERED_TIMES * READAHEAD_BYTES_MAX // MIB

_known: dict[Setting, Result] = {}


def results(settings: Iterable[Setting]) -> list[Result]:
    """In order; those that were asked for before are not simulated again."""
    wanted = list(settings)
    missing = [setting for setting in dict.fromkeys(wanted) if setting not in _known]
    if missing:
        with ProcessPoolExecutor(AT_ONCE, multiprocessing.get_context("spawn")) as pool:
            _known.update(zip(missing, pool.map(simulate, missing), strict=True))
    return [_known[setting] for setting in wanted]


def model(nodes: int, image_mib: int, link_mbit: float) -> float:
    """How long a real cluster's slowest node should need, by the model: seconds. For the model's error."""
    setting = Setting(nodes=nodes, image_mib=image_mib, node_mbit=link_mbit, origin_mbit=link_mbit, window=READ_AHEAD,
                      in_order=1, hot_mib=0)
    return max(results([setting])[0].done_s)


def seeds(setting: Setting, count: int) -> list[Setting]:
    """The same cluster with other draws."""
    return [replace(setting, seed=seed) for seed in range(1, count + 1)]
