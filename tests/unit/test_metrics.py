"""The page of metrics: names, kinds, bounds, and that docs and dashboard speak of metrics that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lazyfs.fs.readlog import BOUNDS_S
from lazyfs.node import metrics
from lazyfs.node.observing import _is_report

ROOT = Path(__file__).parents[2]
SNAPSHOT: dict[str, Any] = {
    "pid": 7, "version": "1.2", "ready": True, "started": 1000.5, "mounted": 3, "detached": 1, "broken": [{}, {}],
    "keeper": {"turns": 5, "since": 900.0, "died": 2, "hung": 1},
    "fetch": {"hits": 10, "misses": 4, "hot_reads": 1, "requests": 6, "retries": 2, "chunks_fetched": 9,
              "chunks_prefetched": 3, "chunks_read_ahead": 2, "chunks_copied": 1, "copied_stored_bytes": 77,
              "fetched_stored_bytes": 11, "peer_bytes": 22, "peer_chunks": 3,
              "bad_chunks": 1, "bytes_by_source": {'host"\\\n:1': 5, "b": 6}},
    "reads": {"waiting": 2, "hung": 1, "hung_s": 10.0, "oldest_s": 12.5, "slow": 3, "slow_s": 1.0, "bounds_s": BOUNDS_S,
              "counts": [1] * (len(BOUNDS_S) + 1), "seconds": 99.5, "errors": {"deadline": 2}},
    "running": {"foreground": 1, "prefetch": 0}, "flights": 4,
    "sources": [{"source": "a:1", "state": "down", "requests": 9, "failures": 5, "outages": 1},
                {"source": "b:2", "state": "ok", "requests": 1, "failures": 0, "outages": 0}],
    "servers": [{"server": "m:3/v2", "state": "left alone", "since": 1999990.0, "why": "late", "hedges": 4}],
    "space": {"used_bytes": 100, "quota_bytes": 0, "floor_bytes": 50}, "disk": {"size_bytes": 1000, "free_bytes": 600},
    "evicted": {"devices": 1, "bytes": 10},
    "cache": {"chunks_stored": 8, "chunks_not_stored": 1, "chunks_verified": 5, "chunks_damaged": 1,
              "chunks_unreadable": 0, "scrubbed_bytes": 11, "checkpoint_errors": 0, "trouble": [{"what": "x"}]},
    "copies": {"started": 2, "completed": 1, "failed": 0},
    "snapshotter": {"pid": 3, "time": 1000.0, "running": 1, "ended": [
        {"call": "Stat", "code": "OK", "count": 9, "seconds": 0.5},
        {"call": "Stat", "code": "INTERNAL", "count": 1, "seconds": 0.1}]},
    "peers": {
        "cluster": "prod", "why": "", "id": "n1", "address": "10.0.0.1:9451", "zone": "a", "listens": True,
        "membership": {"kind": "tracker", "members": 8, "lost_s": 0.0, "why": "", "isolated": []},
        "counters": {"requests": 12, "hedges": 2, "duplicate_bytes": 9},
        "swarms": {"device/x": {"members": 8, "complete": 2}},
        "uploads": {"requests": 5, "refused": 1, "pieces": 7, "bytes": 700, "wire_bytes": 300},
        "given": {"from_cache": 4, "fetched": 2, "lacking": 1},
        "tokens": {"held": 2, "keys": 1, "lost": False, "issued": 6, "failed": 1, "admitted": 3, "refused": 2},
        "peers": [{"id": "n2", "address": "10.0.0.2:9451", "zone": "a", "running": 0, "requests": 3, "pieces": 3,
                   "bytes": 1000, "failures": 1, "busy": 2, "wrong_pieces": 1, "hedges": 0, "p50_s": 0.01,
                   "p95_s": 0.02, "away": "lied", "away_s": 590.0, "slow": False, "last_error": "another digest"},
                  {"id": "n3", "address": "10.0.0.3:9451", "zone": "b", "running": 0, "requests": 3, "pieces": 3,
                   "bytes": 2000, "failures": 0, "busy": 0, "wrong_pieces": 0, "hedges": 0, "p50_s": 0.01,
                   "p95_s": 0.02, "away": "", "away_s": 0.0, "slow": False, "last_error": ""}]},
    "process": {"cpu_s": 1.5, "resident_bytes": 1 << 20, "descriptors": 20},
}


def families(snapshot: dict[str, Any]) -> dict[str, Any]:
    return {one.name: one for one in text_string_to_metric_families(metrics.page(snapshot).decode())}


def test_every_metric_is_there_with_its_kind_its_help_and_its_labels() -> None:
    found = families(SNAPSHOT)
    assert len(metrics.METRICS) == len(found)
    for metric in metrics.METRICS:
        family = found[metric.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.text)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels), metric.name


def test_names_follow_the_conventions() -> None:
    names = [metric.name for metric in metrics.METRICS]
    assert len(set(names)) == len(names)
    for metric in metrics.METRICS:
        assert re.fullmatch(r"lazyfs_[a-z_]+", metric.name)
        assert (metric.kind == metrics.COUNTER) == metric.name.endswith("_total"), metric.name
        assert not set(metric.labels) & {"image", "path", "file", "target", "pid"}, "no bound"


def test_numbers_are_those_of_the_snapshot() -> None:
    found = {(sample.name, tuple(sample.labels.values())): sample.value
             for family in families(SNAPSHOT).values() for sample in family.samples}
    assert found["lazyfs_takeovers_total", ()] == 4
    assert found["lazyfs_reads_total", ("hit",)] == 10
    assert found["lazyfs_fetched_bytes_total", ('host"\\\n:1',)] == 5, "what a label may not hold is escaped"
    assert found["lazyfs_source_state", ("a:1", "down")] == 1
    assert found["lazyfs_source_state", ("a:1", "ok")] == 0
    assert found["lazyfs_read_seconds_bucket", ("0.001",)] == 1
    assert found["lazyfs_read_seconds_bucket", ("+Inf",)] == len(BOUNDS_S) + 1
    assert found["lazyfs_read_seconds_sum", ()] == 99.5
    assert found["lazyfs_mounts", ("broken",)] == 2
    assert found["lazyfs_hedges_total", ()] == 4
    assert found["lazyfs_cache_troubles", ()] == 1


def test_what_is_not_known_is_left_out_and_not_zero() -> None:
    assert list(families({"ready": False})) == ["lazyfs_ready"]
    without_keeper = {name: value for name, value in SNAPSHOT.items() if name not in {"keeper", "disk"}}
    missing = set(families(SNAPSHOT)) - set(families(without_keeper))
    assert missing == {"lazyfs_keeper_start_time_seconds", "lazyfs_takeovers", "lazyfs_worker_deaths",
                       "lazyfs_worker_hangs", "lazyfs_cache_disk_size_bytes", "lazyfs_cache_disk_free_bytes"}


def test_a_thousand_sources_are_no_thousand_series() -> None:
    many = [{"source": f"oci:/images/{number}", "state": "ok", "requests": number, "failures": 0, "outages": 0}
            for number in range(1000)]
    found = families({**SNAPSHOT, "sources": many})
    assert len(found["lazyfs_source_requests"].samples) == 32
    assert {sample.value for sample in found["lazyfs_source_requests"].samples} == set(range(968, 1000))


def test_the_table_in_the_documentation_is_that_of_the_code() -> None:
    assert metrics.document() in (ROOT / "docs/observability.md").read_text(encoding="utf-8"), (
        "python -m lazyfs.node.metrics")


@pytest.mark.parametrize("file", ["docs/observability.md", "packaging/grafana/lazyfs.json"])
def test_every_metric_that_is_spoken_of_is_one(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    names = {metric.name for metric in metrics.METRICS}
    parts = {f"{metric.name}_{part}" for metric in metrics.METRICS if metric.kind == metrics.HISTOGRAM
             for part in ("bucket", "sum", "count")}
    spoken = set(re.findall(r"\blazyfs_[a-z_]+\b", text))
    assert spoken
    assert spoken <= names | parts, spoken - names - parts


def test_the_dashboard_is_one() -> None:
    dashboard = json.loads((ROOT / "packaging/grafana/lazyfs.json").read_text(encoding="utf-8"))
    assert dashboard["title"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids) > 5
    for panel in dashboard["panels"]:
        assert panel["title"]
        assert panel["gridPos"].keys() == {"h", "w", "x", "y"}
        assert all(target["expr"] and target["refId"] for target in panel["targets"])


@pytest.mark.parametrize("odd", [
    None, 7, [], {}, {"ended": 7, "running": 1, "time": 1}, {"ended": [{"call": "x"}], "running": 1, "time": 1},
    {"ended": [{"call": 1, "code": "OK", "count": 1, "seconds": 1}], "running": 1, "time": 1},
    {"ended": [], "running": "x", "time": 1},
    {"ended": [{"call": "x", "code": "y", "count": 1, "seconds": 1}] * 201, "running": 1, "time": 1}])
def test_a_report_that_is_none_is_left_out(odd: object) -> None:
    assert not _is_report(odd)
    assert _is_report(SNAPSHOT["snapshotter"])
