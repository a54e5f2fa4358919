"""The documents, tried: the tutorial's commands run as they stand there, and options that are named do exist."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazyfs.cli.main import COMMANDS
from lazyfs.fs import mountapi
from tests.convertkit import Layout
from tests.mountkit import LAZYFS, require_mounting
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIAL = Path("/tmp/tutorial")      # the tutorial's own words
_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# `lazyfs COMMAND ...` to the end of the line, of the code span or of the command; a line may be continued.
_CALL = re.compile(r"(?:^|[\s`/(])lazyfs ((?:\\\n|[^\n`|;&#])*)", re.MULTILINE)
_OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z-]*)")


@functools.cache
def help_of(*command: str) -> str:
    words = [*LAZYFS, *filter(None, command), "--help"]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.fixture
def tutorial() -> Iterator[Path]:
    """What the tutorial's introduction promises; whatever happens, all of it goes away."""
    require_mounting()
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("there is no busybox: scripts/setup installs it (busybox-static)")
    assert not TUTORIAL.exists(), f"{TUTORIAL} is there already: somebody follows the tutorial, or has followed it"
    TUTORIAL.mkdir()
    try:
        layout = Layout(TUTORIAL / "images")
        first = TarBuilder().directory("bin").file("bin/busybox", Path(busybox).read_bytes(), mode=0o755)
        layout.add_image("app", [first.build(), TarBuilder().file("etc/hello", b"hello\n").build()])
        yield TUTORIAL
    finally:
        while found := [entry for entry in mountapi.mounts() if entry.target.startswith(f"{TUTORIAL}/")]:
            mountapi.unmount(found[-1].target, mountapi.MNT_DETACH)
        shutil.rmtree(TUTORIAL)


@pytest.mark.mount
def test_the_tutorial_works_as_it_is_written(tutorial: Path, tmp_path: Path) -> None:
    blocks = _BLOCK.findall((ROOT / "docs/tutorial.md").read_text())
    assert len(blocks) >= 5
    script = "set -e\n" + "\n".join(blocks)
    # The commands are those of a checkout after scripts/setup. A run directory of its own: others test here, too.
    environment = {**os.environ, "LAZYFS_RUN_DIR": str(tmp_path / "run")}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True,
                          check=False, timeout=120)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "hello" in done.stdout.splitlines()[-1]
    left = [entry.target for entry in mountapi.mounts() if entry.target.startswith((f"{tutorial}/", f"{tmp_path}/"))]
    assert left == []
    assert not any((tmp_path / "run").glob("*/worker.json")), "the worker ends with its last mount"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_options_that_documents_name_exist(path: Path) -> None:
    for call in _CALL.findall(path.read_text()):
        words = call.replace("\\\n", " ").split()
        command = next((word for word in words if word in COMMANDS), "")
        text = help_of("") + help_of(command)
        following = words[words.index(command) + 1 :][:1] if command else []
        if following and re.search(rf"^  {re.escape(following[0])}(  |$)", text, re.MULTILINE):   # a subcommand
            text += help_of(command, following[0])
        known = set(_OPTION.findall(text)) | {"--help"}
        unknown = set(_OPTION.findall(call)) - known
        assert not unknown, f"{path.name}: `lazyfs {call.strip()}`: no option {unknown}"


def test_documents_name_commands_that_exist() -> None:
    found = 0
    for path in DOCUMENTS:
        for block in _BLOCK.findall(path.read_text()):
            for call in _CALL.findall(re.sub(r"(^|\s)#.*", "", block)):
                words = [word for word in call.split() if not word.startswith("-")]
                assert not words or words[0] in COMMANDS, f"{path.name}: lazyfs {call}"
                found += 1
    assert found >= 8, "the documents have lost their examples, or this test cannot find them"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command: str) -> None:
    text = help_of(command)
    assert f"Usage: lazyfs {command}" in text
    assert "Example" in text
    examples = text[text.index("Example") :]
    calls = re.findall(rf"^\s+lazyfs {command}\b(.*)$", examples, re.MULTILINE)
    assert calls, examples
    for call in calls:
        assert set(_OPTION.findall(call)) <= set(_OPTION.findall(text)), call
