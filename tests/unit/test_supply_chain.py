"""What is installed is what was locked: exact versions, each with the digests of its files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ["requirements.lock", "packaging/container/runtime.lock", "packaging/container/build.lock"]


def requirements(lock: str) -> dict[str, str]:
    """Name -> its whole entry."""
    text = (ROOT / lock).read_text()
    entries = re.split(r"(?m)^(?=[A-Za-z0-9])", re.sub(r"(?m)^\s*#.*$", "", text))
    return {re.match(r"[A-Za-z0-9._-]+", entry)[0].lower(): entry for entry in entries if entry.strip()}  # type: ignore[index]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_requirement_has_one_version_and_digests(lock: str) -> None:
    found = requirements(lock)
    assert found
    for name, entry in found.items():
        assert re.match(rf"{re.escape(name)}==\S+", entry, re.IGNORECASE), f"{lock}: {name} has no exact version"
        assert "--hash=sha256:" in entry, f"{lock}: {name} has no digest"
        assert "://" not in entry, f"{lock}: {name} comes from an address"


def test_the_lock_holds_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.match(r"[A-Za-z0-9._-]+", one)[0].lower() for one in project["dependencies"]}  # type: ignore[index]
    for lock in ("requirements.lock", "packaging/container/runtime.lock"):
        assert wanted <= set(requirements(lock)), lock
