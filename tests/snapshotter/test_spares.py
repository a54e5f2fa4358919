"""Directories that are made before a snapshot wants them."""

from __future__ import annotations

import os
import shutil
import time
from typing import TYPE_CHECKING

import pytest

from snapshotter import spares
from snapshotter.model import LABEL_GID_MAPPING, LABEL_UID_MAPPING
from tests.snapkit import opened, upper_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="snapshots belong to root")
WAIT_S = 20.0


def ready(directory: Path) -> list[Path]:
    """The spares, when there are any, and they are whole."""
    deadline = time.monotonic() + WAIT_S
    place = directory / "root" / "spare"
    while not (found := [path for path in sorted(place.iterdir()) if (path / "work").exists()]):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def shape(own: Path) -> dict[str, tuple[int, int, int]]:
    return {path.name: (path.stat().st_mode, path.stat().st_uid, path.stat().st_gid)
            for path in (own / "fs", own / "work", own / "fs" / "..")}


def test_a_snapshot_begins_in_a_spare_that_looks_as_if_it_were_made_for_it(tmp_path: Path) -> None:
    with opened(tmp_path) as (snapshots, _):
        first = upper_of(snapshots.prepare("first", "", {})).parent
        (spare,) = ready(tmp_path)
        os.utime(spare / "fs", (0, 0))
        inode = spare.stat().st_ino
        second = upper_of(snapshots.prepare("second", "", {})).parent
        assert second.stat().st_ino == inode
        assert second.name == "2"
        assert shape(second) == shape(first)
        assert (second / "fs").stat().st_mtime > 0
        ready(tmp_path)
        labels = {LABEL_UID_MAPPING: "0:5000:100", LABEL_GID_MAPPING: "0:6000:100"}
        third = upper_of(snapshots.prepare("third", "", labels))
        assert (third.stat().st_uid, third.stat().st_gid) == (5000, 6000)


def test_views_have_no_work_directory_and_need_no_spare(tmp_path: Path) -> None:
    with opened(tmp_path) as (snapshots, _):
        snapshots.prepare("first", "", {})
        before = ready(tmp_path)
        own = upper_of(snapshots.view("view", "", {})).parent
        assert [path.name for path in own.iterdir()] == ["fs"]
        assert ready(tmp_path) == before


def test_there_are_never_more_than_a_few_and_none_at_the_end(tmp_path: Path) -> None:
    with opened(tmp_path) as (snapshots, _):
        for number in range(4 * spares.COUNT):
            snapshots.prepare(f"c{number}", "", {})
        assert len(ready(tmp_path)) <= spares.COUNT
    assert not (tmp_path / "root" / "spare").exists()
    (tmp_path / "root" / "spare" / "7" / "fs").mkdir(parents=True)   # of one that was killed
    with opened(tmp_path) as (snapshots, _):
        assert list((tmp_path / "root" / "spare").iterdir()) == []


@pytest.mark.parametrize("lost", ["one", "all"])
def test_who_finds_no_spare_makes_its_own(tmp_path: Path, lost: str) -> None:
    with opened(tmp_path) as (snapshots, _):
        first = upper_of(snapshots.prepare("first", "", {})).parent
        (spare,) = ready(tmp_path)
        shutil.rmtree(spare if lost == "one" else spare.parent)
        for name in ("second", "third"):
            assert shape(upper_of(snapshots.prepare(name, "", {})).parent) == shape(first)
