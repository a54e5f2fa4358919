"""
What a reference names, as containerd must get it: the documents from index to config, and the labels of each.

Layer: snapshotter. Who calls: snapshotter.pull. The labels are those that containerd's own clients set: garbage
collection follows them from an image's target to everything that belongs to it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from lazyfs import limits
from lazyfs.errors import FormatError
from lazyfs.image.config import check_config_type, parse_config
from lazyfs.image.descriptor import Descriptor
from lazyfs.image.oci import DOCKER_CONFIG, INDEX_TYPES, OCI_CONFIG, Manifest, is_index, parse_index, parse_manifest
from lazyfs.registry.select import select_image
from snapshotter.lazyhook import LABEL_BLOB, LABEL_BOOTSTRAP
from snapshotter.model import LABEL_BYTES_MAX, LABEL_PREFIX, LABEL_REF

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lazyfs.image.descriptor import Document
    from lazyfs.image.digest import Digest
    from lazyfs.registry.place import ByteStream, ImageSource

LAYER_PREFIX: Final = "application/vnd.oci.image.layer."
DOCKER_LAYER_PREFIX: Final = "application/vnd.docker.image.rootfs."
_REFERENCE: Final = "containerd.io/gc.ref.content."
_CRI: Final = LABEL_PREFIX + "cri."


@dataclass(frozen=True, slots=True)
class Blob:
    """Content to be had by containerd, and its labels."""

    descriptor: Descriptor
    labels: Mapping[str, str]
    data: bytes | None = None        # where it was read already


@dataclass(frozen=True, slots=True)
class PullImage:
    """
    An image for one platform. `documents`: what the reference names first, then down to the manifest, then the config.

    `layers` lowest first, with the annotations that CRI adds; `diff_ids` and `chain_ids` likewise.
    """

    documents: tuple[Blob, ...]
    layers: tuple[Descriptor, ...]
    diff_ids: tuple[Digest, ...]
    chain_ids: tuple[str, ...]

    @property
    def target(self) -> Descriptor:
        return self.documents[0].descriptor

    @property
    def config(self) -> Blob:
        return self.documents[-1]

    @property
    def bootstrap(self) -> Descriptor | None:
        """Of a lazy image: the layer that is fetched at once."""
        return next((layer for layer in self.layers if LABEL_BOOTSTRAP in layer.annotations), None)


@dataclass
class _Seen:
    """An ImageSource that keeps the documents it gave, so that none is asked for twice."""

    inner: ImageSource
    first: Document | None = None
    others: dict[Digest, Document] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.inner.name

    def root(self) -> Document:
        if self.first is None:
            self.first = self.inner.root()
            self.others[self.first.digest] = self.first
        return self.first

    def document(self, digest: Digest) -> Document:
        if digest not in self.others:
            self.others[digest] = self.inner.document(digest)
        return self.others[digest]

    def open_blob(self, digest: Digest, size: int) -> ByteStream:
        return self.inner.open_blob(digest, size)

    def read_blob(self, digest: Digest, size: int) -> bytes:
        return self.inner.read_blob(digest, size)

    def read_range(self, digest: Digest, offset: int, size: int, deadline: float) -> ByteStream:
        return self.inner.read_range(digest, offset, size, deadline)

    def close(self) -> None:
        self.inner.close()


def resolve(source: ImageSource, platform: str | None, name: str, snapshotter: str) -> PullImage:
    """
    Read an image's documents from its registry.

    Args:
        source: the registry, at the reference.
        platform: `os/architecture[/variant]`; None: this machine's.
        name: what containerd will call the image.
        snapshotter: it will be unpacked with this one.

    Raises:
        NotFoundError, AuthError, SourceError: not to be had. FormatError: no image that can be run.

    """
    seen = _Seen(source)
    document = select_image(seen, platform)
    manifest = parse_manifest(document.data, document.media_type)
    check_config_type(manifest)
    if not 0 < manifest.config.size <= limits.CONFIG_BYTES_MAX:
        raise FormatError(f"{name}: config of {manifest.config.size} bytes")
    config = seen.read_blob(manifest.config.digest, manifest.config.size)
    diff_ids = parse_config(config, len(manifest.layers)).diff_ids
    if not diff_ids:
        raise FormatError(f"{name}: an image without layers", hint="containerd cannot unpack it")
    chain_ids = tuple(chain(diff_ids))
    path = _path(seen, seen.root(), document.digest)
    documents = [Blob(Descriptor(one.media_type, one.digest, len(one.data)), _children_labels(one), one.data)
                 for one in path]
    snapshot = {f"containerd.io/gc.ref.snapshot.{snapshotter}": chain_ids[-1]}
    documents.append(Blob(manifest.config, snapshot, config))
    layers = tuple(_with_info(manifest, place, name, document.digest) for place in range(len(manifest.layers)))
    return PullImage(tuple(documents), layers, diff_ids, chain_ids)


def chain(diff_ids: Iterable[Digest]) -> Iterable[str]:
    """Names of a stack of layers, lowest first (OCI image-spec v1.1 config.md, "Layer ChainID")."""
    above = ""
    for diff_id in diff_ids:
        both = f"{above} {diff_id}".encode()
        above = f"sha256:{hashlib.sha256(both).hexdigest()}" if above else diff_id.text
        yield above


def snapshot_labels(layer: Descriptor, chain_id: str) -> dict[str, str]:
    """Labels for the snapshot of a layer: what of its annotations is meant for snapshotters, and what it is for."""
    labels = {key: value for key, value in layer.annotations.items()
              if key.startswith(LABEL_PREFIX) and len((key + value).encode()) <= LABEL_BYTES_MAX}
    return {**labels, LABEL_REF: chain_id}


def is_lazy_blob(layer: Descriptor) -> bool:
    """Whether the layer's data stays in the registry."""
    return LABEL_BLOB in layer.annotations


