"""
The lazy images of a node, out of its configuration.

Layer: snapshotter, above lazy, containerd, findimage. Who calls: cli.snapshotter, once. Start-up asks nobody:
containerd is connected to at the first question, the daemon at the first mount.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lazyfs.image.digest import Digest
from lazyfs.node.rundir import WorkerDir
from snapshotter.containerd import Containerd
from snapshotter.findimage import ImageFinder
from snapshotter.lazy import LazyImages, MountSettings
from snapshotter.lazydaemon import DaemonLink

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazyfs.config import Config, Registry

_LABEL_DIFF_ID = "containerd.io/uncompressed"               # of a layer's content: set when it was unpacked
_HOSTS_DIR = re.compile(r"(.+)_(\d{1,5})_\Z")                # of hosts.toml: HOST_PORT_ for HOST:PORT
_LABEL_SOURCE = "containerd.io/distribution.source."        # + host: the repositories that it came from


def make_lazy_images(config: Config) -> LazyImages:
    """
    What core wants as its hook.

    Raises:
        HostError: the directories below the snapshotter's root cannot be made.

    """
    daemon = config.daemon
    settings = MountSettings(daemon.driver, prefetch=daemon.prefetch, read_timeout_s=daemon.read_timeout_s,
                             ahead=config.snapshotter.mount_ahead)
    link = DaemonLink(WorkerDir(Path(daemon.run_dir) / "daemon"))
    root = Path(config.snapshotter.root).resolve()
    return LazyImages(root, link, ContainerdImages(config.snapshotter.containerd_address, config.registry), settings)


class ContainerdImages:
    """An ImageFinder of lazy over containerd. For any number of threads."""

    def __init__(self, address: str, registries: Registry) -> None:
        """`registries`: the configuration's, which names some with their ports."""
        self._client = Containerd(address)   # connects at the first call
        self._registries = registries
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
        without its port, which is taken from other images, the configuration or hosts.toml, if these know one.
        """
        known = self._known_registries()
        found = []
        for namespace in self._client.namespaces():
            for content in self._client.in_namespace(namespace).contents([f'labels."{_LABEL_DIFF_ID}"=={digest}']):
                for key, repositories in content.labels.items():
                    if key.startswith(_LABEL_SOURCE):
                        host = with_port(key.removeprefix(_LABEL_SOURCE), known)
                        found += [f"{host}/{repository}" for repository in repositories.split(",") if repository]
        return found

    def _known_registries(self) -> list[str]:
        """Registries by the names that image references have for them; those of images first."""
        found = [image.name.partition("/")[0] for namespace in self._client.namespaces()
                 for image in self._client.in_namespace(namespace).images() if "/" in image.name]
        found += self._registries.host
        if self._registries.hosts_dir:
            with contextlib.suppress(OSError):
                found += [_HOSTS_DIR.sub(r"\1:\2", path.name) for path in Path(self._registries.hosts_dir).iterdir()]
        return found


def with_port(host: str, known: Sequence[str]) -> str:
    """
    What images of this registry are called: `host`, or the first of `known` that is it with a port.

    Args:
        host: without port, an IPv6 address without brackets, too.
        known: registries as references name them.

    """
    name = f"[{host}]" if ":" in host else host
    return name if name in known else next((one for one in known if one.rpartition(":")[0] == name), name)
