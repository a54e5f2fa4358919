"""
The lazy image as an OCI image: its manifest, its annotations, and what it keeps of the source image.

    layers of a lazy manifest = one blob a source layer, lowest first | the hot blob, if there is one | the bootstrap

Blob layers have a media type of their own below `application/vnd.oci.image.layer.` (containerd must see layers);
everything a reader needs about them is in annotations that begin `containerd.io/snapshot/`, for those reach a
snapshotter as labels. docs/format.md lists them. Config and history: lazyfs.image.config.

Layer: lazyfs.image, no I/O. Who calls: converter (build, and parse to reuse layers), every mount, inspect, check.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazyfs import __version__, limits
from lazyfs.errors import BugError, FormatError, UnsupportedError
from lazyfs.image.blob import BLOB_VERSION, FOOTER_BYTES, TAIL_BYTES_MAX
from lazyfs.image.bootstrap import BOOTSTRAP_VERSION
from lazyfs.image.codec import LEVEL_RANGES, Codec
from lazyfs.image.config import build_config, check_config_type, parse_config
from lazyfs.image.descriptor import Descriptor
from lazyfs.image.digest import Digest
from lazyfs.image.oci import (
    LAYER_TYPES,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Index,
    Manifest,
    encode_json,
    is_index,
    parse_index,
    parse_manifest,
    to_json,
)
from lazyfs.image.table import check_chunk_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lazyfs.image.descriptor import Document

LAZY_VERSION = 1
BLOB_TYPE = "application/vnd.oci.image.layer.lazyfs.blob.v1"
BOOTSTRAP_TYPE = "application/vnd.oci.image.layer.v1.tar+zstd"
PREFIX = "containerd.io/snapshot/lazyfs."
VERSION_KEY = PREFIX + "version"              # every layer, and the manifest: "1"
BLOB_KEY = PREFIX + "blob"                    # blob layers: "layer" or "hot"
SOURCE_KEY = PREFIX + "source"                # layer blob: digest of the source layer; manifest: of the source manifest
DIFF_ID_KEY = PREFIX + "source.diff-id"       # layer blob: sha256 of the source layer's uncompressed tar
# Bump it whenever the same layer gives another blob: what is read out of an archive, or how it is laid out. Blobs that
# were made by other rules are then not reused.
LAYER_RULES = 2
OPTIONS_KEY = PREFIX + "options"              # layer blob: options_key()
TAIL_DIGEST_KEY = PREFIX + "tail.digest"      # layer blob: sha256 of metadata, table and footer
TAIL_SIZE_KEY = PREFIX + "tail.size"
BOOTSTRAP_KEY = PREFIX + "bootstrap"          # bootstrap layer: "1", its own version
BOOTSTRAP_SIZE_KEY = PREFIX + "bootstrap.size"    # bytes of the uncompressed tar
TOOL_KEY = PREFIX + "tool"                    # manifest: what made it
NOT_LAZY_HINT = "run 'lazyfs convert SRC DST' first and use DST"
_OPTIONS = re.compile(r"v[0-9.]{1,20},(?P<codec>[a-z0-9]{1,20}),(?P<level>[0-9]{1,3}),(?P<chunk_size>[0-9]{1,9})")
_VERSION_HINT = "convert the image again, or use a newer lazyfs"

__all__ = [
    "BLOB_TYPE", "BOOTSTRAP_TYPE", "LAZY_VERSION", "NOT_LAZY_HINT", "OCI_CONFIG", "OCI_INDEX", "OCI_MANIFEST",
    "Index", "LayerBlob", "LazyBootstrap", "LazyManifest", "Manifest", "build_index", "build_lazy_manifest",
    "check_source", "is_index", "is_lazy", "options_key", "parse_index", "parse_lazy_manifest", "parse_manifest",
    "parse_options", "source_annotations",
]


@dataclass(frozen=True, slots=True)
class LayerBlob:
    """The blob of one source layer, as the manifest tells. Sizes in bytes; the tail is its last `tail_size`."""

    digest: Digest
    size: int
    source_digest: Digest
    source_diff_id: Digest
    options: str
    tail_digest: Digest
    tail_size: int


@dataclass(frozen=True, slots=True)
class HotBlob:
    digest: Digest
    size: int


@dataclass(frozen=True, slots=True)
class LazyBootstrap:
    """The bootstrap layer: `digest`, `size` of the stored zstd frame, `raw_size` of the tar in it."""

    digest: Digest
    size: int
    raw_size: int


@dataclass(frozen=True, slots=True)
class LazyParts:
    """What a lazy image is made of. `layers`: one a source layer, lowest first."""

    layers: tuple[LayerBlob, ...]
    hot: HotBlob | None
    bootstrap: LazyBootstrap


@dataclass(frozen=True, slots=True)
class LazyManifest:
    """A lazy image's manifest, read. `source_digest`: of the source image's manifest."""

    config: Descriptor
    layers: tuple[LayerBlob, ...]
    hot: HotBlob | None
    bootstrap: LazyBootstrap
    source_digest: Digest
    tool: str
    annotations: Mapping[str, str]


def options_key(codec: Codec, level: int, chunk_size: int) -> str:
    """All that changes a layer blob's bytes besides the layer: equal key and layer, equal blob."""
    check_chunk_size(chunk_size)
    return f"v{BLOB_VERSION}.{LAYER_RULES},{codec.name.lower()},{level},{chunk_size}"


