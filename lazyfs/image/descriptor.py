"""
What names bytes (a descriptor) and what was fetched by name (a document).

Pure data of the OCI image-spec v1.1, descriptor.md; here, below the registry, so that the image format can speak of
them. Who uses it: lazyfs.image.manifest, lazyfs.registry, converter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lazyfs.image.digest import Digest


@dataclass(frozen=True, slots=True)
class Descriptor:
    """OCI descriptor: what bytes, how many, of which kind. `platform` is the raw JSON object, if any."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest or index, with the exact bytes its digest was checked against."""

    data: bytes
    media_type: str
    digest: Digest
