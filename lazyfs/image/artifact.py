"""
A prefetch list as an OCI artifact: a manifest that refers to the lazy image that the list is for.

    manifest   artifactType and the one layer's media type PREFETCH_TYPE, subject the lazy image's manifest
    listing    what refers to an image: an index, from the registry's referrers API or under the tag sha256-<hex>

Sources: OCI image-spec v1.1 manifest.md ("Guidelines for Artifact Usage"), distribution-spec v1.1 "Referrers Tag
Schema". Everything here comes from whoever may push to the repository: bounded, checked, FormatError.

Layer: lazyfs.image, no I/O. Who calls: lazyfs.registry.referrers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec

from lazyfs import __version__, limits
from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.image.descriptor import Descriptor, Document
from lazyfs.image.digest import Digest
from lazyfs.image.oci import OCI_INDEX, OCI_MANIFEST, JsonDescriptor, decode_json, encode_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PREFETCH_TYPE = "application/vnd.lazyfs.prefetch.v1+text"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"      # manifest.md: the config of what has none
EMPTY = b"{}"
CREATED_KEY = "org.opencontainers.image.created"
TOOL_KEY = "containerd.io/snapshot/lazyfs.tool"       # as in a lazy image's manifest
ARTIFACT_LIST_BYTES_MAX = 8 * limits.MIB    # read before a start; a recorded one takes some hundred KiB
REFERRER_COUNT_MAX = 4096                   # in all pages: signatures and reports of years
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"          # RFC 3339, in UTC
_TAG = re.compile(r"sha256-[0-9a-f]{64}(\.(sig|att|sbom))?")   # also cosign's
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


@dataclass(frozen=True, slots=True)
class Referrer:
    """An artifact that refers to an image. `created`: RFC 3339, UTC, so that texts compare like times; or ""."""

    digest: Digest
    size: int
    created: str


class _JsonReferrers(msgspec.Struct, rename="camel"):
    schema_version: int
    manifests: list[msgspec.Raw]


class _JsonReferrer(msgspec.Struct, rename="camel"):
    media_type: str
    digest: str
    size: Annotated[int, msgspec.Meta(ge=0, le=limits.MANIFEST_BYTES_MAX)]
    artifact_type: str = ""
    annotations: dict[str, str] | None = None


class _JsonKind(msgspec.Struct, rename="camel"):
    artifact_type: str = ""


class _JsonArtifact(msgspec.Struct, rename="camel"):
    schema_version: int
    layers: list[JsonDescriptor]
    media_type: str = ""
    artifact_type: str = ""
    subject: JsonDescriptor | None = None


def referrers_tag(subject: Digest) -> str:
    """The tag under which a place without referrers API lists what refers to a manifest."""
    return f"sha256-{subject.hex}"


def is_referrers_tag(tag: str) -> bool:
    """Whether a tag names no image but what refers to one."""
    return _TAG.fullmatch(tag) is not None


def build_artifact(subject: Document, text: bytes, created: str) -> Document:
    """
    The manifest of a list.

    Args:
        subject: the lazy image's manifest.
        text: the list.
        created: when, as 2026-01-31T12:00:00Z: of several lists the last one counts.

    Raises:
        UnsupportedError: the list is too large to be looked at before a start.

    """
    if len(text) > ARTIFACT_LIST_BYTES_MAX:
        raise UnsupportedError(f"prefetch list of {len(text)} bytes: at most {ARTIFACT_LIST_BYTES_MAX} can go beside "
                               f"an image", hint="use it with 'lazyfs optimize', or leave rare lines out: "
                               "'lazyfs profile merge --min-share'")
    data = encode_json({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": PREFETCH_TYPE,
        "config": JsonDescriptor(EMPTY_TYPE, Digest.of(EMPTY).text, len(EMPTY)),
        "layers": [JsonDescriptor(PREFETCH_TYPE, Digest.of(text).text, len(text))],
        "subject": JsonDescriptor(subject.media_type, subject.digest.text, len(subject.data)),
        "annotations": _annotations(created),
    })
    return Document(data, OCI_MANIFEST, Digest.of(data))


def parse_artifact(document: Document, subject: Digest) -> Descriptor:
    """
    The list that an artifact's manifest names.

    Raises:
        FormatError: not a list's manifest, one for another image, or of an impossible size.

    """
    raw = decode_json(document.data, _JsonArtifact, "artifact")
    if raw.artifact_type != PREFETCH_TYPE or raw.schema_version != 2 or len(raw.layers) != 1:
        raise FormatError(f"artifact {document.digest.short} is no prefetch list of a kind that this lazyfs reads")
    if raw.subject is None or Digest(raw.subject.digest) != subject:
        raise FormatError(f"artifact {document.digest.short} does not refer to {subject.short}")
    layer = raw.layers[0]
    if layer.media_type != PREFETCH_TYPE or layer.size > ARTIFACT_LIST_BYTES_MAX:
        raise FormatError(f"artifact {document.digest.short} holds {layer.size} bytes of {layer.media_type!r}: "
                          f"expected at most {ARTIFACT_LIST_BYTES_MAX} of {PREFETCH_TYPE}")
    return Descriptor(layer.media_type, Digest(layer.digest), layer.size)


def parse_referrers(pages: Iterable[bytes], artifact_type: str) -> list[Referrer]:
    """
    The artifacts of one type that a listing names, the newest first.

    Args:
        pages: indexes, as JSON.
        artifact_type: which ones; others are looked at no further.

    Raises:
        FormatError: a page is no index, or there are too many.

    """
    found: dict[Digest, Referrer] = {}
    count = 0
    for page in pages:
        for entry in _entries(page):
            count += 1
            if count > REFERRER_COUNT_MAX:
                raise FormatError(f"more than {REFERRER_COUNT_MAX} artifacts refer to one image")
            if _artifact_type(entry) == artifact_type:
                raw = decode_json(bytes(entry), _JsonReferrer, "referrers")
                created = (raw.annotations or {}).get(CREATED_KEY, "")
                digest = Digest(raw.digest)
                found[digest] = Referrer(digest, raw.size, created if _TIME.fullmatch(created) else "")
    return sorted(found.values(), key=lambda one: (one.created, one.digest), reverse=True)


def add_referrer(listing: bytes | None, artifact: Document, created: str) -> Document:
    """
    A listing that names one list, instead of those it named before; all others stay, as they are.

    Args:
        listing: the index so far; None: there is none.
        artifact: from build_artifact().
        created: as there.

    Raises:
        FormatError: what is there is no index.

    """
    kept: list[object] = [] if listing is None else [
        entry for entry in _entries(listing) if _artifact_type(entry) != PREFETCH_TYPE]
    own = {"mediaType": artifact.media_type, "digest": artifact.digest.text, "size": len(artifact.data),
           "artifactType": PREFETCH_TYPE, "annotations": _annotations(created)}
    data = encode_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [*kept, own]})
    return Document(data, OCI_INDEX, Digest.of(data))


def _annotations(created: str) -> Mapping[str, str]:
    return {TOOL_KEY: f"lazyfs {__version__}", CREATED_KEY: created}


def _entries(listing: bytes) -> list[msgspec.Raw]:
    entries = decode_json(listing, _JsonReferrers, "referrers").manifests
    if len(entries) > REFERRER_COUNT_MAX:
        raise FormatError(f"more than {REFERRER_COUNT_MAX} artifacts refer to one image")
    return entries


def _artifact_type(entry: msgspec.Raw) -> str:
    return decode_json(bytes(entry), _JsonKind, "referrers").artifact_type
