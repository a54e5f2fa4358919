"""
The seam between the records (snapshotter.core) and lazy images: what core asks, and nothing of how it is done.

Layer: snapshotter, above model only. Who implements it: snapshotter.lazy; tests, with plain directories.
Core never holds a transaction or a lock of its records while it calls this.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from snapshotter.model import Usage

LABEL_BLOB = "containerd.io/snapshot/lazyfs.blob"             # this layer's data stays in the registry
LABEL_BOOTSTRAP = "containerd.io/snapshot/lazyfs.bootstrap"   # this layer is the small one that tells how to mount


class LayerKind(Enum):
    """What a layer is for us, as its labels say."""

    ORDINARY = auto()
    LAZY_BLOB = auto()
    LAZY_BOOTSTRAP = auto()


@dataclass(frozen=True, slots=True)
class LazyLayer:
    """
    A committed snapshot of a bootstrap layer.

    Attributes:
        name: of the snapshot, as containerd knows it.
        labels: its labels, those of Prepare and Commit together.
        fs_dir: where containerd unpacked the bootstrap layer (holds lazyfs/image.json ...).
        snapshot_id: names the mount point; unique over the life of the snapshotter's root, never reused.

    """

    name: str
    labels: Mapping[str, str]
    fs_dir: Path
    snapshot_id: int


class LazyHook(Protocol):
    """What core needs to know about, and do with, lazy images. All calls may come from many threads at once."""

    def classify(self, labels: Mapping[str, str]) -> LayerKind:
        """Say what a layer is by its labels alone. Never fails, never waits."""

    def ensure_mounted(self, bootstrap: LazyLayer) -> Path:
        """
        Mount the image if it is not mounted, and return the directory that holds its tree.

        Raises:
            LazyfsError: the daemon does not answer, or cannot mount; one clear line.

        """

    def mount_ahead(self, bootstrap: LazyLayer) -> None:
        """
        Mount the image, for a container that is not there yet; or do nothing.

        Raises:
            LazyfsError: as ensure_mounted(), of which nothing is the worse.

        """

    def rest(self, bootstrap: LazyLayer, in_use: Callable[[Iterable[int]], bool]) -> None:
        """
        Fetch nothing ahead of the image any more, if no container uses it, until one is prepared.

        Args:
            bootstrap: a container on it was removed.
            in_use: whether there are containers on one of these snapshots, by their ids.

        Raises:
            LazyfsError: not possible now; of which nothing is the worse.

        """

    def forget(self, bootstrap: LazyLayer) -> None:
        """
        Unmount the image and let go of its cache: its snapshot was removed. `fs_dir` may be gone already.

        May come twice, and for images that were never mounted; what cannot be done now is done by a later call.

        Raises:
            LazyfsError: not possible now; core logs it and asks again at the next Cleanup.

        """

    def usage(self, bootstrap: LazyLayer) -> Usage:
        """
        Disk use of the image's cached data, without the bootstrap's own directory.

        Raises:
            LazyfsError: the daemon does not answer; core then reports the bootstrap's directory alone.

        """
