"""
Manifests and indexes of OCI and Docker, from bytes to types: bounded, strict in what they use, tolerant of the rest.

Sources: OCI image-spec v1.1 manifest.md, image-index.md, descriptor.md; Docker "Image Manifest Version 2, Schema 2".
A document that could be read as two kinds (GHSA-5j5w-g665-5m35) is refused.

Layer: lazyfs.image, no I/O. Who calls: lazyfs.image.manifest, lazyfs.registry, converter, cli.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec

from lazyfs import limits, shapes
from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.image.descriptor import Descriptor
from lazyfs.image.digest import Digest

if TYPE_CHECKING:
    from collections.abc import Mapping

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
LAYER_TYPES = {
    "application/vnd.oci.image.layer.v1.tar": "none",
    "application/vnd.oci.image.layer.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.diff.tar": "none",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd": "zstd",
}
"""Layer media types that can be read, and how they are compressed."""
_MANIFEST_TYPES = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEX_TYPES = (OCI_INDEX, DOCKER_INDEX)
_SCHEMA1_PREFIX = "application/vnd.docker.distribution.manifest.v1+"
_SIZE_MAX = (1 << 63) - 1

_Size = Annotated[int, msgspec.Meta(ge=0, le=_SIZE_MAX)]
_Text = Annotated[str, msgspec.Meta(max_length=255)]
_T = TypeVar("_T")


class JsonDescriptor(msgspec.Struct, rename="camel", omit_defaults=True):
    media_type: _Text
    digest: str
    size: _Size
    platform: dict[str, Any] | None = None
    annotations: dict[str, str] | None = None


class _JsonManifest(msgspec.Struct, rename="camel"):
    schema_version: int
    config: JsonDescriptor
    layers: list[JsonDescriptor]
    media_type: str = ""
    artifact_type: str = ""
    annotations: dict[str, str] | None = None


class _JsonIndex(msgspec.Struct, rename="camel"):
    schema_version: int
    manifests: list[JsonDescriptor]
    media_type: str = ""
    annotations: dict[str, str] | None = None


class _JsonKind(msgspec.Struct, rename="camel"):
    """Only what tells the kind of a document; the rest is skipped unread."""

    schema_version: int = 2
    media_type: str = ""
    layers: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    manifests: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True, slots=True)
class Manifest:
    """An image for one platform. `media_type` is the document's own kind, OCI or Docker."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str = ""


@dataclass(frozen=True, slots=True)
class Index:
    """Images for several platforms (and documents about them)."""

    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)


def is_index(media_type: str, data: bytes) -> bool:
    """
    Whether a document is an index (Docker: manifest list); False: it is a manifest.

    Args:
        media_type: what the place said it is; may be empty or something general like `application/json`.
        data: the document.

    Raises:
        UnsupportedError: a kind that lazyfs does not know (schema 1, for example).
        FormatError: it could be both, or what it says about itself differs from what the place said.

    """
    kind = decode_json(data, _JsonKind, "manifest")
    types = {kind.media_type, media_type.partition(";")[0].strip()}
    if kind.schema_version == 1 or any(name.startswith(_SCHEMA1_PREFIX) for name in types):
        raise UnsupportedError(
            "Docker manifest schema 1 is not supported",
            hint="pull and push the image with a current tool (skopeo copy --format oci); it is then schema 2 or OCI",
        )
    known = types & {*_MANIFEST_TYPES, *INDEX_TYPES}
    has_layers, has_manifests = kind.layers is not msgspec.UNSET, kind.manifests is not msgspec.UNSET
    if len(known) > 1 or (has_layers and has_manifests):
        raise FormatError("manifest is ambiguous: it could be read as an image and as an index")
    if kind.media_type and not known & {kind.media_type}:
        raise UnsupportedError(f"document of media type {kind.media_type[:200]!r}: expected an OCI or Docker image")
    if has_layers == has_manifests or (known and bool(known & set(INDEX_TYPES)) != has_manifests):
        raise FormatError("manifest holds neither layers nor manifests, or not those of its media type")
    return has_manifests


def parse_manifest(data: bytes, media_type: str) -> Manifest:
    """
    Read a manifest.

    Raises:
        UnsupportedError: a kind or version that lazyfs does not know.
        FormatError: anything else that is off.

    """
    if is_index(media_type, data):
        raise FormatError("found an index (several platforms) where one image's manifest was expected")
    raw = decode_json(data, _JsonManifest, "manifest")
    _check_version(raw.schema_version)
    if len(raw.layers) > limits.DEVICE_COUNT_MAX * 2 + 2:
        raise FormatError(f"manifest names {len(raw.layers)} layers, at most {limits.DEVICE_COUNT_MAX} are allowed")
    return Manifest(
        raw.media_type or media_type or OCI_MANIFEST,
        _descriptor(raw.config), tuple(map(_descriptor, raw.layers)), raw.annotations or {}, raw.artifact_type,
    )


def parse_index(data: bytes, media_type: str) -> Index:
    """
    Read an index (Docker: manifest list).

    Raises:
        FormatError: not an index, or anything in it is off.

    """
    if not is_index(media_type, data):
        raise FormatError("found one image's manifest where an index was expected")
    raw = decode_json(data, _JsonIndex, "index")
    _check_version(raw.schema_version)
    if len(raw.manifests) > limits.INDEX_MANIFEST_COUNT_MAX:
        raise FormatError(
            f"index names {len(raw.manifests)} manifests, at most {limits.INDEX_MANIFEST_COUNT_MAX} are allowed"
        )
    manifests = tuple(map(_descriptor, raw.manifests))
    return Index(raw.media_type or media_type or OCI_INDEX, manifests, raw.annotations or {})


def decode_json(data: bytes, type_: type[_T], what: str, size_max: int = limits.MANIFEST_BYTES_MAX) -> _T:
    """Bounded JSON of a stated shape. Raises FormatError."""
    if len(data) > size_max:
        raise FormatError(f"{what} of {len(data)} bytes, at most {size_max} are allowed")
    try:
        data.decode("utf-8")     # parts that are kept raw would otherwise pass unchecked
        return shapes.from_json(data, type_)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FormatError(f"{what} is malformed: {str(error)[:300]}") from error


def encode_json(value: object) -> bytes:
    """JSON in one line; the order of keys is that of the structures, so equal values give equal bytes."""
    return msgspec.json.encode(value)


def to_json(descriptor: Descriptor) -> JsonDescriptor:
    return JsonDescriptor(
        descriptor.media_type, descriptor.digest.text, descriptor.size,
        dict(descriptor.platform) if descriptor.platform is not None else None,
        dict(descriptor.annotations) or None,
    )


def _descriptor(raw: JsonDescriptor) -> Descriptor:
    return Descriptor(raw.media_type, Digest(raw.digest), raw.size, raw.annotations or {}, raw.platform)


def _check_version(version: int) -> None:
    if version != 2:
        raise UnsupportedError(f"manifest schemaVersion {version}: expected 2")