def parse_options(key: str) -> tuple[Codec, int, int]:
    """
    Codec, level and chunk size out of an options_key() of any version.

    Raises:
        FormatError: it is none.

    """
    found = _OPTIONS.fullmatch(key)
    if found is None or found["codec"].upper() not in Codec.__members__:
        raise FormatError(f"a blob was made with options {key[:100]!r}, which this lazyfs does not know",
                          hint="convert the image again")
    codec, level, chunk_size = Codec[found["codec"].upper()], int(found["level"]), int(found["chunk_size"])
    low, high = LEVEL_RANGES.get(codec, (1, 0))     # zero: no codec of an image
    if not low <= level <= high:
        raise FormatError(f"a blob was made with level {level} of {found['codec']}, which there is not",
                          hint="convert the image again")
    check_chunk_size(chunk_size)
    return codec, level, chunk_size


def is_lazy(manifest: Manifest) -> bool:
    """Whether this is a lazy image, of whatever version."""
    return bool(manifest.layers) and BOOTSTRAP_KEY in manifest.layers[-1].annotations


def check_source(manifest: Manifest) -> None:
    """
    Whether an image can be converted: a container image whose layers are there and readable.

    Raises:
        UnsupportedError: no container image, or a layer of another kind. A layer's `urls` are never followed.
        FormatError: it is a lazy image already.

    """
    if is_lazy(manifest):
        raise FormatError("the source is a lazy image already", hint="name the image that it was made of")
    check_config_type(manifest)
    if len(manifest.layers) > limits.DEVICE_COUNT_MAX:
        raise UnsupportedError(f"image of {len(manifest.layers)} layers: at most {limits.DEVICE_COUNT_MAX} can be used")
    for number, layer in enumerate(manifest.layers, 1):
        if "nondistributable" in layer.media_type or ".foreign." in layer.media_type:
            raise UnsupportedError(
                f"layer {number} ({layer.digest.short}) is not distributable: it lies outside the registry",
                hint="rebuild the image on a base whose layers are all in the registry",
            )
        if layer.media_type not in LAYER_TYPES:
            raise UnsupportedError(
                f"layer {number} ({layer.digest.short}) has media type {layer.media_type!r}: expected a tar, "
                "plain or compressed by gzip or zstd",
                hint="only container images can be converted; build this one with such layers",
            )


