"""A recorded mount keeps its read-ahead, whatever other mounts set for names that they take for theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lazyfs.fs import drivers

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_nobody_takes_a_recorded_mounts_read_ahead_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drivers, "BDI_DIR", tmp_path)
    for name in ("erofs-1", "erofs-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "read_ahead_kb").write_text("128\n")
    drivers.set_read_ahead(["erofs-1"], drivers.READ_AHEAD_RECORDING_KIB)
    drivers.set_read_ahead(["erofs-1", "erofs-2", "gone"], drivers.READ_AHEAD_LOCAL_KIB)
    found = [(tmp_path / name / "read_ahead_kb").read_text() for name in ("erofs-1", "erofs-2")]
    assert found == [str(drivers.READ_AHEAD_RECORDING_KIB), str(drivers.READ_AHEAD_LOCAL_KIB)]
