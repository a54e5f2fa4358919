"""Killed before every single write of an operation, and asked again: nothing is lost, nothing is left over."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from snapshotter.failures import SnapshotExistsError, SnapshotMissingError
from snapshotter.model import Kind
from tests.snapkit import blob_labels, bootstrap_labels, commit_layer, opened, upper_of

if TYPE_CHECKING:
    from snapshotter.core import Snapshots
    from tests.snapkit import PlainImages

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="snapshots belong to root")
ROOT = Path(__file__).resolve().parents[2]
WRITES_MAX = 60


def killed(directory: Path, count: int, operation: str, words: tuple[object, ...]) -> bool:
    """Whether there were so many writes."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.snapshotter.killedsnapshots", directory, str(count), operation,
         *map(json.dumps, words)], cwd=ROOT, check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode in {0, -signal.SIGKILL}, done.stderr
    return done.returncode != 0


def begin(directory: Path) -> None:
    with opened(directory) as (snapshots, hook):
        (hook.images / "image").mkdir()
        commit_layer(snapshots, "base", files={"a": "b"})
        commit_layer(snapshots, "lazy", labels=bootstrap_labels("sha256:9", "image"))
        snapshots.prepare("active", "base", {"old": "1"})
        upper_of(snapshots.prepare("full", "base", {})).joinpath("file").write_text("x")


def again(snapshots: Snapshots, operation: str, words: tuple[Any, ...]) -> None:
    """What containerd does: asks once more; "exists", "is gone" is as good."""
    with contextlib.suppress(SnapshotExistsError, SnapshotMissingError):
        getattr(snapshots, operation)(*words)


def check(snapshots: Snapshots, hook: PlainImages, directory: Path) -> None:
    """Every record has its directory, every directory its record, every chain its mounts."""
    snapshots.cleanup()
    found = snapshots.find()
    there = {int(path.name) for path in (directory / "root" / "snapshots").iterdir()}
    assert there == snapshots._records.ids()
    for info in found:
        snapshots.usage(info.name)
        if info.kind is not Kind.COMMITTED:
            for path in upper_of(snapshots.mounts(info.name)), upper_of(snapshots.mounts(info.name)).parent / "work":
                assert path.is_dir()
    names = {info.name for info in found}
    assert "lazy" in names or hook.forgotten, "a removed lazy image was not let go"
    snapshots.prepare("afterwards", "base", {})
    snapshots.remove("afterwards")


@pytest.mark.slow
@pytest.mark.parametrize(("operation", "words", "expected"), [
    ("prepare", ("new", "base", {"a": "b"}), "new"),
    ("prepare", ("ns/x", "base", blob_labels("sha256:1")), None),
    ("view", ("new", "base", {}), "new"),
    ("commit", ("done", "active", {"new": "2"}), "done"),
    ("remove", ("full",), None),
    ("remove", ("lazy",), None),
    ("update", ("active", {"changed": "3"}), "active"),
    ("cleanup", (), None),
])
def test_killed_before_every_write(tmp_path: Path, operation: str, words: tuple[Any, ...],
                                   expected: str | None) -> None:
    for count in range(1, WRITES_MAX):
        directory = tmp_path / str(count)
        begin(directory)
        if operation == "cleanup":
            (directory / "root" / "snapshots" / "77" / "fs").mkdir(parents=True)
        was_killed = killed(directory, count, operation, words)
        with opened(directory) as (snapshots, hook):
            hook.forgotten += [0] * (not was_killed)   # it was let go in the process that ended well
            again(snapshots, operation, words)
            check(snapshots, hook, directory)
            names = {info.name for info in snapshots.find()}
            assert expected is None or expected in names
            if operation == "remove":
                assert words[0] not in names
        shutil.rmtree(directory)
        if not was_killed:
            assert count > 2, "nothing was written at all"
            return
    pytest.fail(f"more than {WRITES_MAX} writes")


def test_killed_while_the_root_is_made(tmp_path: Path) -> None:
    for count in range(1, WRITES_MAX):
        directory = tmp_path / str(count)
        directory.mkdir()
        was_killed = killed(directory, count, "open", ())
        with opened(directory) as (snapshots, _):
            commit_layer(snapshots, "base")
        if not was_killed:
            assert count > 2
            return


def test_a_kill_between_directories_and_record_leaves_nothing(tmp_path: Path) -> None:
    begin(tmp_path)
    left = tmp_path / "root" / "snapshots" / "99"
    (left / "fs").mkdir(parents=True)
    with opened(tmp_path) as (snapshots, _):
        assert upper_of(snapshots.prepare("new", "base", {})).parent.name == "100", "a number in use is not given"
        snapshots.cleanup()
        assert not left.exists()
        assert upper_of(snapshots.mounts("new")).is_dir()