def build_lazy_manifest(
    source: Manifest, source_digest: Digest, config: bytes, parts: LazyParts, *, bootstrap_diff_id: Digest
) -> tuple[bytes, bytes]:
    """
    The manifest and config of a lazy image, as bytes. Deterministic.

    Args:
        source: the source image's manifest.
        source_digest: that manifest's digest.
        config: the source image's config, as it is.
        parts: what was made; as many layers as `source` has.
        bootstrap_diff_id: sha256 of the uncompressed bootstrap tar.

    Raises:
        FormatError: the source's config is malformed or does not fit its layers.

    """
    if len(parts.layers) != len(source.layers):
        raise BugError(f"{len(parts.layers)} blobs for {len(source.layers)} source layers")
    added = [(parts.bootstrap.digest, bootstrap_diff_id, "lazyfs: bootstrap")]
    if parts.hot is not None:
        added.insert(0, (parts.hot.digest, parts.hot.digest, "lazyfs: hot blob"))
    diff_ids = [blob.digest for blob in parts.layers] + [diff_id for _, diff_id, _ in added]
    new_config = build_config(config, len(source.layers), diff_ids, [comment for _, _, comment in added])
    layers = [*map(_layer_descriptor, parts.layers), *_added_descriptors(parts)]
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": to_json(Descriptor(OCI_CONFIG, Digest.of(new_config), len(new_config), source.config.annotations)),
        "layers": [to_json(layer) for layer in layers],
        "annotations": dict(
            sorted(
                {
                    **source.annotations,
                    VERSION_KEY: str(LAZY_VERSION),
                    SOURCE_KEY: source_digest.text,
                    TOOL_KEY: f"lazyfs {__version__}",
                }.items()
            )
        ),
    }
    return encode_json(manifest), new_config


def parse_lazy_manifest(manifest: Manifest, name: str = "") -> LazyManifest:
    """
    What a manifest says about the lazy image; `name`: the image's, for messages.

    Raises:
        UnsupportedError: a lazy image of another version.
        FormatError: not a lazy image (its hint says what to do), or a damaged one.

    """
    if not is_lazy(manifest):
        raise FormatError(f"{name}: not a lazy image".removeprefix(": "), hint=NOT_LAZY_HINT)
    for place in (manifest.annotations, *(layer.annotations for layer in manifest.layers)):
        if place.get(VERSION_KEY) != str(LAZY_VERSION):
            raise UnsupportedError(
                f"lazy image of version {place.get(VERSION_KEY, 'unknown')[:40]}: this lazyfs reads {LAZY_VERSION}",
                hint=_VERSION_HINT,
            )
    *blobs, last = manifest.layers
    hot = None
    if blobs and blobs[-1].annotations.get(BLOB_KEY) == "hot":
        hot = HotBlob(blobs[-1].digest, blobs[-1].size)
        _expect(blobs.pop(), BLOB_TYPE)
    if len(blobs) > limits.DEVICE_COUNT_MAX:
        raise FormatError(f"lazy image of {len(blobs)} layers, at most {limits.DEVICE_COUNT_MAX} are allowed")
    return LazyManifest(
        manifest.config, tuple(map(_parse_layer, blobs)), hot, _parse_bootstrap(last),
        Digest(_annotation(manifest.annotations, SOURCE_KEY)), manifest.annotations.get(TOOL_KEY, ""),
        manifest.annotations,
    )


def source_annotations(manifest: Manifest) -> dict[str, str]:
    """The annotations that a lazy image's manifest has of its source's: all but those that make it lazy."""
    own = (VERSION_KEY, SOURCE_KEY, TOOL_KEY)
    return {key: value for key, value in manifest.annotations.items() if key not in own}


def build_index(source: Index, members: Mapping[Digest, Document]) -> bytes:
    """
    An index in which each manifest of `source` that `members` names (by source digest) is replaced.

    Order, platforms and annotations are kept; manifests that `members` does not name are left out.
    """
    manifests = [
        Descriptor(
            members[old.digest].media_type, members[old.digest].digest, len(members[old.digest].data),
            old.annotations, old.platform,
        )
        for old in source.manifests
        if old.digest in members
    ]
    index: dict[str, object] = {
        "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [to_json(member) for member in manifests],
    }
    if source.annotations:
        index["annotations"] = dict(sorted(source.annotations.items()))
    return encode_json(index)


