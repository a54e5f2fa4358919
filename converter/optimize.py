"""
From a lazy image one with another hot part: new hot blob, bootstrap, config and manifest; the layers' blobs stay.

The merged tree is taken as it is, the hot blocks come out of the layers' chunks, and what the manifest and the config
had of the source image is given to what writes them for a conversion: so the result is, byte for byte, the image that
a conversion with that list would have made. Order: everything is put, then the reference names it, in one step. Blobs
that are not at the destination's place yet are mounted or linked from the source's where that is possible, else copied.

Who calls: lazyfs.cli.optimize, lazyfs.cli.convert_profiled. Layer: converter.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from converter.encode import Encoding
from converter.hot import StoredBlobs
from converter.image import HotWish, Origin, put_tree
from converter.parallel import uninterrupted
from converter.reuse import LayerContent
from lazyfs import limits
from lazyfs.errors import BusyError, FormatError, IntegrityError, UnsupportedError
from lazyfs.image.config import parse_config, without_added
from lazyfs.image.descriptor import Document
from lazyfs.image.digest import Digest
from lazyfs.image.manifest import (
    NOT_LAZY_HINT,
    OCI_INDEX,
    build_index,
    is_index,
    is_lazy,
    parse_index,
    parse_manifest,
    parse_options,
    source_annotations,
)
from lazyfs.image.table import ChunkTable
from lazyfs.profile.coverage import Coverage, cover
from lazyfs.profile.files import ImageFiles
from lazyfs.registry.lazy import LazyImage, load_lazy_image
from lazyfs.registry.select import Platform, select_image
from lazyfs.registry.staging import os_errors

if TYPE_CHECKING:
    from converter.report import HotReport
    from lazyfs.image.descriptor import Descriptor
    from lazyfs.image.manifest import Index, Manifest
    from lazyfs.image.prefetch import PrefetchList
    from lazyfs.registry.place import ImageDestination, ImageSource


@dataclass(frozen=True, slots=True)
class OptimizeOptions:
    """
    What to do.

    Attributes:
        prefetch: what the hot part is to hold; None: there shall be none.
        platform: of an index, only this image gets a new hot part; None: all of them.
        origin: the source's place without the tag (Reference.identity): where blobs can be shared from.
        replaces: the destination is the very reference that was read: it must not have changed meanwhile.
        jobs: threads that compress; no influence on the result.

    """

    prefetch: PrefetchList | None
    platform: str | None
    origin: str
    replaces: bool = False
    jobs: int = 1


@dataclass(frozen=True, slots=True)
class OptimizedImage:
    """One image. `source_digest`, `digest`: of its lazy manifest before and after; sizes in bytes."""

    platform: str
    source_digest: Digest
    digest: Digest
    hot: HotReport | None
    coverage: Coverage | None
    bootstrap_size: int
    layer_bytes: int


@dataclass(frozen=True, slots=True)
class OptimizeReport:
    """The whole. `digest`: of what the destination's reference names now; `copied_bytes`: of blobs of the source."""

    source_digest: Digest
    digest: Digest
    images: tuple[OptimizedImage, ...]
    copied_bytes: int


class CopyEvents(Protocol):
    """Told of blobs that cannot be shared, as they are copied."""

    def copy_started(self, digest: Digest, size: int) -> None: ...

    def copied(self, digest: Digest, size_bytes: int) -> None: ...

    def copy_done(self, digest: Digest, size: int) -> None: ...


def optimize(
    source: ImageSource, destination: ImageDestination, options: OptimizeOptions, events: CopyEvents
) -> OptimizeReport:
    """
    Give a lazy image, or the lazy images of an index, another hot part. The caller closes both places.

    Raises:
        LazyfsError: of all kinds. The destination's reference names then what it named before.

    """
    return _Optimization(source, destination, options, events).run()


