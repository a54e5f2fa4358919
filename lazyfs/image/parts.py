"""
Whether the parts of a lazy image belong together. Layer: image. Who calls: node.layers, registry.lazy.

Imports nothing heavy: the starter of a mount uses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lazyfs.errors import FormatError

if TYPE_CHECKING:
    from lazyfs.image.bootstrap import Bootstrap
    from lazyfs.image.manifest import LazyManifest


def check_parts(lazy: LazyManifest, bootstrap: Bootstrap) -> None:
    """
    Manifest and bootstrap must speak of the same blobs: what is pulled, kept and deleted is what is read.

    Raises:
        FormatError: they do not.

    """
    promised = {blob.digest: (blob.size, False) for blob in lazy.layers}
    if lazy.hot is not None:
        promised[lazy.hot.digest] = (lazy.hot.size, True)
    if len(bootstrap.devices) != len(lazy.layers):
        raise FormatError(f"bootstrap has {len(bootstrap.devices)} devices, the manifest {len(lazy.layers)} layers")
    if {blob.digest: (blob.size, blob.hot) for blob in bootstrap.blobs} != promised:
        raise FormatError("bootstrap and manifest do not name the same blobs")
