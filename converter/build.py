"""
Source image → lazy image: which images, which layers, in which order things become visible.

Order: everything is read and checked, every blob put, then the manifests by digest, then commit() in one step. Until
then nothing is visible under the destination's reference; a run that is killed leaves blobs that the next one reuses.
The result depends on the source, the options and the tool's version only, not on threads, time or what was reused.

Who calls: lazyfs.cli.convert. Layer: converter.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from converter.hot import StoredBlobs
from converter.image import HotWish, SourceImage, check_diff_ids, put_image, read_source_image
from converter.journal import Journal
from converter.layer import convert_layer
from converter.parallel import Parallel, uninterrupted
from converter.pool import CompressionPool
from converter.report import ConvertOptions, ConvertReport, Events, ImageReport, LayerReport, NoEvents
from converter.reuse import LayerContent, Reuse
from lazyfs.errors import NotFoundError, UnsupportedError
from lazyfs.image.descriptor import Document
from lazyfs.image.digest import Digest
from lazyfs.image.manifest import OCI_INDEX, Index, build_index, is_index, options_key, parse_index
from lazyfs.registry.select import select_image

if TYPE_CHECKING:
    from lazyfs.image.descriptor import Descriptor
    from lazyfs.registry.place import ImageDestination, ImageSource

LAYERS_AT_ONCE_MAX = 8      # each takes some 20 MiB of buffers; more would not fill a link better
_DOCKER_REFERENCE = "vnd.docker.reference.type"     # BuildKit: an attestation, not an image


def convert(
    source: ImageSource, destination: ImageDestination, options: ConvertOptions, *,
    events: Events | None = None, journal: Journal | None = None,
) -> ConvertReport:
    """
    Convert an image, or with `options.all_platforms` all images of an index. The caller closes both places.

    Raises:
        LazyfsError: of all kinds; OSError: this machine failed. Nothing is visible at the destination then.

    """
    conversion = _Conversion(source, destination, options, events or NoEvents(), journal or Journal())
    try:
        return conversion.run()
    finally:
        conversion.stored.close()


class _Conversion:
    """One run."""

    def __init__(
        self, source: ImageSource, destination: ImageDestination, options: ConvertOptions, events: Events,
        journal: Journal,
    ) -> None:
        self.source = source
        self.destination = destination
        self.options = options
        self.events = events
        self.notes: list[str] = []
        encoding = options.encoding
        key = options_key(encoding.codec, encoding.level, encoding.chunk_size)
        self.reuse = Reuse(destination, key, journal, look=options.reuse)
        self.stored = StoredBlobs(destination.reader())
        self.staging_dir = Path()      # made when the first layer needs it
        self.parallel: Parallel[tuple[LayerContent, LayerReport]] = Parallel()

    def run(self) -> ConvertReport:
        root = self.source.root()
        index, images = self._choose(root)
        layers = self._convert_layers(images)
        made: list[tuple[SourceImage, Document, ImageReport]] = []
        for image in images:
            contents = [layers[layer.digest] for layer in image.layers]
            check_diff_ids(image, [content for content, _ in contents])
            document, report = put_image(
                image, [content for content, _ in contents], [report for _, report in contents], self.destination,
                self._wish(),
            )
            made.append((image, document, report))
        result = self._publish(index, made)
        return ConvertReport(root.digest, result, tuple(report for _, _, report in made), tuple(self.notes))

    def _wish(self) -> HotWish | None:
        options = self.options
        if options.prefetch is None:
            return None
        return HotWish(options.prefetch, options.encoding, options.jobs, self.stored)

    def _publish(self, index: Index | None, made: list[tuple[SourceImage, Document, ImageReport]]) -> Digest:
        if index is None:
            (_, document, _), = made
        else:
            for _, member, _ in made:
                self.destination.put_document(member)
            data = build_index(index, {image.document.digest: member for image, member, _ in made})
            document = Document(data, OCI_INDEX, Digest.of(data))
        if self.options.named:
            self.destination.commit(document)
        else:
            self.destination.put_document(document)
        return document.digest

    # --- which images ---------------------------------------------------------------------------------------------

    def _choose(self, root: Document) -> tuple[Index | None, list[SourceImage]]:
        """The images to convert; the index, if the result is to be one."""
        if not self.options.all_platforms or not is_index(root.media_type, root.data):
            document = select_image(self.source, self.options.platform)
            return None, [read_source_image(self.source, document)]
        index = parse_index(root.data, root.media_type)
        images: dict[Digest, SourceImage] = {}
        for member in index.manifests:
            if _is_attestation(member):
                self._note(f"left out {member.digest.short}: an attestation, not an image")
            elif member.digest not in images:
                images[member.digest] = self._read_member(member)
        if not images:
            raise NotFoundError(f"{self.source.name}: the index names no image")
        return index, list(images.values())

    def _read_member(self, member: Descriptor) -> SourceImage:
        document = self.source.document(member.digest)
        if is_index(document.media_type, document.data):
            raise UnsupportedError(f"{self.source.name}: index within an index ({member.digest.short})",
                                   hint="name the inner index by its digest, or choose with --platform")
        return read_source_image(self.source, document)

    # --- layers ---------------------------------------------------------------------------------------------------

    def _convert_layers(self, images: list[SourceImage]) -> dict[Digest, tuple[LayerContent, LayerReport]]:
        """Each different layer once, the largest first: the last one to end should be a short one."""
        with uninterrupted():
            self.staging_dir = self.destination.staging_dir
        layers = {layer.digest: layer for image in images for layer in image.layers}
        ordered = sorted(layers.values(), key=lambda layer: (-layer.size, layer.digest))
        at_once = max(1, min(self.options.jobs, len(ordered), LAYERS_AT_ONCE_MAX))
        with CompressionPool(self.options.jobs, at_once) as pool:
            results = self.parallel.run([partial(self._layer, layer, pool) for layer in ordered], at_once)
        return {layer.digest: result for layer, result in zip(ordered, results, strict=True)}

    def _layer(self, layer: Descriptor, pool: CompressionPool) -> tuple[LayerContent, LayerReport]:
        self.events.layer_started(layer)
        warnings: tuple[str, ...] = ()
        content = self.reuse.find(layer)
        reused = content is not None
        if content is None:
            content, warnings = self._convert_layer(layer, pool)
        self.reuse.remember(content.blob)
        report = LayerReport(
            layer.digest, layer.size, content.blob.digest, content.blob.size, content.table.device_size,
            content.table.chunk_count, len(content.entries), reused, warnings,
        )
        self.events.layer_done(report)
        return content, report

    def _convert_layer(self, layer: Descriptor, pool: CompressionPool) -> tuple[LayerContent, tuple[str, ...]]:
        path = self.staging_dir / f"{layer.digest.hex}.blob"

        def watch(size_bytes: int) -> None:
            self.parallel.check()
            self.events.layer_read(layer, size_bytes)

        content, warnings = convert_layer(self.source, layer, self.options.encoding, pool, path=path, watch=watch)
        self.parallel.check()
        if self.options.prefetch is not None:
            self.stored.keep(content.blob.digest, path)
        self.destination.put_blob(path, content.blob.digest, content.blob.size)
        return content, warnings

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.events.note(text)


def _is_attestation(member: Descriptor) -> bool:
    platform = member.platform or {}
    return _DOCKER_REFERENCE in member.annotations or (
        platform.get("os") == "unknown" and platform.get("architecture") == "unknown"
    )
