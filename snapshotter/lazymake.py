"""
The lazy images of a node, out of its configuration.

Layer: snapshotter, above lazy, containerd, findimage. Who calls: cli.snapshotter, once. Start-up asks nobody:
containerd is connected to at the first question, the daemon at the first mount.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from lazyfs.node.rundir import WorkerDir
from lazyfs.registry.fields import from_config, to_fields
from snapshotter.lazy import LazyImages, MountSettings
from snapshotter.lazydaemon import DaemonLink

if TYPE_CHECKING:
    from lazyfs.config import Config
    from snapshotter.containerd import Containerd
    from snapshotter.findimage import ImageFinder

_LABEL_DIFF_ID = "containerd.io/uncompressed"               # of a layer's content: set when it was unpacked
_LABEL_SOURCE = "containerd.io/distribution.source."        # + host: the repositories that it came from


def make_lazy_images(config: Config) -> LazyImages:
    """
    What core wants as its hook.

    Raises:
        HostError: the directories below the snapshotter's root cannot be made.

    """
    daemon = config.daemon
    settings = MountSettings(daemon.driver, prefetch=daemon.prefetch, read_timeout_s=daemon.read_timeout_s,
                             registry=to_fields(from_config(config.registry)))
    link = DaemonLink(WorkerDir(Path(daemon.run_dir) / "daemon"))
    root = Path(config.snapshotter.root).resolve()
    return LazyImages(root, link, ContainerdImages(config.snapshotter.containerd_address), settings)


class ContainerdImages:
    """An ImageFinder of lazy over containerd. For any number of threads."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._asked: tuple[Containerd, ImageFinder] | None = None

    def images(self, digest: str) -> list[str]:
        """References of the images with that bootstrap, the newest first. Raises LazyfsError."""
        from lazyfs.image.digest import Digest  # noqa: PLC0415 - ordinary images never need it

        client, finder = self._connect()
        found = [image.name for image in finder.find(client, Digest(digest))]
        # CRI names images by their configs' digests, too, and `ctr images import` by the day
        return [name for name in found if "/" in name]

    def guesses(self, digest: str) -> list[str]:
        """
        Repositories from which containerd fetched the layer with this diff-id. Raises LazyfsError.

        While an image is being unpacked, it is not an image yet. A guess, because the label has the registry's name
        without its port.
        """
        client, _ = self._connect()
        found = []
        for namespace in client.namespaces():
            for content in client.in_namespace(namespace).contents([f'labels."{_LABEL_DIFF_ID}"=={digest}']):
                for key, repositories in content.labels.items():
                    if key.startswith(_LABEL_SOURCE):
                        host = key.removeprefix(_LABEL_SOURCE)
                        found += [f"{host}/{repository}" for repository in repositories.split(",") if repository]
        return found

    def _connect(self) -> tuple[Containerd, ImageFinder]:
        from snapshotter.containerd import Containerd  # noqa: PLC0415 - as above
        from snapshotter.findimage import ImageFinder  # noqa: PLC0415

        with self._lock:
            if self._asked is None:
                self._asked = Containerd(self._address), ImageFinder()
            return self._asked
