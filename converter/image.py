"""
One image from its converted layers: tree, tables, hot blob, bootstrap, config, manifest.

Who calls: converter.build, converter.optimize. Layer: converter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from converter.hot import HOT_CHUNK_BYTES, write_hot_blob
from converter.hotplan import plan_hot
from converter.overlay import merge
from converter.report import HotReport, ImageReport, LayerReport
from lazyfs.errors import IntegrityError
from lazyfs.image.bootstrap import BlobRef, Bootstrap, Device, compress_layer, pack_bootstrap
from lazyfs.image.config import parse_config
from lazyfs.image.descriptor import Document
from lazyfs.image.digest import Digest
from lazyfs.image.erofs import ErofsImage, write_image
from lazyfs.image.manifest import (
    OCI_MANIFEST,
    HotBlob,
    LayerBlob,
    LazyBootstrap,
    LazyParts,
    build_lazy_manifest,
    check_source,
    parse_manifest,
)
from lazyfs.image.prefetch import wanted_extents
from lazyfs.image.table import ChunkTable
from lazyfs.registry.select import Platform

if TYPE_CHECKING:
    from collections.abc import Sequence

    from converter.encode import Encoding
    from converter.hot import BlobReader
    from converter.reuse import LayerContent
    from lazyfs.image.descriptor import Descriptor
    from lazyfs.image.hot import HotPart
    from lazyfs.image.manifest import Manifest
    from lazyfs.image.prefetch import PrefetchList
    from lazyfs.registry.place import ImageDestination, ImageSource


@dataclass(frozen=True, slots=True)
class HotWish:
    """
    What an image's hot part is to hold, and how it is made.

    Attributes:
        wanted: the prefetch list.
        encoding: of the image's layers.
        jobs: threads that compress; no influence on the result.
        read: gives the blobs' stored bytes.

    """

    wanted: PrefetchList
    encoding: Encoding
    jobs: int
    read: BlobReader


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image to convert, read so far as its manifest and config."""

    document: Document
    manifest: Manifest
    config: bytes
    diff_ids: tuple[Digest, ...]
    platform: str

    @property
    def layers(self) -> tuple[Descriptor, ...]:
        return self.manifest.layers


def read_source_image(source: ImageSource, document: Document) -> SourceImage:
    """
    Read what an image is; refuses what cannot be converted before any layer is read.

    Raises:
        FormatError, UnsupportedError: see image.manifest.check_source().

    """
    manifest = parse_manifest(document.data, document.media_type)
    check_source(manifest)
    config = source.read_blob(manifest.config.digest, manifest.config.size)
    parsed = parse_config(config, len(manifest.layers))
    platform = Platform(parsed.os, parsed.architecture, parsed.variant)
    return SourceImage(document, manifest, config, parsed.diff_ids, str(platform))


def check_diff_ids(image: SourceImage, layers: Sequence[LayerContent]) -> None:
    """Raises IntegrityError unless each layer's archive is the one that the config promises."""
    for number, (promised, layer) in enumerate(zip(image.diff_ids, layers, strict=True), 1):
        if layer.blob.source_diff_id != promised:
            raise IntegrityError(
                f"layer {number} ({layer.blob.source_digest.short}) unpacks to {layer.blob.source_diff_id.short}, "
                f"the image config promises {promised.short}",
                hint="the image is damaged or was put together wrongly; build and push it again",
            )


def put_image(
    image: SourceImage, layers: Sequence[LayerContent], reports: Sequence[LayerReport],
    destination: ImageDestination, wish: HotWish | None,
) -> tuple[Document, ImageReport]:
    """
    Put everything of an image but its manifest at the destination; the layers' blobs are there already.

    Args:
        image: the source image.
        layers: its converted layers, lowest first.
        reports: of those layers.
        destination: where to.
        wish: the hot part, if there is to be one.

    Returns: the lazy manifest, not yet at the destination.

    """
    root = merge([layer.entries for layer in layers], names=[layer.blob.source_digest.short for layer in layers])
    erofs = write_image(root, [layer.table.device_size for layer in layers])
    origin = Origin(image.manifest, image.document.digest, image.config)
    document, hot, bootstrap = put_tree(origin, layers, erofs, destination, wish)
    report = ImageReport(
        image.platform, image.document.digest, document.digest, tuple(reports), hot, bootstrap.size
    )
    return document, report