def source_diff_ids(config: bytes, layer_count: int) -> tuple[Digest, ...]:
    """The source layers' diff_ids, lowest first. Raises FormatError, also if they are not `layer_count`."""
    return parse_config(config, layer_count).diff_ids


def _layer_descriptor(blob: LayerBlob) -> Descriptor:
    return Descriptor(
        BLOB_TYPE, blob.digest, blob.size,
        {
            VERSION_KEY: str(LAZY_VERSION),
            BLOB_KEY: "layer",
            SOURCE_KEY: blob.source_digest.text,
            DIFF_ID_KEY: blob.source_diff_id.text,
            OPTIONS_KEY: blob.options,
            TAIL_DIGEST_KEY: blob.tail_digest.text,
            TAIL_SIZE_KEY: str(blob.tail_size),
        },
    )


def _added_descriptors(parts: LazyParts) -> list[Descriptor]:
    version = {VERSION_KEY: str(LAZY_VERSION)}
    bootstrap = parts.bootstrap
    annotations = {**version, BOOTSTRAP_KEY: str(BOOTSTRAP_VERSION), BOOTSTRAP_SIZE_KEY: str(bootstrap.raw_size)}
    added = [Descriptor(BOOTSTRAP_TYPE, bootstrap.digest, bootstrap.size, annotations)]
    if parts.hot is not None:
        added.insert(0, Descriptor(BLOB_TYPE, parts.hot.digest, parts.hot.size, {**version, BLOB_KEY: "hot"}))
    return added


def _parse_layer(layer: Descriptor) -> LayerBlob:
    _expect(layer, BLOB_TYPE)
    notes = layer.annotations
    if notes.get(BLOB_KEY) != "layer":
        raise FormatError(f"lazy image: {layer.digest.short} is neither a layer's blob nor the last, hot one")
    tail_size = _number(notes, TAIL_SIZE_KEY)
    if not FOOTER_BYTES < tail_size <= min(layer.size, TAIL_BYTES_MAX):
        raise FormatError(f"lazy image: blob {layer.digest.short} states a tail of {tail_size} bytes")
    return LayerBlob(
        layer.digest, layer.size, Digest(_annotation(notes, SOURCE_KEY)), Digest(_annotation(notes, DIFF_ID_KEY)),
        _annotation(notes, OPTIONS_KEY), Digest(_annotation(notes, TAIL_DIGEST_KEY)), tail_size,
    )


def _parse_bootstrap(layer: Descriptor) -> LazyBootstrap:
    _expect(layer, BOOTSTRAP_TYPE)
    if layer.annotations.get(BOOTSTRAP_KEY) != str(BOOTSTRAP_VERSION):
        raise UnsupportedError("the bootstrap has a version that this lazyfs does not know", hint=_VERSION_HINT)
    raw_size = _number(layer.annotations, BOOTSTRAP_SIZE_KEY)
    if not 0 < raw_size <= limits.BOOTSTRAP_BYTES_MAX or not 0 < layer.size <= limits.BOOTSTRAP_BYTES_MAX:
        raise FormatError(f"lazy image: bootstrap of {layer.size} bytes states {raw_size} bytes uncompressed")
    return LazyBootstrap(layer.digest, layer.size, raw_size)


def _expect(layer: Descriptor, media_type: str) -> None:
    if layer.media_type != media_type:
        raise FormatError(f"lazy image: {layer.digest.short} has media type {layer.media_type!r}, not {media_type}")


def _annotation(notes: Mapping[str, str], key: str) -> str:
    if key not in notes:
        raise FormatError(f"lazy image: annotation {key} is missing")
    return notes[key]


def _number(notes: Mapping[str, str], key: str) -> int:
    text = _annotation(notes, key)
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise FormatError(f"lazy image: annotation {key} is {text[:40]!r}, expected a number")
    return int(text)
