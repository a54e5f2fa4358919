"""
A lazy image as a whole: its manifest and its checked bootstrap, read from where it is.

Layer: lazyfs.registry. Who calls: inspect, check. (A mount also keeps the bootstrap on disk: lazyfs.node.opening.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazyfs.image.bootstrap import Bootstrap, decompress_layer, parse_bootstrap
from lazyfs.image.erofs import ErofsImage
from lazyfs.image.manifest import LazyManifest, Manifest, parse_lazy_manifest, parse_manifest
from lazyfs.image.parts import check_parts

if TYPE_CHECKING:
    from lazyfs.image.descriptor import Document
    from lazyfs.registry.place import ImageSource


@dataclass(frozen=True, slots=True, eq=False)
class LazyImage:
    """`tree`: the validated EROFS image; its device i is `bootstrap.devices[i]`, made of `lazy.layers[i]`."""

    document: Document
    manifest: Manifest
    lazy: LazyManifest
    bootstrap: Bootstrap
    tree: ErofsImage


def load_lazy_image(source: ImageSource, document: Document) -> LazyImage:
    """
    Read and check everything of a lazy image but its data.

    Raises:
        FormatError: not a lazy image, or a malformed one.
        IntegrityError: the bootstrap layer has another digest than the manifest says.
        SourceError: it could not be read.

    """
    manifest = parse_manifest(document.data, document.media_type)
    lazy = parse_lazy_manifest(manifest, source.name)
    layer = lazy.bootstrap
    bootstrap = parse_bootstrap(decompress_layer(source.read_blob(layer.digest, layer.size), layer.raw_size))
    check_parts(lazy, bootstrap)
    sizes = [device.table.device_size for device in bootstrap.devices]
    return LazyImage(document, manifest, lazy, bootstrap, ErofsImage.parse(bootstrap.erofs, sizes))
