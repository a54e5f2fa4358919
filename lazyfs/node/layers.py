"""
The first steps to an image: its source, its manifest, its bootstrap layer.

Layer: node. Who calls: node.seed in the starter, node.opening in the worker.
"""

from __future__ import annotations

import base64
import contextlib
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from lazyfs.errors import SourceError
from lazyfs.image.digest import Digest
from lazyfs.registry import open_source
from lazyfs.registry.reference import RegistryReference, parse_reference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lazyfs.image.descriptor import Descriptor, Document
    from lazyfs.image.manifest import LazyManifest
    from lazyfs.node.order import MountOrder
    from lazyfs.registry.place import ByteStream, ImageSource


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """
    The bootstrap layer: as image.manifest.LazyBootstrap, whose module a seeded worker does not load.

    One that was unpacked by somebody else is known by its uncompressed tar only: `size` is 0, `digest` the tar's.
    """

    digest: Digest
    size: int
    raw_size: int

    @classmethod
    def of(cls, lazy: LazyManifest) -> Self:
        return cls(lazy.bootstrap.digest, lazy.bootstrap.size, lazy.bootstrap.raw_size)


def find_image(order: MountOrder) -> tuple[ImageSource, LazyManifest]:
    """
    Source and manifest; with a seeded manifest the source is opened when data is missing.

    Raises:
        LazyfsError: it cannot be had, or is no lazy image.

    """
    from lazyfs.image.manifest import parse_lazy_manifest, parse_manifest  # noqa: PLC0415 - a seeded worker needs none

    source: ImageSource
    if order.document is not None:
        source, data, media_type = deferred_source(order), base64.b64decode(order.document), order.document_type
        return source, parse_lazy_manifest(parse_manifest(data, media_type), order.image)
    from lazyfs.registry.select import select_image  # noqa: PLC0415

    source = open_source(order.image, order.registry_options())
    try:
        document = select_image(source, order.platform)
        return source, parse_lazy_manifest(parse_manifest(document.data, document.media_type), source.name)
    except BaseException:
        source.close()
        raise


def deferred_source(order: MountOrder) -> DeferredSource:
    """The order's source, opened at its first use."""
    return DeferredSource(order.image, lambda: open_source(order.image, order.registry_options()))


def tar_path(cache_dir: Path, digest: Digest) -> Path:
    """Where a cache directory keeps a bootstrap that came unpacked."""
    return cache_dir / "bootstraps" / f"{digest.hex}.tar"


def bootstrap_path(cache_dir: Path, digest: Digest) -> Path:
    """Where a cache directory keeps a bootstrap layer as it came."""
    return cache_dir / "bootstraps" / f"{digest.hex}.zst"


def erofs_path(cache_dir: Path, digest: Digest) -> Path:
    """Where it keeps the EROFS image of that bootstrap."""
    return cache_dir / "images" / f"{digest.hex}.erofs"


def read_checked(path: Path, layer: StoredLayer | Descriptor) -> bytes | None:
    """The stored layer, if the file holds exactly that."""
    with contextlib.suppress(OSError):
        if path.stat().st_size == layer.size:
            data = path.read_bytes()
            if Digest.of(data) == layer.digest:
                return data
    return None


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

    @property
    def server(self) -> str:
        """Who is asked, whatever the image: for fetch.sources."""
        reference = parse_reference(self._name)
        return reference.host if isinstance(reference, RegistryReference) else self._name

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
