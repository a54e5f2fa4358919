"""
The Go programs of tests/go, built once a machine and version of their sources, outside of the checkout.

    path = program("cri")                          # a Path; skips the calling test where there is no Go
    outcome = run_suite(socket, tmp_path)          # {"Basic": "PASS", ...}; containerd's conformance suite
    with reference_snapshotter(tmp_path) as socket:   # containerd's own overlayfs snapshotter on a socket

`python -m tests.gokit` builds all of them (scripts/setup does). tests/go/README.md says what they are for.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.kit.goprogram import go_command
from lazyfs.fs import mountapi
from tests import leaks
from tests.containerdkit import GO_DIR
from tests.registrykit import _die_with_parent

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCES = Path(__file__).parent / "go"
BUILD_S = 280.0                  # a test may take 300 s
SUITE_S = 200.0
START_S = 30.0
_OUTCOME = re.compile(r"^\s*--- (PASS|FAIL|SKIP): TestSnapshotter/(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Recipe:
    """How a program is built: `words` in folder `module` of tests/go."""

    module: str
    words: tuple[str, ...]


_BUILD = ("build", "-trimpath", "-ldflags=-s -w")
RECIPES = {
    "cri": Recipe("cri", (*_BUILD, ".")),
    "suite": Recipe("snapshotsuite", ("test", "-c", "-trimpath", "-ldflags=-s -w", ".")),
    "reference": Recipe("snapshotsuite", (*_BUILD, "./reference")),
}


def program(name: str) -> Path:
    """The built program; builds it if it is not there. Skips, saying why, where it cannot be."""
    recipe = RECIPES[name]
    target = GO_DIR / "tests" / f"{recipe.module}-{_fingerprint(recipe.module)}" / name
    if target.exists():
        return target
    command = go_command()
    if command is None:
        pytest.skip(f"there is no Go to build {SOURCES / recipe.module} with")
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _build(command, recipe, target)
    return target


def _fingerprint(module: str) -> str:
    """Of a module's sources."""
    state = hashlib.sha256()
    for path in sorted((SOURCES / module).rglob("*")):
        if path.is_file():
            state.update(f"{path.relative_to(SOURCES)}\n{path.stat().st_size}\n".encode() + path.read_bytes())
    return state.hexdigest()[:16]


def _build(command: str, recipe: Recipe, target: Path) -> None:
    # XDG_CACHE_HOME: tests have one of their own, and Go would build the world again there. The mark: Go may leave a
    # process behind for a while.
    drop = ("XDG_CACHE_HOME", leaks.MARK_NAME)
    environment = {key: value for key, value in os.environ.items() if key not in drop}
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        part = Path(directory) / target.name
        done = subprocess.run(
            [command, recipe.words[0], "-o", part, *recipe.words[1:]], cwd=SOURCES / recipe.module, env=environment,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=BUILD_S)
        assert done.returncode == 0, f"go {recipe.words} in {recipe.module}: {done.stdout}{done.stderr}"
        part.rename(target)


# --- containerd's conformance suite -----------------------------------------------------------------------------------


def require_plain_directory(directory: Path) -> None:
    """Skip where `directory` cannot be the upper directory of an overlay: it is on one itself."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    holders = [entry for entry in mountapi.mounts() if directory.is_relative_to(entry.target)]
    if max(holders, key=lambda entry: len(entry.target)).fs_type == "overlay":
        pytest.skip(f"{directory} is on overlayfs: set TMPDIR to a directory that is not")


@dataclass(frozen=True)
class Outcome:
    """What the suite said. `cases`: name -> PASS, FAIL or SKIP."""

    cases: dict[str, str]
    output: str


def run_suite(socket: Path, directory: Path) -> Outcome:
    """Run containerd's conformance suite against the snapshotter at `socket`, which must be empty."""
    work = directory / f"work-{time.monotonic_ns()}"
    work.mkdir()
    done = subprocess.run(
        [program("suite"), "-test.v", "-test.root", "-test.parallel=1", f"-test.timeout={SUITE_S:.0f}s"],
        env={**os.environ, "LAZYFS_SNAPSHOTTER_SOCKET": str(socket), "TMPDIR": str(work)}, cwd=work,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        timeout=SUITE_S + 20)
    cases = {name: verdict for verdict, name in _OUTCOME.findall(done.stdout)}
    assert (done.returncode == 0) == (set(cases.values()) == {"PASS"}), done.stdout
    assert not list(work.iterdir()), "the suite left files behind"
    return Outcome(cases, done.stdout)


@contextlib.contextmanager
def reference_snapshotter(directory: Path) -> Iterator[Path]:
    """containerd's own overlayfs snapshotter, by itself; its socket."""
    home = directory / "reference"
    home.mkdir()
    socket = home / "s.sock"
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [program("reference"), socket, home / "root"], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            preexec_fn=_die_with_parent)  # noqa: PLW1509 - nothing but one prctl
    try:
        deadline = time.monotonic() + START_S
        while not socket.exists():
            assert process.poll() is None and time.monotonic() < deadline, (home / "log").read_text()  # noqa: PT018
            time.sleep(0.02)
        yield socket
    finally:
        process.terminate()
        process.wait(START_S)


def build_all() -> None:
    """Build every program, where there is a Go."""
    if go_command() is None:
        print("setup: there is no Go: programs of tests/go are not built, tests with them are skipped",
              file=sys.stderr)
        return
    for name in RECIPES:
        program(name)


if __name__ == "__main__":
    build_all()
