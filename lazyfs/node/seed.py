"""
What the starter of a worker does while the worker is still importing its libraries: fetch the bootstrap, and check it.

Two processes, two cores: this takes the registry's part, and the check of the EROFS image, out of the time from
`lazyfs mount` to the mount. The worker still checks the layer against its digest, and reads the tables itself; the
EROFS image it believes to be valid if its own starter says so (nobody else may: node.control).

Layer: node. Who calls: node.launch. Imports are inside the functions that need them: numpy takes 60 ms.
"""

from __future__ import annotations

import base64
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from lazyfs.image.oci import parse_manifest
from lazyfs.node.layers import StoredLayer, bootstrap_path, erofs_path, read_checked
from lazyfs.registry import open_source
from lazyfs.registry.select import select_image

if TYPE_CHECKING:
    from pathlib import Path

    from lazyfs.image.descriptor import Document
    from lazyfs.node.order import MountOrder

# image.manifest.BOOTSTRAP_KEY, whose module imports numpy; a test keeps the two alike.
BOOTSTRAP_KEY = "containerd.io/snapshot/lazyfs.bootstrap"


def fetch_seed(order: MountOrder, cache_dir: Path, seed_path: Path) -> MountOrder:
    """
    Find and fetch an image's bootstrap. An image that is not lazy is left to the worker, which says so.

    Args:
        order: what to mount.
        cache_dir: may hold the layer already; read only.
        seed_path: where to put the layer if not.

    Returns:
        The order with the manifest, the layer, and whether it was checked.

    Raises:
        LazyfsError: the image cannot be had, or is damaged.

    """
    source = open_source(order.image, order.registry_options())
    try:
        document = select_image(source, order.platform)
        order = replace(order, document=base64.b64encode(document.data).decode(), document_type=document.media_type)
        layers = parse_manifest(document.data, document.media_type).layers
        if not layers or BOOTSTRAP_KEY not in layers[-1].annotations:
            return order
        layer = layers[-1]
        path = bootstrap_path(cache_dir, layer.digest)
        data = read_checked(path, layer)
        if data is None:
            data = source.read_blob(layer.digest, layer.size)
            path = seed_path
            _write_private(path, data)
    finally:
        source.close()
    order = replace(order, seed=str(path), origin=getattr(source, "origin", ""))
    if erofs_path(cache_dir, layer.digest).exists():
        return order
    return _check(order, document, data)


def _check(order: MountOrder, document: Document, data: bytes) -> MountOrder:
    """What node.opening does with an image; the tables are read there again."""
    from lazyfs.fs.drivers import Driver, choose_driver  # noqa: PLC0415
    from lazyfs.image.bootstrap import decompress_layer, parse_bootstrap  # noqa: PLC0415
    from lazyfs.image.manifest import parse_lazy_manifest  # noqa: PLC0415
    from lazyfs.image.parts import check_parts  # noqa: PLC0415

    lazy = parse_lazy_manifest(parse_manifest(document.data, document.media_type), order.image)
    layer = StoredLayer.of(lazy)
    bootstrap = parse_bootstrap(decompress_layer(data, layer.raw_size))
    check_parts(lazy, bootstrap)
    checked = choose_driver(order.driver) is Driver.EROFS   # driver fuse needs the parsed image, there
    if checked:
        from lazyfs.image.erofs.reader import ErofsImage  # noqa: PLC0415

        ErofsImage.parse(bootstrap.erofs, [device.table.device_size for device in bootstrap.devices])
    return replace(order, layer=(layer.digest.text, layer.size, layer.raw_size), checked=checked)


def _write_private(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
