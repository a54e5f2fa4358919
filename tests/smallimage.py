"""
A small image written through an ImageDestination, for tests of transports.

    image = write_image(destination, layers=[b"...", b"..."])   # commits; image.document, image.layers, image.config
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from lazyfs.image.digest import Digest
from lazyfs.registry.documents import OCI_MANIFEST
from lazyfs.registry.place import Document

if TYPE_CHECKING:
    from lazyfs.registry.place import ImageDestination

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"


@dataclass(frozen=True)
class SmallImage:
    document: Document
    config: bytes
    layers: list[bytes]

    @property
    def layer(self) -> bytes:
        return self.layers[0]

    @property
    def digest(self) -> Digest:
        return Digest.of(self.layers[0])


def make_image(layers: list[bytes]) -> SmallImage:
    """Manifest and config for these layers."""
    diff_ids = [str(Digest.of(layer)) for layer in layers]
    config = msgspec.json.encode(
        {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}})
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": CONFIG_TYPE, "digest": str(Digest.of(config)), "size": len(config)},
        "layers": [{"mediaType": LAYER_TYPE, "digest": d, "size": len(layer)}
                   for d, layer in zip(diff_ids, layers, strict=True)],
    }
    data = msgspec.json.encode(manifest)
    return SmallImage(Document(data, OCI_MANIFEST, Digest.of(data)), config, layers)


def write_image(destination: ImageDestination, layers: list[bytes], *, is_committed: bool = True) -> SmallImage:
    """Put everything; commit unless told not to."""
    image = make_image(layers)
    for layer in layers:
        path = destination.staging_dir / "layer"
        path.write_bytes(layer)
        destination.put_blob(path, Digest.of(layer), len(layer))
        assert not path.exists()
    destination.put_bytes(image.config, Digest.of(image.config))
    if is_committed:
        destination.commit(image.document)
    return image
