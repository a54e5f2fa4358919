"""
What the starter of a worker fetches while the worker is still importing its libraries: manifest and bootstrap layer.

Two processes, two cores: this takes the registry's part out of the time from `lazyfs mount` to the mount. The worker
trusts none of it further than the one who asks: it is checked against its digests there (node.opening).

Layer: node. Who calls: node.launch (fetch_seed), node.opening (DeferredSource).
"""

from __future__ import annotations

import base64
import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from lazyfs.errors import SourceError
from lazyfs.image.oci import parse_manifest
from lazyfs.registry import open_source
from lazyfs.registry.select import select_image

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lazyfs.image.descriptor import Descriptor, Document
    from lazyfs.image.digest import Digest
    from lazyfs.node.order import MountOrder
    from lazyfs.registry.place import ByteStream, ImageSource

BOOTSTRAPS = "bootstraps"        # in the cache directory
# image.manifest.BOOTSTRAP_KEY; a test keeps them alike. That module imports numpy, 100 ms that nobody here needs.
BOOTSTRAP_KEY = "containerd.io/snapshot/lazyfs.bootstrap"


def bootstrap_path(cache_dir: Path, digest: Digest) -> Path:
    """Where a cache directory keeps a bootstrap layer as it came."""
    return cache_dir / BOOTSTRAPS / f"{digest.hex}.zst"


def fetch_seed(order: MountOrder, cache_dir: Path, seed_path: Path) -> MountOrder:
    """
    Fetch the manifest, and the bootstrap layer unless the cache seems to have it.

    Returns:
        The order with both; without the layer if the image does not look lazy (the worker says what is wrong).

    Raises:
        LazyfsError: the image cannot be had.

    """
    source = open_source(order.image, order.registry_options())
    try:
        document = select_image(source, order.platform)
        layers = parse_manifest(document.data, document.media_type).layers
        seeded = replace(order, document=base64.b64encode(document.data).decode(), document_type=document.media_type)
        if not layers or BOOTSTRAP_KEY not in layers[-1].annotations or _is_cached(cache_dir, layers[-1]):
            return seeded
        layer = layers[-1]
        data = source.read_blob(layer.digest, layer.size)
    finally:
        source.close()
    seed_path.unlink(missing_ok=True)
    descriptor = os.open(seed_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    return replace(seeded, seed=str(seed_path))


def _is_cached(cache_dir: Path, layer: Descriptor) -> bool:
    try:
        return bootstrap_path(cache_dir, layer.digest).stat().st_size == layer.size
    except OSError:
        return False


class DeferredSource:
    """An ImageSource that is opened when it is first used: a mount whose data is cached never is."""

    def __init__(self, name: str, opener: Callable[[], ImageSource]) -> None:
        self._name = name
        self._opener = opener
        self._source: ImageSource | None = None
        self._closed = False
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self._name

    def root(self) -> Document:
        return self._open().root()

    def document(self, digest: Digest) -> Document:
        return self._open().document(digest)

    def open_blob(self, digest: Digest, size: int) -> ByteStream:
        return self._open().open_blob(digest, size)

    def read_blob(self, digest: Digest, size: int) -> bytes:
        return self._open().read_blob(digest, size)

    def read_range(self, digest: Digest, offset: int, size: int, deadline: float) -> ByteStream:
        return self._open().read_range(digest, offset, size, deadline)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._source is not None:
                self._source.close()

    def _open(self) -> ImageSource:
        if self._source is None:
            with self._lock:
                if self._source is None and not self._closed:
                    self._source = self._opener()
        if self._source is None:
            raise SourceError(f"{self._name} was closed", transient=False)
        return self._source
