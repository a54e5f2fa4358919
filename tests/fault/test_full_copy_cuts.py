"""A power cut in the middle of a full copy costs what was copied since the last checkpoints; never wrong bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.copykit import CUT_BYTES, MIB, lost_by_power_cut, sample_to_copy
from tests.diskkit import ext4, mounted_disks, needs_mounts, umount, wait_detached

if TYPE_CHECKING:
    from pathlib import Path


@needs_mounts
def test_a_power_cut_costs_at_most_64_mib(tmp_path: Path) -> None:
    image = ext4(tmp_path / "disk", 400 * MIB)
    with mounted_disks(tmp_path) as mount:
        disk = mount("-o", "loop", image, name="mnt")

        def again() -> Path:
            umount(disk)
            wait_detached(image)
            return mount("-o", "loop", image, name="mnt")

        landed, lost = lost_by_power_cut(sample_to_copy(), disk, again)
    assert landed >= CUT_BYTES
    assert 0 <= lost <= 64 * MIB
