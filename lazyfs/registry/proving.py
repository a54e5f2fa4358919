"""
What proves to somebody else that this node may pull from a repository: its own credential, as it is on the wire.

Layer: registry. Who calls: node (tokens of devices), mirror (of blobs). Blocking. What is returned is a token of the
registry's token server, for pulling from this one repository for some minutes, where the registry has one; else name
and password. Who gets it decides what it is sent to: see peers.authority.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lazyfs.registry.options import Secret

if TYPE_CHECKING:
    from lazyfs.image.digest import Digest
    from lazyfs.registry.client import RegistryClient


def show_right(client: RegistryClient, digest: Digest, deadline: float) -> Secret:
    """
    The value of Authorization that the registry itself takes for a blob; empty: it wants none.

    Args:
        client: of the repository, made with `through_mirrors=False`: a mirror's word is no proof.
        digest: of the blob.
        deadline: time.monotonic().

    Raises:
        AuthError, NotFoundError: the registry does not show it to us. SourceError: it does not answer.

    """
    client.head(f"blobs/{digest}", deadline)
    return client.credential(deadline) or Secret("")
