"""The recipes for CI that users copy: YAML that says what the script understands, and that hides nothing from it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "packaging/ci"
SCRIPT = (RECIPES / "lazyfs-ci").read_text()
DOCUMENT = (ROOT / "docs/ci.md").read_text()
KNOWN = set(re.findall(r"\$\{?((?:LAZYFS|REGISTRY)_[A-Z_]+)", SCRIPT))
ELSEWHERE = {"STORAGE_DRIVER", "BUILDAH_ISOLATION"}      # buildah's


def github() -> tuple[dict[str, str], list[str]]:
    job = yaml.safe_load((RECIPES / "github.yml").read_text())["jobs"]["image"]
    return job["env"], [step["run"] for step in job["steps"] if "run" in step]


def gitlab() -> tuple[dict[str, str], list[str]]:
    job: dict[str, Any] = yaml.safe_load((RECIPES / "gitlab.yml").read_text())["image"]
    return job["variables"], [*job["before_script"], *job["script"]]


def plain() -> tuple[dict[str, str], list[str]]:
    text = (RECIPES / "plain.sh").read_text()
    return dict(re.findall(r'"\$\{(\w+):=([^}]*)\}"', text)), [text]


ALL = {"github": github, "gitlab": gitlab, "plain": plain}


@pytest.mark.parametrize("name", ALL)
def test_the_script_does_the_work_and_knows_what_it_is_told(name: str) -> None:
    variables, steps = ALL[name]()
    assert "LAZYFS_IMAGE" in variables
    assert set(variables) <= KNOWN | ELSEWHERE
    assert len([step for step in steps if re.search(r"(^|\s)ci/lazyfs-ci$", step.strip())]) == 1
    for step in steps:
        # what ${{ }} becomes is a word
        text = re.sub(r"\$\{\{.*?\}\}", "word", step)
        subprocess.run(["sh", "-n"], input=text, text=True, check=True, timeout=20)
        assert not re.search(r"(?<!/)lazyfs (convert|optimize|check|profile)", text), "the script's work"
    stop = variables["LAZYFS_STOP"].split()
    options = set(re.findall(r'"(--[a-z-]+)"', (ROOT / "lazyfs/cli/profile_run.py").read_text()))
    assert {word for word in stop if word.startswith("--")} <= options


def test_every_setting_is_documented() -> None:
    assert set(re.findall(r"^\| `([A-Z_]+)`", DOCUMENT, re.MULTILINE)) | {"REGISTRY_PASSWORD"} == KNOWN


def test_the_image_has_no_package_that_development_does_not() -> None:
    def rows(path: Path) -> set[str]:
        text = re.sub(r"\n +#.*", "", path.read_text()).strip()
        return {re.sub(r"\s+", " ", row).strip() for row in re.split(r"\n(?=\S)", text)}

    container = ROOT / "packaging/container"
    everything = rows(ROOT / "requirements.lock")
    extra = rows(container / "runtime.lock") - everything
    assert [row for row in extra if "os_name == 'nt'" not in row] == []     # its markers differ: never on Linux
    assert {row.split("==")[0] for row in rows(container / "build.lock") - everything} <= {"pip"}
