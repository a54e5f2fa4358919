"""
The lazy images of a node, out of its configuration.

Layer: snapshotter, above lazy, containerd, findimage. Who calls: cli.snapshotter, once. Start-up asks nobody:
containerd is connected to at the first question, the daemon at the first mount.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lazyfs.image.digest import Digest
from lazyfs.node.rundir import WorkerDir
from snapshotter.containerd import Containerd
from snapshotter.findimage import ImageFinder
from snapshotter.lazy import LazyImages, MountSettings
from snapshotter.lazydaemon import DaemonLink

if TYPE_CHECKING:
    from lazyfs.config import Config

_LABEL_DIFF_ID = "containerd.io/uncompressed"               # of a layer's content: set when it was unpacked
_LABEL_SOURCE = "containerd.io/distribution.source."        # + host: the repositories that it came from


def make_lazy_images(config: Config) -> LazyImages:
    """
    What core wants as its hook.

    Raises:
        HostError: the directories below the snapshotter's root cannot be made.

    """
    daemon = config.daemon
    settings = MountSettings(daemon.driver, prefetch=daemon.prefetch, read_timeout_s=daemon.read_timeout_s)
    link = DaemonLink(WorkerDir(Path(daemon.run_dir) / "daemon"))
    root = Path(config.snapshotter.root).resolve()
    return LazyImages(root, link, ContainerdImages(config.snapshotter.containerd_address), settings)


class ContainerdImages:
    """An ImageFinder of lazy over containerd. For any number of threads."""

    def __init__(self, address: str) -> None:
        self._client = Containerd(address)   # connects at the first call
        self._finder = ImageFinder()

    def images(self, digest: str) -> list[str]:
        """References of the images with that bootstrap, the newest first. Raises LazyfsError."""
        found = [image.name for image in self._finder.find(self._client, Digest(digest))]
        # CRI names images by their configs' digests, too, and `ctr images import` by the day
        return [name for name in found if "/" in name]

    def guesses(self, digest: str) -> list[str]:
        """
        Repositories from which containerd fetched the layer with this diff-id. Raises LazyfsError.

        While an image is being unpacked, it is not an image yet. A guess, because the label has the registry's name
        without its port.
        """
        found = []
        for namespace in self._client.namespaces():
            for content in self._client.in_namespace(namespace).contents([f'labels."{_LABEL_DIFF_ID}"=={digest}']):
                for key, repositories in content.labels.items():
                    if key.startswith(_LABEL_SOURCE):
                        host = key.removeprefix(_LABEL_SOURCE)
                        found += [f"{host}/{repository}" for repository in repositories.split(",") if repository]
        return found
