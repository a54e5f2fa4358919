"""
Manifests and indexes as documents: exact bytes, checked digest, known media type.

Layer: registry, no I/O. Only what transports need is decoded here (`mediaType`); meaning is lazyfs.image's business.
OCI image-spec v1.1 manifest.md, image-index.md; Docker image manifest v2 schema 2. A document whose Content-Type and
mediaType disagree is refused: tools that believe the one or the other would see different images (CVE-2021-41190).
"""

from __future__ import annotations

import msgspec

from lazyfs import shapes
from lazyfs.errors import FormatError, IntegrityError, UnsupportedError
from lazyfs.image.digest import Digest
from lazyfs.limits import MANIFEST_BYTES_MAX
from lazyfs.registry.place import Document

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
KNOWN_TYPES = (OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST)
ACCEPT = ", ".join(KNOWN_TYPES)
_VAGUE_TYPES = {"", "application/json", "application/octet-stream", "text/plain"}


class _Head(msgspec.Struct):
    """The fields that tell the kinds apart."""

    mediaType: str | None = None  # noqa: N815 - the document's key
    schemaVersion: int | None = None  # noqa: N815 - the document's key
    config: object = None
    manifests: object = None


def make_document(data: bytes, content_type: str, expected: Digest | None, where: str) -> Document:
    """
    Check a manifest's or index's bytes.

    `content_type` is what its carrier calls it, maybe nothing; `expected` the digest by which it was asked for.

    Raises:
        IntegrityError: other bytes. UnsupportedError: another kind of document. FormatError: no JSON document.

    """
    if len(data) > MANIFEST_BYTES_MAX:
        raise FormatError(f"{where}: a manifest larger than {MANIFEST_BYTES_MAX} bytes")
    digest = Digest.of(data)
    if expected is not None and digest != expected:
        raise IntegrityError(f"{where}: digest {digest.short}, expected {expected.short}",
                             hint="the registry or something on the way to it changed the bytes")
    try:
        head = shapes.from_json(data, _Head)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{where}: not a JSON manifest") from error
    return Document(data, _kind(head, content_type.partition(";")[0].strip().lower(), where), digest)


def _kind(head: _Head, content_type: str, where: str) -> str:
    said = head.mediaType or ""
    carried = "" if content_type in _VAGUE_TYPES else content_type
    if said and carried and said != carried:
        raise FormatError(f"{where}: sent as {carried[:100]!r}, but calls itself {said[:100]!r}")
    kind = said or carried
    if not kind and head.schemaVersion == 2:  # OCI 1.0 documents need not say what they are
        kind = OCI_INDEX if head.manifests is not None else OCI_MANIFEST if head.config is not None else ""
    if kind in KNOWN_TYPES:
        return kind
    if head.schemaVersion == 1 or ("manifest.v1+" in kind and "docker" in kind):
        raise UnsupportedError(f"{where}: a Docker schema 1 image", hint="push it again with a current Docker")
    raise UnsupportedError(f"{where}: no image manifest or index, but {kind[:100]!r}")


def check_blob(data: bytes, digest: Digest, size: int, where: str) -> bytes:
    """`data` itself, if it is the blob it should be; else IntegrityError."""
    if len(data) != size:
        raise IntegrityError(f"{where}: blob {digest.short} has {len(data)} bytes, expected {size}")
    found = Digest.of(data)
    if found != digest:
        raise IntegrityError(f"{where}: blob has digest {found.short}, expected {digest.short}",
                             hint="the stored bytes are damaged, or were changed on the way")
    return data
