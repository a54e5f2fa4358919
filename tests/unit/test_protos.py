"""The code of containerd's interfaces is what scripts/protos makes of their .proto files."""

from __future__ import annotations

import re
import subprocess
import tomllib
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


def test_the_oldest_libraries_we_ask_for_can_load_the_generated_code() -> None:
    """Each generated file refuses, when it is imported, a library older than the one it was made for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = dict(one.split(">=") for one in project["dependencies"])
    services = {found for path in API.glob("*_pb2_grpc.py")
                for found in re.findall(r"^GRPC_GENERATED_VERSION = '(.*)'", path.read_text(), re.MULTILINE)}
    messages = {found for path in API.glob("*_pb2.py")
                for found in re.findall(r"^# Protobuf Python Version: (.*)", path.read_text(), re.MULTILINE)}
    assert (services, messages) == ({wanted["grpcio"]}, {wanted["protobuf"]})
