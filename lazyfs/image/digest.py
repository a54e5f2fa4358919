"""
Digests: OCI content digests (SHA-256) and chunk digests (BLAKE3).

OCI names manifests, layers and blobs by `sha256:<64 hex>` (image-spec v1.1 descriptor.md). Chunks are named by the
32 raw bytes of BLAKE3 over their uncompressed bytes: as strong, and three times as fast (docs/design.md).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from blake3 import blake3

from lazyfs.errors import FormatError

CHUNK_DIGEST_BYTES = 32
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """An OCI content digest; only sha256 is accepted."""

    text: str

    def __post_init__(self) -> None:
        if not _SHA256.match(self.text):
            raise FormatError(f"not a sha256 digest: {self.text[:100]!r}")

    @property
    def hex(self) -> str:
        return self.text[7:]

    @property
    def short(self) -> str:
        """For messages: enough to find it by eye."""
        return self.text[:19]

    @classmethod
    def of(cls, data: bytes) -> Digest:
        return cls("sha256:" + hashlib.sha256(data).hexdigest())

    def __str__(self) -> str:
        return self.text


def chunk_digest(data: bytes | bytearray | memoryview) -> bytes:
    """The 32-byte BLAKE3 digest of a chunk's uncompressed bytes."""
    return blake3(data).digest()
