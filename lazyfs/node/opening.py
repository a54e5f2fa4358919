"""
From a mount order to all that a mount needs: source, checked tables, checked EROFS image in a file.

Layer: node. Who calls: node.worker, in a thread (all of it blocks). Nothing that came from outside is used before it
is checked: manifest by its digest (registry), bootstrap layer by the manifest's, the tables and the EROFS image by
our own readers, before the kernel sees a byte of them. Stored in the cache directory, checked again at each use:

    bootstraps/<hex of the layer's digest>.zst     the bootstrap layer as it came
    bootstraps/<hex of the tar's digest>.tar       one that came unpacked (from containerd)
    images/<hex of the layer's digest>.erofs       what the kernel mounts; what it holds has been checked once
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lazyfs import limits
from lazyfs.cache.ownership import raise_cache_error
from lazyfs.errors import IntegrityError
from lazyfs.fs.drivers import Driver, choose_driver
from lazyfs.image.bootstrap import HOT_MEMBER, decompress_layer, pack_unpacked, parse_bootstrap
from lazyfs.image.digest import Digest
from lazyfs.image.hot import HotPart
from lazyfs.image.parts import check_parts
from lazyfs.image.table import ChunkTable
from lazyfs.node.layers import (
    StoredLayer,
    bootstrap_path,
    deferred_source,
    erofs_path,
    find_image,
    read_checked,
    tar_path,
)

if TYPE_CHECKING:
    from lazyfs.image.bootstrap import BlobRef, Bootstrap
    from lazyfs.image.erofs import ErofsImage
    from lazyfs.node.order import MountOrder
    from lazyfs.registry.place import ImageSource

_COMPARE_BYTES = 1 << 20         # at a time: numpy makes as many truth values


@dataclass(frozen=True, slots=True, eq=False)
class OpenedImage:
    """A checked image. `close()` when it is no longer needed. `parsed`: for driver fuse; keeps `erofs_path` mapped."""

    source: ImageSource
    layer: StoredLayer
    blobs: tuple[BlobRef, ...]
    devices: tuple[tuple[Digest, ChunkTable], ...]
    erofs_path: Path
    parsed: ErofsImage | None
    hot: HotPart | None = None

    @property
    def tree(self) -> ErofsImage:
        """The tree; parsed now unless it was made for driver fuse. Raises FormatError: the file was damaged since."""
        if self.parsed is not None:
            return self.parsed
        mapped = _map_file(self.erofs_path)
        if mapped is None:
            raise IntegrityError(f"{self.erofs_path} is gone", hint="mount the image again")
        return _parse_tree(mapped, [table.device_size for _, table in self.devices])

    def close(self) -> None:
        self.source.close()


def open_image(order: MountOrder, cache_dir: Path, *, offline: bool = False) -> OpenedImage:
    """
    Open and check an image: open_tables() and store_tree().

    Args:
        order: which.
        cache_dir: where bootstraps are kept.
        offline: use only what is kept; `order.layer` is given.

    Raises:
        LazyfsError: it cannot be had, is no lazy image, or is damaged.

    """
    opened, erofs = open_tables(order, cache_dir, offline=offline)
    try:
        return store_tree(opened, erofs, order)[0]
    except BaseException:
        opened.close()
        raise


def open_tables(
    order: MountOrder, cache_dir: Path, *, offline: bool = False
) -> tuple[OpenedImage, bytes | memoryview]:
    """
    The first half of open_image(): enough to fetch data, which has digests. Returns also its EROFS image, unchecked.

    Nothing of the image may be mounted before store_tree() has checked that too.
    """
    lazy = None
    if order.layer is None:
        source, lazy = find_image(order)
        layer = StoredLayer.of(lazy)
    else:
        source = deferred_source(order)
        layer = StoredLayer(Digest(order.layer[0]), order.layer[1], order.layer[2])
    try:
        if layer.size:
            bootstrap = _read_bootstrap(None if offline else source, layer, cache_dir, order.seed)
        else:
            bootstrap = _read_unpacked(layer, cache_dir, order.bootstrap_dir)
        if lazy is not None:
            check_parts(lazy, bootstrap)
        # copies: the tables are views of the whole bootstrap, which then can go
        devices = tuple(
            (device.digest, ChunkTable(device.table.chunk_size, device.table.device_size, np.array(device.table.rows)))
            for device in bootstrap.devices
        )
        path = erofs_path(cache_dir, layer.digest)
        opened = OpenedImage(source, layer, bootstrap.blobs, devices, path, None, _copied(bootstrap.hot))
    except BaseException:
        source.close()
        raise
    return opened, bootstrap.erofs


def store_tree(
    opened: OpenedImage, erofs: bytes | memoryview, order: MountOrder
) -> tuple[OpenedImage, ErofsImage | None]:
    """
    The second half of open_image(): check the EROFS image, and have it in its file.

    Returns:
        The image, and the tree, if it had to be parsed: it keeps `erofs` in memory.

    Raises:
        LazyfsError: it is damaged, or cannot be stored. `opened` is the caller's to close.

    """
    sizes = [table.device_size for _, table in opened.devices]
    mapped, tree = _store_erofs(erofs, opened.erofs_path, sizes, checked=order.checked)
    if choose_driver(order.driver) is not Driver.FUSE:
        return opened, tree
    # A tree that stays keeps the bytes that it was made of: those of the file, whose pages need not stay in memory.
    tree = _parse_tree(mapped, sizes)
    return replace(opened, parsed=tree), tree


def _copied(hot: HotPart | None) -> HotPart | None:
    """The same, as no view of the bootstrap."""
    if hot is None:
        return None
    table = ChunkTable(hot.table.chunk_size, hot.table.device_size, np.array(hot.table.rows))
    return HotPart(hot.digest, table, np.array(hot.extents))


def _read_bootstrap(source: ImageSource | None, layer: StoredLayer, cache_dir: Path, seed: str | None) -> Bootstrap:
    path = bootstrap_path(cache_dir, layer.digest)
    data = read_checked(path, layer)
    if data is None:
        if seed is not None:
            data = read_checked(Path(seed), layer)
        if data is None and source is None:
            raise IntegrityError(f"{path} is missing or damaged", hint="it is fetched again in a moment")
        if data is None:
            assert source is not None
            data = source.read_blob(layer.digest, layer.size)
        _write_file(path, data)
    if seed is not None and Path(seed) != path:
        Path(seed).unlink(missing_ok=True)
    return parse_bootstrap(decompress_layer(data, layer.raw_size))


def _read_unpacked(layer: StoredLayer, cache_dir: Path, directory: str | None) -> Bootstrap:
    path = tar_path(cache_dir, layer.digest)
    data = _read_bounded(path)
    if data is None or Digest.of(data) != layer.digest:
        if directory is None:
            raise IntegrityError(f"{path} is missing or damaged", hint="pull the image again")
        data = pack_unpacked(lambda name: _read_member(Path(directory), name))
        found = Digest.of(data)
        if found != layer.digest:
            raise IntegrityError(f"the bootstrap in {directory} is {found.short}, expected {layer.digest.short}",
                                 hint="remove the image, and pull it again")
        _write_file(path, data)
    return parse_bootstrap(data)


def _read_member(directory: Path, name: str) -> bytes | None:
    data = _read_bounded(directory / name)
    if data is None and name != HOT_MEMBER:     # if it is missing though it was there, the digest tells
        raise IntegrityError(f"{directory / name} is not there, or is not what a lazy image holds",
                             hint="pull the image again")
    return data


def _read_bounded(path: Path) -> bytes | None:
    """A regular file's content; None: there is none, or one that is too large."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):      # first: fdopen() of a directory keeps the descriptor
                with os.fdopen(descriptor, "rb", closefd=False) as file:
                    data = file.read(limits.BOOTSTRAP_BYTES_MAX + 1)
                return data if len(data) <= limits.BOOTSTRAP_BYTES_MAX else None
        finally:
            os.close(descriptor)
    return None


