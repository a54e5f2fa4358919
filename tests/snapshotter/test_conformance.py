"""containerd's conformance suite for snapshotters: 21 cases, twice in a row against the same running snapshotter."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from tests import gokit
from tests.lazyrig import SnapshotterProcess
from tests.mountkit import Machine

if TYPE_CHECKING:
    from pathlib import Path

CASES = 21                       # of containerd v2.2.6


def check_twice(socket: Path, directory: Path) -> None:
    for attempt in (1, 2):
        outcome = gokit.run_suite(socket, directory)
        failed = sorted(name for name, verdict in outcome.cases.items() if verdict != "PASS")
        assert not failed, f"run {attempt}: {failed}\n{outcome.output}"
        assert len(outcome.cases) == CASES, sorted(outcome.cases)


@pytest.mark.slow
def test_the_suite_passes_against_containerds_own_overlayfs(tmp_path: Path) -> None:
    """Else what it says about ours would mean nothing."""
    gokit.require_plain_directory(tmp_path)
    with gokit.reference_snapshotter(tmp_path) as socket:
        check_twice(socket, tmp_path)


@pytest.mark.slow
def test_the_suite_passes_against_lazyfs(tmp_path: Path) -> None:
    gokit.require_plain_directory(tmp_path)
    machine = Machine(tmp_path)
    snapshotter = SnapshotterProcess(machine, tmp_path / "no-containerd.sock")
    snapshotter.start()
    try:
        check_twice(snapshotter.address, tmp_path)
    finally:
        snapshotter.end(signal.SIGTERM)   # removes what still waits for its removal
    assert not [path for name in ("snapshots", "images") for path in (snapshotter.root / name).glob("*")]
