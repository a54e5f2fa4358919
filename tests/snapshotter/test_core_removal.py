"""Removed snapshots: their files go a moment later, by a thread; what is lost by a power cut is made again."""

from __future__ import annotations

import os
import shutil
import threading
from typing import TYPE_CHECKING

import pytest

from snapshotter import directories
from snapshotter.model import LABEL_GID_MAPPING, LABEL_UID_MAPPING
from tests.snapkit import commit_layer, opened, upper_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="snapshots belong to root")


def test_what_waits_for_its_removal_is_removed_at_the_end(tmp_path: Path) -> None:
    with opened(tmp_path) as (snapshots, _):
        for number in range(100):
            upper = upper_of(snapshots.prepare(f"c{number}", "", {}))
            (upper / "file").write_text("x")
        for number in range(100):
            snapshots.remove(f"c{number}")
    assert list((tmp_path / "root" / "snapshots").iterdir()) == []


def test_a_crowd_of_removals_is_not_put_off_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "_WAITING_MAX", 1)
    with opened(tmp_path) as (snapshots, _):
        uppers = [upper_of(snapshots.prepare(f"c{number}", "", {})) for number in range(3)]
        blocked, go_on = threading.Event(), threading.Event()

        def block() -> None:
            blocked.set()
            go_on.wait(20)

        snapshots._directories._remover.submit(block)
        assert blocked.wait(20)
        for number in range(3):
            snapshots.remove(f"c{number}")
        assert [upper.exists() for upper in uppers] == [True, False, False]
        go_on.set()
    assert not uppers[0].exists()


def test_lost_directories_are_made_again_as_they_were(tmp_path: Path) -> None:
    labels = {LABEL_UID_MAPPING: "0:5000:100", LABEL_GID_MAPPING: "0:6000:100"}
    with opened(tmp_path) as (snapshots, _):
        commit_layer(snapshots, "base")
        upper = upper_of(snapshots.prepare("container", "base", labels))
        before = upper.stat()
        shutil.rmtree(upper.parent)
        assert upper_of(snapshots.mounts("container")) == upper
        after = upper.stat()
        assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, 5000, 6000)
        assert (upper.parent / "work").is_dir()


def test_what_is_not_lost_stays_as_it_is(tmp_path: Path) -> None:
    with opened(tmp_path) as (snapshots, _):
        upper = upper_of(snapshots.prepare("container", "", {}))
        (upper / "file").write_text("x")
        upper.chmod(0o700)
        (upper.parent / "work").rmdir()
        snapshots.mounts("container")
        assert (upper / "file").read_text() == "x"
        assert upper.stat().st_mode & 0o777 == 0o700
        assert (upper.parent / "work").is_dir()
