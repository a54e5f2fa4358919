"""
Snapshots for tests: a root, a hook whose lazy images are plain directories, and real mounts of what core answers.

PlainImages is a whole implementation of the seam, only without a daemon: an "image" is the directory named by the
bootstrap's label, bound where it is wanted... so what stands on it sees the files that are in that directory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import HostError
from snapshotter.core import Snapshots
from snapshotter.diskuse import disk_usage
from snapshotter.lazyhook import LABEL_BLOB, LABEL_BOOTSTRAP, LayerKind
from snapshotter.model import LABEL_REF

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from snapshotter.lazyhook import LazyLayer
    from snapshotter.model import Mount, Usage


@dataclass
class PlainImages:
    """
    `images`: where the directories of the images are. `down`: as if the daemon did not answer. `eager`: mounts ahead.
    """

    images: Path
    down: bool = False
    eager: bool = False
    mounted: dict[int, Path] = field(default_factory=dict)
    forgotten: list[int] = field(default_factory=list)
    resting: list[int] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def classify(self, labels: Mapping[str, str]) -> LayerKind:
        if LABEL_BLOB in labels:
            return LayerKind.LAZY_BLOB
        return LayerKind.LAZY_BOOTSTRAP if LABEL_BOOTSTRAP in labels else LayerKind.ORDINARY

    def ensure_mounted(self, bootstrap: LazyLayer) -> Path:
        self._ask()
        with self.lock:
            tree = self.images / bootstrap.labels[LABEL_BOOTSTRAP]
            self.mounted[bootstrap.snapshot_id] = tree
            return tree

    def mount_ahead(self, bootstrap: LazyLayer) -> None:
        if self.eager:
            self.ensure_mounted(bootstrap)

    def rest(self, bootstrap: LazyLayer, in_use: Callable[[Iterable[int]], bool]) -> None:
        if not in_use([bootstrap.snapshot_id]):
            self.resting.append(bootstrap.snapshot_id)

    def forget(self, bootstrap: LazyLayer) -> None:
        self._ask()
        with self.lock:
            self.mounted.pop(bootstrap.snapshot_id, None)
            self.forgotten.append(bootstrap.snapshot_id)

    def usage(self, bootstrap: LazyLayer) -> Usage:
        self._ask()
        return disk_usage(self.images / bootstrap.labels[LABEL_BOOTSTRAP])

    def _ask(self) -> None:
        if self.down:
            raise HostError("the daemon does not answer", hint="start it")


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[tuple[Snapshots, PlainImages]]:
    """Snapshots below `directory`, and their hook."""
    directory.mkdir(exist_ok=True)
    hook = PlainImages(directory / "trees")
    hook.images.mkdir(exist_ok=True)
    snapshots = Snapshots.open(directory / "root", hook)
    try:
        yield snapshots, hook
    finally:
        snapshots.close()


def blob_labels(ref: str) -> dict[str, str]:
    return {LABEL_REF: ref, LABEL_BLOB: "1"}


def bootstrap_labels(ref: str, image: str) -> dict[str, str]:
    return {LABEL_REF: ref, LABEL_BOOTSTRAP: image}


def commit_layer(snapshots: Snapshots, name: str, parent: str = "", files: Mapping[str, str] | None = None,
                 labels: Mapping[str, str] | None = None) -> None:
    """Prepare, write into the new layer as an unpacker would, commit."""
    mounts = snapshots.prepare(f"extract {name}", parent, labels or {})
    for path, text in (files or {}).items():
        upper_of(mounts).joinpath(path).write_text(text)
    snapshots.commit(name, f"extract {name}", labels or {})


def upper_of(mounts: list[Mount]) -> Path:
    """Where writes go."""
    (mount,) = mounts
    if mount.type == "bind":
        return Path(mount.source)
    return Path(next(option.removeprefix("upperdir=") for option in mount.options if option.startswith("upperdir=")))


def lowers_of(mounts: list[Mount]) -> list[str]:
    (mount,) = mounts
    return next(option for option in mount.options if option.startswith("lowerdir="))[len("lowerdir="):].split(":")


def require_overlay() -> None:
    if os.geteuid() != 0:
        pytest.skip("overlay mounts need root")
    if shutil.which("mount") is None:
        pytest.skip("mount(8) is missing")


@contextlib.contextmanager
def mounted(mounts: list[Mount], target: Path) -> Iterator[Path]:
    """Mount it as containerd would: with relative lower directories where the options exceed a page."""
    (mount,) = mounts
    target.mkdir(exist_ok=True)
    options, cwd = list(mount.options), Path("/")
    if mount.type == "overlay" and sum(map(len, options)) > 3500:
        lowers = lowers_of(mounts)
        cwd = Path(os.path.commonpath(lowers))
        short = ":".join(os.path.relpath(lower, cwd) for lower in lowers)
        options = [option if not option.startswith("lowerdir=") else f"lowerdir={short}" for option in options]
    kind = ["--bind"] if mount.type == "bind" else ["-t", mount.type]
    text = ",".join(option for option in options if option != "rbind")
    subprocess.run(["mount", *kind, "-o", text, mount.source, str(target)], check=True, cwd=cwd, timeout=30)
    if mount.type == "bind" and "ro" in options:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(target)], check=True, timeout=30)
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True, timeout=30)