class _Optimization:
    """One run."""

    def __init__(
        self, source: ImageSource, destination: ImageDestination, options: OptimizeOptions, events: CopyEvents
    ) -> None:
        self.source = source
        self.destination = destination
        self.options = options
        self.events = events
        self.stored = StoredBlobs(source)
        self.copied_bytes = 0
        # What an archive does not name anew is not in it any more; a repository or directory keeps its blobs.
        self.has_all = options.origin == destination.identity and not options.origin.startswith("oci-archive:")
        self.here: set[Digest] = set()

    def run(self) -> OptimizeReport:
        root = self.source.root()
        with uninterrupted():
            self.destination.staging_dir    # noqa: B018 - makes it
        if is_index(root.media_type, root.data):
            document, images = self._index(parse_index(root.data, root.media_type))
        else:
            document, image = self._image(select_image(self.source, self.options.platform))
            images = [image]
        if self.options.replaces and self.destination.reader().root().digest != root.digest:
            raise BusyError(f"{self.destination.name} is another image meanwhile, which would be lost",
                            hint="run it again; if a mirror is behind, name the image by its digest, and DST")
        self.destination.commit(document)
        return OptimizeReport(root.digest, document.digest, tuple(images), self.copied_bytes)

    # --- which images ---------------------------------------------------------------------------------------------

    def _index(self, index: Index) -> tuple[Document, list[OptimizedImage]]:
        """All its members, those that stay as they are too."""
        chosen = None if self.options.platform is None else select_image(self.source, self.options.platform).digest
        members: dict[Digest, Document] = {}
        images: list[OptimizedImage] = []
        for member in index.manifests:
            if member.digest in members:
                continue
            document, manifest = self._member(member)
            if is_lazy(manifest) and chosen in (None, member.digest):
                new, image = self._image(document)
                images.append(image)
            else:
                self._share([manifest.config, *manifest.layers])
                new = document
            members[member.digest] = new
            if new is not document or not self.has_all:
                self.destination.put_document(new)
        if not images:
            raise FormatError(f"{self.source.name}: not a lazy image", hint=NOT_LAZY_HINT)
        data = build_index(index, members)
        return Document(data, OCI_INDEX, Digest.of(data)), images

    def _member(self, member: Descriptor) -> tuple[Document, Manifest]:
        document = self.source.document(member.digest)
        if is_index(document.media_type, document.data):
            raise UnsupportedError(f"{self.source.name}: index within an index ({member.digest.short})",
                                   hint="name the inner index by its digest, and a DST")
        return document, parse_manifest(document.data, document.media_type)

    # --- one image ------------------------------------------------------------------------------------------------

    def _image(self, document: Document) -> tuple[Document, OptimizedImage]:
        image = load_lazy_image(self.source, document)
        layers = [self._layer(image, number) for number in range(len(image.lazy.layers))]
        blobs = {blob.digest: blob.size for blob in image.lazy.layers}
        self._share([layer for layer in image.manifest.layers if layer.digest in blobs])
        origin, platform = self._origin(image)
        made, hot, bootstrap = put_tree(origin, layers, image.bootstrap.erofs, self.destination, self._wish(image))
        coverage = None
        if self.options.prefetch is not None:
            digests = [device.digest.text for device in image.bootstrap.devices]
            files = ImageFiles(image.tree, [layer.table for layer in layers], digests)
            coverage = cover(self.options.prefetch, files)
        report = OptimizedImage(platform, document.digest, made.digest, hot, coverage, bootstrap.size,
                                sum(blobs.values()))
        return made, report

    def _origin(self, image: LazyImage) -> tuple[Origin, str]:
        """What the lazy image keeps of its source image, and its platform."""
        lazy, count = image.lazy, len(image.manifest.layers)
        if lazy.config.size > limits.CONFIG_BYTES_MAX:
            raise FormatError(f"{self.source.name}: config of {lazy.config.size} bytes, at most "
                              f"{limits.CONFIG_BYTES_MAX} are allowed")
        config = self.source.read_blob(lazy.config.digest, lazy.config.size)
        parsed = parse_config(config, count)
        own = without_added(config, [blob.source_diff_id for blob in lazy.layers], count - len(lazy.layers))
        manifest = replace(image.manifest, layers=image.manifest.layers[: len(lazy.layers)],
                           annotations=source_annotations(image.manifest))
        platform = Platform(parsed.os, parsed.architecture, parsed.variant)
        return Origin(manifest, lazy.source_digest, own), str(platform)

    def _wish(self, image: LazyImage) -> HotWish | None:
        if self.options.prefetch is None or not image.lazy.layers:
            return None
        encoding = Encoding(*parse_options(image.lazy.layers[0].options))
        return HotWish(self.options.prefetch, encoding, self.options.jobs, self.stored)

    def _layer(self, image: LazyImage, number: int) -> LayerContent:
        """A layer with its own table, which is the bootstrap's. Its entries are not needed: the tree is there."""
        blob, table = image.lazy.layers[number], image.bootstrap.devices[number].table
        index = next(place for place, one in enumerate(image.bootstrap.blobs) if one.digest == blob.digest)
        if (table.rows["blob_index"] != index).any():
            raise FormatError(f"layer {number + 1} has chunks outside its blob {blob.digest.short}",
                              hint="convert the image again")
        rows = table.rows.copy()
        rows["blob_index"] = 0
        return LayerContent(blob, ChunkTable(table.chunk_size, table.device_size, rows), [])

    # --- blobs ----------------------------------------------------------------------------------------------------

    def _share(self, blobs: list[Descriptor]) -> None:
        """See to it that the destination has these blobs."""
        for blob in blobs:
            if not self.has_all and blob.digest not in self.here:
                self.here.add(blob.digest)
                if not (self.destination.mount_blob(blob.digest, blob.size, self.options.origin)
                        or self.destination.has_blob(blob.digest, blob.size)):
                    self._copy(blob)

    def _copy(self, blob: Descriptor) -> None:
        path = self.destination.staging_dir / f"{blob.digest.hex}.copy"
        self.events.copy_started(blob.digest, blob.size)
        sha256, size = hashlib.sha256(), 0
        with (os_errors(str(path.parent)), path.open("xb") as file,
              self.source.open_blob(blob.digest, blob.size) as stream):
            while data := stream.read(limits.MIB):
                file.write(data)
                sha256.update(data)
                size += len(data)
                self.events.copied(blob.digest, len(data))
        found = Digest("sha256:" + sha256.hexdigest())
        if size != blob.size or found != blob.digest:
            path.unlink()
            raise IntegrityError(f"{self.source.name}: blob {blob.digest.short} has {size} bytes and digest "
                                 f"{found.short}, expected {blob.size} bytes", hint="the stored bytes are damaged")
        self.destination.put_blob(path, blob.digest, blob.size)
        self.copied_bytes += size
        self.events.copy_done(blob.digest, blob.size)
