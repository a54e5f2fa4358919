"""The code of containerd's interfaces is what scripts/protos makes of their .proto files."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
API = ROOT / "snapshotter" / "api"


def test_generated_code_is_current(tmp_path: Path) -> None:
    subprocess.run([ROOT / "scripts/protos", tmp_path], check=True, timeout=120)
    made = {path.name: path.read_bytes() for path in (tmp_path / "snapshotter" / "api").iterdir()}
    kept = {path.name: path.read_bytes() for path in API.iterdir() if "_pb2" in path.name}
    assert "snapshots_pb2_grpc.py" in made
    stale = sorted(name for name in made | kept if made.get(name) != kept.get(name))
    assert not stale, f"run scripts/protos: {stale}"