def _path(source: ImageSource, document: Document, wanted: Digest) -> list[Document]:
    """From a document down to the one wanted; select_image has come down this way, so all of them are at hand."""
    if document.digest == wanted:
        return [document]
    if is_index(document.media_type, document.data):
        for member in parse_index(document.data, document.media_type).manifests:
            if member.digest == wanted or member.media_type in INDEX_TYPES:
                below = _path(source, source.document(member.digest), wanted)
                if below:
                    return [document, *below]
    return []


def _children_labels(document: Document) -> dict[str, str]:
    if is_index(document.media_type, document.data):
        children: Iterable[Descriptor] = parse_index(document.data, document.media_type).manifests
    else:
        manifest = parse_manifest(document.data, document.media_type)
        children = [manifest.config, *manifest.layers]
    labels: dict[str, str] = {}
    counts: dict[str, int] = {}
    for child in children:
        key = _REFERENCE + _kind(child.media_type)
        count = counts[key] = counts.get(key, -1) + 1
        labels[f"{key}{count}" if count or key.endswith(".") else key] = child.digest.text
    return labels


def _kind(media_type: str) -> str:
    if media_type in (OCI_CONFIG, DOCKER_CONFIG):
        return "config"
    if media_type.endswith(("image.manifest.v1+json", "distribution.manifest.v2+json")):
        return "m."
    return "l." if media_type.startswith((LAYER_PREFIX, DOCKER_LAYER_PREFIX)) else ""


def _with_info(manifest: Manifest, place: int, name: str, digest: Digest) -> Descriptor:
    """The layer with the annotations that CRI's pull adds: they become labels of its snapshot."""
    layer = manifest.layers[place]
    key = _CRI + "image-layers"
    room = LABEL_BYTES_MAX - len(key)
    digests = [above.digest.text for above in manifest.layers[place:]]
    info = {_CRI + "image-ref": name, _CRI + "layer-digest": layer.digest.text, _CRI + "manifest-digest": digest.text,
            key: ",".join(digests[:(room + 1) // (len(layer.digest.text) + 1)])}
    return Descriptor(layer.media_type, layer.digest, layer.size, {**layer.annotations, **info}, layer.platform)
