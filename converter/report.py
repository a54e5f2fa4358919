"""
What a conversion is told and what it tells. Plain data; the command line prints it.

Layer: converter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from converter.encode import Encoding
    from lazyfs.image.descriptor import Descriptor
    from lazyfs.image.digest import Digest
    from lazyfs.image.prefetch import PrefetchList


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """
    How to convert. `prefetch`: what the hot part is to hold. `platform`: OS/ARCH[/VARIANT], None: this machine's.

    `jobs`: threads that compress, and layers that are read at a time; no influence on the result. `named`: False: the
    result is put by its digest only, and the destination's reference stays as it is.
    """

    encoding: Encoding
    jobs: int = 1
    prefetch: PrefetchList | None = None
    platform: str | None = None
    all_platforms: bool = False
    reuse: bool = True
    named: bool = True


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One source layer. Sizes in bytes; `device_size` is the layer device's, uncompressed."""

    source_digest: Digest
    source_size: int
    blob_digest: Digest
    blob_size: int
    device_size: int
    chunk_count: int
    entry_count: int
    reused: bool
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HotReport:
    """
    The hot part; without a digest there is none.

    Attributes:
        digest: of the hot blob.
        size: of the hot blob, bytes.
        device_size: what it holds, uncompressed.
        chunk_count: of the hot device.
        extent_count: runs of blocks that it is made of.
        share: its stored bytes against those of the layers' chunks.
        unmatched: lines of the prefetch list that name nothing in this image.

    """

    digest: Digest | None
    size: int
    device_size: int
    chunk_count: int
    extent_count: int
    share: float
    unmatched: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For --json of the commands that make one; a contract: members are only added."""
        return {
            "digest": None if self.digest is None else self.digest.text,
            "bytes": self.size,
            "uncompressedBytes": self.device_size,
            "chunks": self.chunk_count,
            "extents": self.extent_count,
            "share": self.share,
        }


@dataclass(frozen=True, slots=True)
class ImageReport:
    """One image. `digest`: of its lazy manifest; `size`: of all its blobs."""

    platform: str
    source_digest: Digest
    digest: Digest
    layers: tuple[LayerReport, ...]
    hot: HotReport | None
    bootstrap_size: int

    @property
    def source_size(self) -> int:
        return sum({layer.source_digest: layer.source_size for layer in self.layers}.values())

    @property
    def size(self) -> int:
        blobs = {layer.blob_digest: layer.blob_size for layer in self.layers}
        return sum(blobs.values()) + self.bootstrap_size + (self.hot.size if self.hot else 0)


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """The whole conversion. `digest`: of what the destination's reference names now."""

    source_digest: Digest
    digest: Digest
    images: tuple[ImageReport, ...]
    notes: tuple[str, ...]


class Events(Protocol):
    """Told what happens while it happens. Calls come from several threads."""

    def layer_started(self, layer: Descriptor) -> None: ...

    def layer_read(self, layer: Descriptor, size_bytes: int) -> None: ...

    def layer_done(self, report: LayerReport) -> None: ...

    def note(self, text: str) -> None: ...


class NoEvents:
    """Nobody wants to know."""

    def layer_started(self, layer: Descriptor) -> None: ...

    def layer_read(self, layer: Descriptor, size_bytes: int) -> None: ...

    def layer_done(self, report: LayerReport) -> None: ...

    def note(self, text: str) -> None: ...
