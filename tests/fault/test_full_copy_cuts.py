"""A power cut in the middle of a full copy costs what was copied since the last checkpoints; never wrong bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.copykit import CUT_BYTES, MIB, lost_by_power_cut
from tests.diskkit import needs_mounts

if TYPE_CHECKING:
    from pathlib import Path


@needs_mounts
def test_a_power_cut_costs_at_most_64_mib(tmp_path: Path) -> None:
    landed, lost = lost_by_power_cut(tmp_path)
    assert landed >= CUT_BYTES
    assert 0 <= lost <= 64 * MIB