@dataclass(frozen=True, slots=True)
class Origin:
    """What a lazy image keeps of its source image: manifest, that manifest's digest, config."""

    manifest: Manifest
    digest: Digest
    config: bytes


def put_tree(
    origin: Origin, layers: Sequence[LayerContent], erofs: bytes | memoryview, destination: ImageDestination,
    wish: HotWish | None,
) -> tuple[Document, HotReport | None, LazyBootstrap]:
    """
    Put hot blob, bootstrap and config of an image whose merged tree is there already; the layers' entries are not used.

    Args:
        origin: of the source image.
        layers: its converted layers, lowest first.
        erofs: the tree of all of them.
        destination: where to.
        wish: the hot part, if there is to be one.

    Returns: the lazy manifest, not yet at the destination; the hot part; the bootstrap layer.

    """
    blobs, tables = _number_blobs(layers)
    hot, part = None, None
    if wish is not None:
        image = ErofsImage.parse(erofs, [table.device_size for table in tables])
        blobs, part, hot = _put_hot_blob(wish, image, layers, blobs, destination)
    devices = tuple(Device(table.device_digest(), table) for table in tables)
    tar = pack_bootstrap(Bootstrap(blobs, devices, erofs, part))
    packed = compress_layer(tar)
    bootstrap = LazyBootstrap(Digest.of(packed), len(packed), len(tar))
    hot_blob = HotBlob(hot.digest, hot.size) if hot is not None and hot.digest is not None else None
    manifest, config = build_lazy_manifest(
        origin.manifest, origin.digest, origin.config,
        LazyParts(tuple(layer.blob for layer in layers), hot_blob, bootstrap), bootstrap_diff_id=Digest.of(tar),
    )
    destination.put_bytes(packed, bootstrap.digest)
    destination.put_bytes(config, Digest.of(config))
    return Document(manifest, OCI_MANIFEST, Digest.of(manifest)), hot, bootstrap


def _number_blobs(layers: Sequence[LayerContent]) -> tuple[tuple[BlobRef, ...], list[ChunkTable]]:
    """The image's list of blobs, each once (an image may have the same layer twice), and tables that count it."""
    indexes: dict[Digest, int] = {}
    blobs: list[LayerBlob] = []
    tables = []
    for layer in layers:
        index = indexes.setdefault(layer.blob.digest, len(indexes))
        if index == len(blobs):
            blobs.append(layer.blob)
        rows = layer.table.rows.copy()
        rows["blob_index"] = index
        tables.append(ChunkTable(layer.table.chunk_size, layer.table.device_size, rows))
    return tuple(BlobRef(blob.digest, blob.size) for blob in blobs), tables


def _put_hot_blob(
    wish: HotWish, image: ErofsImage, layers: Sequence[LayerContent], blobs: tuple[BlobRef, ...],
    destination: ImageDestination,
) -> tuple[tuple[BlobRef, ...], HotPart | None, HotReport]:
    """The image's blobs with the hot one, and what it holds; a list that finds nothing makes none."""
    tables, unmatched = [layer.table for layer in layers], list[str]()
    extents = plan_hot(wanted_extents(wish.wanted, image, tables, unmatched), tables, HOT_CHUNK_BYTES)
    if not len(extents):
        return blobs, None, HotReport(None, 0, 0, 0, 0, 0.0, tuple(unmatched))
    path = destination.staging_dir / "hot.blob"
    ref, part = write_hot_blob(extents, layers, wish.encoding, wish.jobs, hot_index=len(blobs), read=wish.read,
                               path=path)
    destination.put_blob(path, ref.digest, ref.size)
    report = HotReport(ref.digest, ref.size, part.table.device_size, part.table.chunk_count, len(extents),
                       part.share(tables), tuple(unmatched))
    return (*blobs, ref), part, report
