"""What `lazyfs status` and `lazyfs trace` draw of what workers tell: also of what is odd, missing, or hostile."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest

from lazyfs.cli import trace
from lazyfs.cli.status import lines_of
from lazyfs.cli.workers import Answer
from lazyfs.node.rundir import WorkerDir
from tests.unit.test_metrics import SNAPSHOT

if TYPE_CHECKING:
    from pathlib import Path

NOW = 2_000_000.0
TOLD: dict[str, Any] = {
    **copy.deepcopy(SNAPSHOT), "time": NOW, "started": NOW - 200, "cache_dir": "/var/cache",
    "minute": {"seconds": 60.0, "hits": 594, "misses": 6, "fetched_stored_bytes": 120_000_000,
               "source a:1": 120_000_000, "retries": 0},
    "errors_lately": {"seconds": 300.0, "deadline": 2},
    "keeper": {"keeper": 5, "turns": 3, "since": NOW - 90_000, "died": 1, "hung": 0},
    "sources": [{"source": "a:1", "state": "down", "since": NOW - 130, "why": "cannot connect\x1b[2J"},
                {"source": "b:2", "state": "ok"}],
    "cache": {"chunks_damaged": 1, "chunks_unreadable": 1,
              "trouble": [{"what": "storing", "why": "No space left on device", "since": NOW - 10}]},
    "broken": [{"target": "/mnt/c", "image": "c", "reason": "no manifest"}],
    "mounts": [{"target": "/mnt/a", "image": "a:lazy", "driver": "erofs", "complete": False, "detached": False},
               {"target": "/mnt/b", "image": "b:lazy", "driver": "fuse", "complete": True, "detached": True}],
    "copying": {"copies": [{"target": "/mnt/a", "state": "copying", "reason": "", "present_bytes": 45,
                            "total_bytes": 100, "rate_bytes_s": 12_000_000}]},
}
SLOW: dict[str, Any] = {
    "number": 1, "time": NOW, "request": "ab-1", "pid": 812, "process": "python3\x1b[31m", "container": "f" * 64,
    "inode": 9, "offset": 0, "size": 131072, "over": True, "error": "", "seconds": 2.1134, "device_offset": 4096,
    "image": "app:lazy", "target": "/mnt/a", "bootstrap": "sha256:1", "device": "sha256:2",
    "files": [{"path": f"/lib/{number}\n", "start": 0, "end": 10} for number in range(5)],
    "chunks": [{"chunk": 17, "blob": "sha256:5d1f", "source": "reg/app:lazy", "server": "reg", "stored_bytes": 611_000,
                "under_way": True, "request": "ab-1", "failed_tries": 2, "landed": False, "error": "gone",
                "stages": {"queue": 0.001, "first_byte": 2.03}}],
}


def screen(told: dict[str, Any] | None, *, daemon: bool = True, reason: str = "") -> list[str]:
    return lines_of([Answer(WorkerDir.of_cache("/nowhere"), daemon, told, reason)])


@pytest.fixture(autouse=True)
def _run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYFS_RUN_DIR", str(tmp_path))


def test_everything_is_on_the_screen() -> None:
    text = "\n".join(screen(TOLD))
    for expected in (
        "keeper 5 for 25 h, worker 7 for 3 min; 2 takeovers, 1 deaths, 0 hangs; ready",
        "10.0/s, 99.0% from the cache (last 60 s)", "2 wait, the oldest for 12.5 s; 1 for more than 10 s",
        "3 took", "fetched   2.0 MB/s: a:1 2.0 MB/s", "errors    deadline 2 (last 5 min)",
        "a:1: down since", "(2 min): cannot connect\\x1b[2J", "b:2: ok",
        "server m:3/v2: left alone since", "(10 s): late", "2 damaged chunks dropped",
        "trouble   storing: No space left on device, since", "mounts    2, 1 broken",
        "snapshotter  10 calls answered, 1 failed, 1 under way",
        "/mnt/a  a:lazy  erofs, 45% here, copy: copying 12.0 MB/s", "/mnt/b  b:lazy  fuse, complete, detached",
        "/mnt/c  c: no manifest",
    ):
        assert expected in text, f"{expected}\n{text}"
    assert "\x1b" not in text


def test_a_worker_without_a_keeper_disk_or_reads_is_shown_too() -> None:
    told = copy.deepcopy(TOLD)
    for name in ("keeper", "disk"):
        told.pop(name, None)
    told["minute"].update(hits=0, misses=0)
    told["reads"].update(waiting=0, slow=0)
    told["sources"], told["mounts"], told["broken"] = [], [], []
    told["errors_lately"] = {"seconds": 300.0}
    text = "\n".join(screen(told, daemon=False))
    assert "without a daemon; ready" in text
    assert "0.0/s (last" in text
    assert "errors" not in text
    assert "its keeper does not answer" in screen(told)[0]


def test_a_worker_that_does_not_answer_is_said_to_be_so() -> None:
    assert "its worker does not answer: nobody there" in screen(None, reason="nobody there")[0]


def test_a_slow_read_in_lines() -> None:
    lines = trace.lines_of(copy.deepcopy(SLOW))
    text = "\n".join(lines)
    assert "2.113 s  app:lazy  python3\\x1b[31m (812) in ffffffffffff  request ab-1" in lines[0]
    assert "/lib/0\\n 0-10, /lib/1\\n 0-10, /lib/2\\n 0-10 and 2 more" in text
    assert ("chunk 17 of sha256:5d1f, 611 kB from reg: queue 0.001 s, first byte 2.030 s; it was on its way already; "
            "2 tries failed; it did not come; gone") in text


def test_a_read_of_an_image_that_is_gone_and_one_that_waits() -> None:
    one = {name: value for name, value in SLOW.items() if name not in {"image", "target", "device", "files", "time"}}
    lines = trace.lines_of({**one, "over": False, "chunks": []})
    assert lines[0].startswith("now  2.113 s  unmounted image")
    assert lines[0].endswith("waits still")
    assert lines[1] == "    131 kB at 4096 of device ?"
    assert "failed: deadline" in trace.lines_of({**one, "error": "deadline"})[0]
