"""
From an image's name to all that a mount needs: source, checked bootstrap, checked EROFS image in a file.

Layer: node. Who calls: node.worker, in a thread (all of it blocks). Nothing that came from outside is used before it
is checked: manifest by its digest (registry), bootstrap layer by the manifest's, the tables and the EROFS image by
our own readers, before the kernel sees a byte of them. Stored in the cache directory, checked again at each use:

    bootstraps/<hex of the layer's digest>.zst     the bootstrap layer as it came
    images/<hex of the layer's digest>.erofs       what the kernel mounts
"""

from __future__ import annotations

import base64
import contextlib
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lazyfs.errors import DiskFullError, FormatError, IntegrityError
from lazyfs.image.bootstrap import decompress_layer, parse_bootstrap
from lazyfs.image.descriptor import Document
from lazyfs.image.digest import Digest
from lazyfs.image.erofs import ErofsImage
from lazyfs.image.manifest import parse_lazy_manifest, parse_manifest
from lazyfs.image.table import ChunkTable
from lazyfs.node.seed import DeferredSource, bootstrap_path
from lazyfs.registry import open_source
from lazyfs.registry.select import select_image

if TYPE_CHECKING:
    from lazyfs.image.bootstrap import BlobRef, Bootstrap
    from lazyfs.image.manifest import LazyBootstrap, LazyManifest
    from lazyfs.node.order import MountOrder
    from lazyfs.registry.place import ImageSource


@dataclass(frozen=True, slots=True, eq=False)
class OpenedImage:
    """A checked image. `close()` when it is no longer needed; `tree` keeps `erofs_path` mapped."""

    source: ImageSource
    bootstrap_digest: Digest
    blobs: tuple[BlobRef, ...]
    devices: tuple[tuple[Digest, ChunkTable], ...]
    erofs_path: Path
    tree: ErofsImage

    def close(self) -> None:
        self.source.close()


def open_image(order: MountOrder, cache_dir: Path) -> OpenedImage:
    """
    Open and check an image.

    Raises:
        LazyfsError: it cannot be had, is no lazy image, or is damaged.

    """
    source, document = _find(order)
    try:
        lazy = parse_lazy_manifest(parse_manifest(document.data, document.media_type))
        bootstrap = _read_bootstrap(source, lazy.bootstrap, cache_dir, order.seed)
        _check_parts(lazy, bootstrap)
        erofs_path = cache_dir / "images" / f"{lazy.bootstrap.digest.hex}.erofs"
        tree = _store_erofs(bootstrap, erofs_path)
        # copies: the tables are views of the whole bootstrap, which then can go
        devices = tuple(
            (device.digest, ChunkTable(device.table.chunk_size, device.table.device_size, np.array(device.table.rows)))
            for device in bootstrap.devices
        )
        return OpenedImage(source, lazy.bootstrap.digest, bootstrap.blobs, devices, erofs_path, tree)
    except BaseException:
        source.close()
        raise


def _find(order: MountOrder) -> tuple[ImageSource, Document]:
    """Source and manifest; with a seeded manifest the source is opened when data is missing."""
    if order.document is None:
        source = open_source(order.image, order.registry_options())
        try:
            return source, select_image(source, order.platform)
        except BaseException:
            source.close()
            raise
    data = base64.b64decode(order.document)
    document = Document(data, order.document_type, Digest.of(data))
    return DeferredSource(order.image, lambda: open_source(order.image, order.registry_options())), document


def _read_bootstrap(source: ImageSource, layer: LazyBootstrap, cache_dir: Path, seed: str | None) -> Bootstrap:
    path = bootstrap_path(cache_dir, layer.digest)
    data = _read_checked(path, layer)
    if data is None:
        if seed is not None:
            data = _read_checked(Path(seed), layer)
        if data is None:
            data = source.read_blob(layer.digest, layer.size)
        _write_file(path, data)
    if seed is not None:
        Path(seed).unlink(missing_ok=True)
    return parse_bootstrap(decompress_layer(data, layer.raw_size))


def _read_checked(path: Path, layer: LazyBootstrap) -> bytes | None:
    with contextlib.suppress(OSError):
        if path.stat().st_size == layer.size:
            data = path.read_bytes()
            if Digest.of(data) == layer.digest:
                return data
    return None


def _check_parts(lazy: LazyManifest, bootstrap: Bootstrap) -> None:
    """Manifest and bootstrap must speak of the same blobs: what is pulled, kept and deleted is what is read."""
    promised = {blob.digest: (blob.size, False) for blob in lazy.layers}
    if lazy.hot is not None:
        promised[lazy.hot.digest] = (lazy.hot.size, True)
    if len(bootstrap.devices) != len(lazy.layers):
        raise FormatError(f"bootstrap has {len(bootstrap.devices)} devices, the manifest {len(lazy.layers)} layers")
    if {blob.digest: (blob.size, blob.hot) for blob in bootstrap.blobs} != promised:
        raise FormatError("bootstrap and manifest do not name the same blobs")


def _store_erofs(bootstrap: Bootstrap, path: Path) -> ErofsImage:
    """
    Put the EROFS image into `path` and check what is mapped from there: exactly the bytes that will be mounted.

    Raises:
        FormatError: the image is not a valid one.

    """
    sizes = [device.table.device_size for device in bootstrap.devices]
    mapped = _map_file(path)
    if mapped is None or len(mapped) != len(bootstrap.erofs) or memoryview(mapped) != bootstrap.erofs:
        _write_file(path, bootstrap.erofs)
        mapped = _map_file(path)
        if mapped is None or memoryview(mapped) != bootstrap.erofs:
            raise IntegrityError(f"{path} does not hold what was written to it", hint="check the disk")
    return ErofsImage.parse(mapped, sizes)


def _map_file(path: Path) -> mmap.mmap | None:
    with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    return None


def _write_file(path: Path, data: bytes | memoryview) -> None:
    """Replace atomically. Not synced: what is read back is checked."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        text = f"cannot write {path}: {error.strerror}"
        raise DiskFullError(text, hint="free some space, or use another --cache-dir") from error
