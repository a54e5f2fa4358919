"""
Whether a blob may be served: the registry lets this node have it.

Layer: mirror. Who calls: mirror.blobs. Two cases. A blob that is fetched now comes from the registry itself, or from
peers that check our right to it: it is enough that the repository lists it (or answers HEAD), for its size. A blob that
is *on this node already* (containerd's store, pieces) is not served because somebody says that he has it: any registry
could, to get at another one's private image. It has to show bytes of it, a sample at a place that it cannot foresee.
Both are remembered for mirror.proof_s, and while the registry cannot be reached for mirror.offline_s; then what peers
say of it counts, too (mirror.hearsay).
"""

from __future__ import annotations

import os
import secrets
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from lazyfs.errors import AuthError, NotFoundError, SourceError
from lazyfs.mirror.flights import Flights

if TYPE_CHECKING:
    from lazyfs.image.digest import Digest
    from lazyfs.mirror.hearsay import HeardBlob, Hearsay
    from lazyfs.mirror.manifests import Manifests
    from lazyfs.mirror.records import Records
    from lazyfs.mirror.upstream import Upstream
    from lazyfs.registry.reference import RegistryReference

SAMPLE_BYTES: Final = 1024          # to be guessed: no; to be sent: nothing


class Sample(NamedTuple):
    """Bytes of a blob on this node, and where in it they are."""

    offset: int
    data: bytes


class Access:
    """See the module."""

    def __init__(self, upstream: Upstream, records: Records, manifests: Manifests, hearsay: Hearsay,
                 nursery: trio.Nursery) -> None:
        self._upstream = upstream
        self._records = records
        self._terms = manifests.terms
        self._hearsay = hearsay
        self._in_thread = manifests.in_thread
        self._flights: Flights[int] = Flights(nursery)

    async def size_of(self, reference: RegistryReference, digest: Digest) -> int:
        """
        The size of a blob that is to be fetched, as its repository says.

        Raises:
            NotFoundError, AuthError: it is not there, or not for us. SourceError: nobody knows.

        """
        heard = self._hearsay.blob(reference.identity, digest, trio.current_time())
        return await self._flights.once((reference.identity, digest, "size"), partial(
            self._in_thread, partial(self._size_of, reference, digest, heard)))

    async def check_local(self, reference: RegistryReference, digest: Digest, size: int, sample: Sample) -> None:
        """
        Whether a blob that is here may be served as one of this repository.

        Raises:
            NotFoundError, AuthError: no. SourceError: the registry cannot be asked, and never showed it of late.

        """
        heard = self._hearsay.blob(reference.identity, digest, trio.current_time())
        is_heard = heard is not None and heard.is_shown and heard.size == size
        await self._flights.once((reference.identity, digest, "local"), partial(
            self._in_thread, partial(self._check_local, reference, digest, size, sample, is_heard=is_heard)))

    async def served(self, reference: RegistryReference, digest: Digest, size: int) -> None:
        """It was fetched by this repository's leave: from now on it is known to have it."""
        await self._in_thread(partial(self._records.keep_blob, reference.identity, digest, size, is_shown=True))

    def _size_of(self, reference: RegistryReference, digest: Digest, heard: HeardBlob | None) -> int:
        place = reference.identity
        known = self._records.blob(place, digest)
        if known is not None and known.age_s < self._terms.proof_s:
            return known.size
        try:
            size = self._upstream.blob_size(reference, digest)
        except (NotFoundError, AuthError):
            self._records.forget(place, digest)
            raise
        except SourceError:
            if known is not None and known.age_s < self._terms.offline_s:
                return known.size
            if heard is None:
                raise
            return heard.size
        self._records.keep_blob(place, digest, size, is_shown=False)
        return size

    def _check_local(self, reference: RegistryReference, digest: Digest, size: int, sample: Sample, *,
                     is_heard: bool) -> int:
        place = reference.identity
        known = self._records.blob(place, digest)
        has_shown = known is not None and known.is_shown and known.size == size
        if known is not None and has_shown and known.age_s < self._terms.proof_s:
            return size
        try:
            self._compare(reference, digest, sample)
        except (NotFoundError, AuthError):
            self._records.forget(place, digest)
            raise
        except SourceError:
            if not is_heard and (known is None or not has_shown or known.age_s >= self._terms.offline_s):
                raise
            return size
        self._records.keep_blob(place, digest, size, is_shown=True)
        return size

    def _compare(self, reference: RegistryReference, digest: Digest, sample: Sample) -> None:
        if not sample.data:
            self._upstream.blob_size(reference, digest)    # an empty blob
        elif self._upstream.sample(reference, digest, sample.offset, len(sample.data)) != sample.data:
            raise NotFoundError(f"blob {digest.short}: {reference.identity} has other bytes than this node")


def take_sample(file: int, start: int, end: int) -> Sample:
    """Out of bytes [start, end) of an open file, where nobody can foresee. Blocking. Raises OSError."""
    count = min(end - start, SAMPLE_BYTES)
    offset = start + secrets.randbelow(end - start - count + 1)
    return Sample(offset, os.pread(file, count, offset))
