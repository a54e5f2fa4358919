"""
Finds layers that were converted before, so that they need not be read again.

Where it looks, in this order: the lazy images already at the destination, whose manifests say for each blob which
source layer and options it comes from; then the local journal, for blobs that a killed conversion put there or that
another repository of the same registry has. Of a blob that is found only the tail is read, and checked by its digest.
Nothing here makes a conversion fail: what cannot be used is converted again.

Who calls: converter.build. Layer: converter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from converter.ranges import read_range
from lazyfs.errors import IntegrityError, LazyfsError
from lazyfs.image.blob import parse_tail
from lazyfs.image.digest import Digest
from lazyfs.image.manifest import LayerBlob, is_index, parse_index, parse_lazy_manifest, parse_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from converter.journal import Journal
    from lazyfs.image.descriptor import Descriptor, Document
    from lazyfs.image.model import LayerEntry
    from lazyfs.image.table import ChunkTable
    from lazyfs.registry.place import ImageDestination, ImageSource

DOCUMENT_COUNT_MAX = 64      # manifests looked at, members of indexes included
CANDIDATE_COUNT_MAX = 8      # blobs of one layer and options; more than one is odd, and each costs requests


@dataclass(frozen=True, slots=True, eq=False)
class LayerContent:
    """What the bootstrap needs of a layer: its blob, its table (blob_index 0), its entries."""

    blob: LayerBlob
    table: ChunkTable
    entries: list[LayerEntry]


class Reuse:
    """Looks up converted layers of one destination. find() may be called from several threads."""

    def __init__(self, destination: ImageDestination, options: str, journal: Journal, *, look: bool) -> None:
        """`look`: False finds nothing (--no-reuse), but still remembers."""
        self._destination = destination
        self._options = options
        self._journal = journal
        self._look = look
        self._reader = destination.reader()
        self._known = _known_blobs(destination, self._reader, options) if look else {}

    def find(self, layer: Descriptor) -> LayerContent | None:
        """The layer, if its blob is at the destination now (maybe brought there without moving bytes)."""
        if not self._look:
            return None
        for blob in self._known.get(layer.digest, ()):
            content = self._load(blob, ())
            if content is not None:
                return content
        found = self._journal.find(layer.digest, self._options)
        if found is None:
            return None
        blob, places = found
        return self._load(blob, tuple(place for place in places if place != self._destination.identity))

    def remember(self, blob: LayerBlob) -> None:
        """The blob is at the destination."""
        self._journal.add(blob, self._destination.identity)

    def _load(self, blob: LayerBlob, other_places: tuple[str, ...]) -> LayerContent | None:
        destination = self._destination
        try:
            if not destination.has_blob(blob.digest, blob.size) and not any(
                destination.mount_blob(blob.digest, blob.size, place) for place in other_places
            ):
                return None
            table, entries = parse_tail(read_tail(self._reader, blob), blob.size)
        except LazyfsError:
            return None
        return LayerContent(blob, table, entries)


def read_tail(reader: ImageSource, blob: LayerBlob) -> bytes:
    """
    The checked tail of a layer's blob.

    Raises:
        IntegrityError: it has another digest.
        SourceError: it could not be read.

    """

    def check(tail: bytes) -> None:
        if Digest.of(tail) != blob.tail_digest:
            raise IntegrityError(f"the tail of blob {blob.digest.short} is not {blob.tail_digest.short}")

    return read_range(reader, blob.digest, blob.size - blob.tail_size, blob.tail_size, check=check)


def _known_blobs(destination: ImageDestination, reader: ImageSource, options: str) -> dict[Digest, list[LayerBlob]]:
    """Blobs that the destination's lazy images speak of, by source layer."""
    known: dict[Digest, list[LayerBlob]] = {}
    for count, document in enumerate(_manifests(destination, reader), 1):
        try:
            blobs = parse_lazy_manifest(parse_manifest(document.data, document.media_type)).layers
        except LazyfsError:
            blobs = ()
        for blob in blobs:
            others = known.setdefault(blob.source_digest, [])
            if blob.options == options and len(others) < CANDIDATE_COUNT_MAX and blob not in others:
                others.append(blob)
        if count == DOCUMENT_COUNT_MAX:
            break
    return known


def _manifests(destination: ImageDestination, reader: ImageSource) -> Iterator[Document]:
    """Single images, those that indexes name included."""
    for document in destination.documents():
        try:
            if not is_index(document.media_type, document.data):
                yield document
                continue
            members = parse_index(document.data, document.media_type).manifests
        except LazyfsError:
            continue
        for member in members:
            try:
                yield reader.document(member.digest)
            except LazyfsError:
                continue
