"""Disks that are full, and power that is cut."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import DiskFullError
from snapshotter.model import Kind
from tests.diskkit import cut_power, ext4, mounted_disks, needs_mounts, wait_detached
from tests.snapkit import commit_layer, opened, upper_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs_mounts


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):   # less at the end of the disk, then an error
            pass


def test_a_full_disk_refuses_and_harms_nothing(tmp_path: Path) -> None:
    with mounted_disks(tmp_path) as mount:
        disk = mount("-o", "loop", ext4(tmp_path / "image", 16 << 20), name="disk")
        with opened(disk) as (snapshots, _):
            commit_layer(snapshots, "base")
            with pytest.raises(OSError, match="No space"):
                fill(disk / "filler")
            before = snapshots.find()
            refused = 0
            for number in range(200):   # what is allocated already takes a few
                try:
                    snapshots.prepare(f"c{number}", "base", {"label": "v" * 4000})
                except DiskFullError:
                    refused += 1
            assert refused > 100
            there = {info.name for info in snapshots.find()} - {info.name for info in before}
            assert len(there) == 200 - refused
            for name in there:
                snapshots.remove(name)
            (disk / "filler").unlink()
            snapshots.cleanup()
            snapshots.prepare("afterwards", "base", {})
            assert len(list((disk / "root" / "snapshots").iterdir())) == 2


@pytest.mark.parametrize("before", [0, 200])   # 200: the log of the records is written over, and grows no more
def test_what_was_answered_survives_a_power_cut(tmp_path: Path, before: int) -> None:
    with mounted_disks(tmp_path) as mount:
        image = ext4(tmp_path / "image", 32 << 20)
        disk = mount("-o", "loop", image, name="disk")
        with opened(disk) as (snapshots, _):
            commit_layer(snapshots, "base", labels={"a": "b"})
            for number in range(before):
                snapshots.prepare(f"c{number}", "base", {})
                snapshots.remove(f"c{number}")
            snapshots.prepare("container", "base", {"c": "d"})
            cut_power(disk)
        subprocess.run(["umount", disk], check=True)
        wait_detached(image)
        disk = mount("-o", "loop", image, name="disk")
        with opened(disk) as (snapshots, _):
            assert [(info.name, info.kind, dict(info.labels)) for info in snapshots.find()] == [
                ("base", Kind.COMMITTED, {"a": "b"}), ("container", Kind.ACTIVE, {"c": "d"})]
            assert upper_of(snapshots.mounts("container")).is_dir()
            assert (upper_of(snapshots.mounts("container")).parent / "work").is_dir()
            snapshots.remove("container")
            snapshots.remove("base")
