"""
Which image a bootstrap belongs to: asked of containerd, where nobody told (plain `ctr` sends no image reference).

Layer: snapshotter, above containerd. Who calls: snapshotter.lazy*, where a snapshot has no image-ref label.
Only manifests and configs are read, each bounded; what is not in the content store or makes no sense is passed over.
Manifests never change, so what was learned of one is kept (LEARNED_MAX of them).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lazyfs import limits
from lazyfs.errors import FormatError, NotFoundError
from lazyfs.image.config import parse_config
from lazyfs.image.oci import is_index, parse_index, parse_manifest
from snapshotter.lazyhook import LABEL_BOOTSTRAP

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazyfs.image.digest import Digest
    from snapshotter.containerd import Containerd

NESTING_MAX: Final = 4           # an index may name indexes
LEARNED_MAX: Final = 4096        # a node has some hundred images; an entry is some hundred bytes


@dataclass(frozen=True, slots=True)
class ImageName:
    """An image by the name it has in a namespace of containerd."""

    namespace: str
    name: str


class ImageFinder:
    """Remembers which manifests hold which bootstraps. For any number of threads."""

    def __init__(self) -> None:
        self._learned: OrderedDict[Digest, frozenset[Digest]] = OrderedDict()

    def find(self, client: Containerd, wanted: Digest) -> list[ImageName]:
        """
        All images with a bootstrap layer of this digest, or of this diff-id (digest of the uncompressed tar).

        The one that was pulled last comes first.

        Raises:
            HostError, DeadlineError, SourceError: containerd could not be asked.

        """
        found = []
        for namespace in client.namespaces():
            inside = client.in_namespace(namespace)
            found += [(image.updated, ImageName(namespace, image.name)) for image in inside.images()
                      if wanted in self._bootstraps(inside, image.target.digest, NESTING_MAX)]
        return [name for _, name in sorted(found, key=lambda one: one[0], reverse=True)]

    def _bootstraps(self, client: Containerd, digest: Digest, depth: int) -> frozenset[Digest]:
        """Digests and diff-ids of all bootstraps below a manifest or index."""
        known = self._learned.get(digest)
        if known is not None:
            return known
        try:
            data = client.read_content(digest, limits.MANIFEST_BYTES_MAX)
            if not is_index("", data):
                found = frozenset(_of_manifest(client, data))
            elif depth == 0:
                return frozenset()
            else:
                members = parse_index(data, "").manifests
                return frozenset().union(*(self._bootstraps(client, one.digest, depth - 1) for one in members))
        except NotFoundError:        # another platform's, or being removed: not to be remembered
            return frozenset()
        except FormatError:          # not an image's: artifacts, signatures
            found = frozenset()
        self._learned[digest] = found
        while len(self._learned) > LEARNED_MAX:
            self._learned.popitem(last=False)
        return found


def _of_manifest(client: Containerd, data: bytes) -> Iterator[Digest]:
    manifest = parse_manifest(data, "")
    places = [place for place, layer in enumerate(manifest.layers) if LABEL_BOOTSTRAP in layer.annotations]
    if not places:
        return
    config = parse_config(client.read_content(manifest.config.digest, limits.CONFIG_BYTES_MAX), len(manifest.layers))
    for place in places:
        yield manifest.layers[place].digest
        yield config.diff_ids[place]


def find_image_of_bootstrap(client: Containerd, wanted: Digest) -> list[ImageName]:
    """ImageFinder.find, once."""
    return ImageFinder().find(client, wanted)
