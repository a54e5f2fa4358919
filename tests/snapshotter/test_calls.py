"""What the snapshotter tells of the calls that it answers: its report, its dump, the metrics made of it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from snapshotter.api import snapshots_pb2 as api
from snapshotter.api.snapshots_pb2_grpc import SnapshotsStub
from snapshotter.calls import REPORT_NAME, Calls
from tests.lazyrig import WAIT_S, SnapshotterProcess
from tests.mountkit import Machine, require_mounting
from tests.unit.test_metrics import SNAPSHOT, families

if TYPE_CHECKING:
    from collections.abc import Callable


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_calls_are_counted_by_how_they_ended() -> None:
    calls = Calls()
    for end in ("", "", "NOT_FOUND"):
        with calls.answering("Stat", "key") as found:
            found.extend([end] if end else [])
    with pytest.raises(KeyError), calls.answering("Prepare", "key"):
        raise KeyError("a bug")
    report = calls.report()
    assert {(one["call"], one["code"]): one["count"] for one in report["ended"]} == {
        ("Stat", "OK"): 2, ("Stat", "NOT_FOUND"): 1, ("Prepare", "OK"): 1}
    assert (report["running"], report["oldest_s"]) == (0, 0.0)


def test_what_is_being_answered_is_seen() -> None:
    calls = Calls()
    with calls.answering("Remove", "k" * 1000):
        assert calls.report()["running"] == 1
        lines = calls.lines()
    assert lines[0] == "1 calls are being answered"
    assert lines[1].startswith("call Remove kkk")
    assert len(lines[1]) < 300
    assert calls.lines()[0] == "0 calls are being answered"


def test_many_threads_lose_no_count() -> None:
    calls = Calls()

    def ask() -> None:
        for _ in range(500):
            with calls.answering("Stat", "key"):
                pass

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls.report()["ended"][0]["count"] == 4000


def test_the_report_is_part_of_the_metrics() -> None:
    calls = Calls()
    with calls.answering("Stat", "key") as end:
        end.append("NOT_FOUND")
    found = {(sample.name, tuple(sample.labels.values())): sample.value
             for family in families({**SNAPSHOT, "snapshotter": calls.report()}).values() for sample in family.samples}
    assert found["lazyfs_snapshotter_calls_total", ("Stat", "NOT_FOUND")] == 1
    assert found["lazyfs_snapshotter_call_seconds_total", ("Stat",)] >= 0
    assert found["lazyfs_snapshotter_calls_running", ()] == 0


@pytest.mark.mount
def test_a_snapshotter_reports_and_dumps_and_goes_on(tmp_path: Path) -> None:
    require_mounting()
    machine = Machine(tmp_path)
    snapshotter = SnapshotterProcess(machine, tmp_path / "no-containerd.sock", words=("--beat", "0.2"))
    snapshotter.start()
    assert snapshotter.process is not None
    try:
        with grpc.insecure_channel(f"unix:{snapshotter.address}") as channel:
            stub = SnapshotsStub(channel)
            with pytest.raises(grpc.RpcError):
                stub.Stat(api.StatSnapshotRequest(key="nothing"), timeout=WAIT_S)
            report = snapshotter.root / REPORT_NAME
            until(lambda: report.exists() and any(
                one["code"] == "NOT_FOUND" for one in json.loads(report.read_text())["ended"]))
            assert report.stat().st_mode & 0o777 == 0o600
            door = snapshotter.process.pid
            (server,) = Path(f"/proc/{door}/task/{door}/children").read_text(encoding="ascii").split()
            os.kill(int(server), signal.SIGUSR1)
            os.kill(door, signal.SIGUSR1)
            until(lambda: "calls Stat NOT_FOUND: 1" in snapshotter.log.read_text())
            until(lambda: "door.py" in snapshotter.log.read_text())
            assert not list(stub.List(api.ListSnapshotsRequest(), timeout=WAIT_S))
            assert json.loads(report.read_text())["pid"] == int(server), "nobody was started anew"
    finally:
        snapshotter.end(signal.SIGTERM)
    assert "killed" not in snapshotter.log.read_text()
