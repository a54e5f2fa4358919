"""
Seed records: which layer devices an image is made of, as its bootstrap proves.

Layer: tracker. Who calls: tracker.rights. A record is made once an image and set of trackers: its bootstrap layer is
read with the asker's own credential, its digest checked, and its tables parsed as a mount does it; the digest of each
device is computed from its table's rows. So a record cannot be forged by naming a device that one knows the digest of:
whoever wants a bootstrap that yields this digest needs all digests of its chunks, and only those who could pull the
image have them. State: records, in the tracker's store (they say nothing that is secret, and can be made anew).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import trio

from lazyfs.errors import FormatError, LazyfsError
from lazyfs.image.bootstrap import decompress_layer, parse_bootstrap
from lazyfs.image.digest import Digest
from lazyfs.limits import MIB
from lazyfs.peers.model import Kind
from lazyfs.registry.remote import RegistrySource

if TYPE_CHECKING:
    from lazyfs.registry.client import RegistryClient
    from lazyfs.registry.reference import RegistryReference
    from lazyfs.tracker.store import Items

_COLLECTION: Final = "seeds"
KEEP_S = 30 * 86_400.0
STORED_BYTES_MAX = 128 * MIB     # a tracker's memory, twice over: an image of five million files
RAW_BYTES_MAX = 512 * MIB
_READ_S = 25.0                   # the route has 30


class Seeds:
    """The records. One reads a bootstrap at a time: a tracker is small."""

    def __init__(self, items: Items) -> None:
        self._items = items
        self._lock = trio.Lock()

    async def known(self, bootstrap: str) -> frozenset[str] | None:
        """The resources of an image; None: it was not looked at yet."""
        record = await self._items.get(_COLLECTION, bootstrap)
        return None if record is None else frozenset(record.decode().split())

    async def resources(self, client: RegistryClient, reference: RegistryReference, size: int, raw_size: int,
                        ) -> frozenset[str]:
        """
        Resource.key of each device of an image.

        Args:
            client: that shows the asker's proof.
            reference: with the bootstrap layer's digest.
            size: of it, stored.
            raw_size: of it, uncompressed.

        Raises:
            FormatError: it is no bootstrap, or too large. SourceError: it could not be read.

        """
        assert reference.digest is not None
        name = reference.digest.text
        async with self._lock:
            found = await self.known(name)
            if found is None:
                if not 0 < size <= STORED_BYTES_MAX or not 0 < raw_size <= RAW_BYTES_MAX:
                    raise FormatError(f"bootstrap {reference.digest.short} of {raw_size} bytes: the tracker looks at "
                                      f"no more than {RAW_BYTES_MAX}")
                found = await trio.to_thread.run_sync(_read, client, reference, size, raw_size,
                                                      abandon_on_cancel=False)
                await self._items.put(_COLLECTION, name, " ".join(sorted(found)).encode(), KEEP_S)
            return found


def _read(client: RegistryClient, reference: RegistryReference, size: int, raw_size: int) -> frozenset[str]:
    """Blocking; a bootstrap that is not one is the asker's fault."""
    assert reference.digest is not None
    source = RegistrySource(client, reference, is_owner=False)
    data = _read_whole(source, reference.digest, size, time.monotonic() + _READ_S)
    try:
        bootstrap = parse_bootstrap(decompress_layer(data, raw_size))
    except LazyfsError as error:
        raise FormatError(f"{reference.digest.short} is not the bootstrap of a lazy image: {error}") from None
    devices = [device.digest for device in bootstrap.devices]
    if bootstrap.hot is not None:
        devices.append(bootstrap.hot.digest)
    return frozenset(f"{Kind.DEVICE}/{one}" for one in devices)


def _read_whole(source: RegistrySource, digest: Digest, size: int, deadline: float) -> bytes:
    pieces, left = [], size
    with source.read_range(digest, 0, size, deadline) as stream:
        while left:
            piece = stream.read(min(left, MIB))
            if not piece:
                break
            pieces.append(piece)
            left -= len(piece)
    data = b"".join(pieces)
    if left or Digest.of(data) != digest:
        raise FormatError(f"{digest.short}: the registry's bytes have another digest, or are fewer than {size}")
    return data