def _store_erofs(
    erofs: bytes | memoryview, path: Path, sizes: list[int], *, checked: bool
) -> tuple[mmap.mmap, ErofsImage | None]:
    """
    Check the EROFS image and have it in `path`: exactly the bytes that will be mounted. The tree, if it was parsed.

    Raises:
        FormatError: the image is not a valid one.

    """
    tree = None
    mapped = _map_holding(path, erofs)
    if mapped is None:
        if not checked:
            tree = _parse_tree(erofs, sizes)
        _write_file(path, erofs)
        mapped = _map_holding(path, erofs)
    if mapped is None:
        raise IntegrityError(f"{path} does not hold what was written to it", hint="check the disk")
    return mapped, tree


def _map_holding(path: Path, data: bytes | memoryview) -> mmap.mmap | None:
    """The file, mapped, if it holds exactly `data`."""
    mapped = _map_file(path)
    if mapped is None or len(mapped) != len(data):
        return None
    # by numpy: memoryview's == takes 1.7 ms a megabyte, and a worker that takes over compares a hundred images
    left, right = np.frombuffer(mapped, np.uint8), np.frombuffer(data, np.uint8)
    pieces = range(0, len(left), _COMPARE_BYTES)
    same = all(np.array_equal(left[at : at + _COMPARE_BYTES], right[at : at + _COMPARE_BYTES]) for at in pieces)
    return mapped if same else None


def _parse_tree(data: memoryview | bytes | mmap.mmap, sizes: list[int]) -> ErofsImage:
    from lazyfs.image.erofs.reader import ErofsImage  # noqa: PLC0415 - a seeded worker with driver erofs needs none

    return ErofsImage.parse(data, sizes)


def _map_file(path: Path) -> mmap.mmap | None:
    with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    return None


def _write_file(path: Path, data: bytes | memoryview) -> None:
    """Replace atomically. Not synced: what is read back is checked. Raises CacheError, DiskFullError."""
    # of this thread alone: an image may be mounted twice at the same time
    temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise_cache_error(path.parent.parent, f"write {path.name}", error)
