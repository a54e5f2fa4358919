"""
Manifests for the mirror's clients: as the registry says just now; while it cannot be reached, as it said before, to
this node or (mirror.hearsay) to several others.

Layer: mirror. Who calls: mirror.pulling. A tag is resolved by the registry, each time (mirror.tag_fresh_s: or not so
often): HEAD, and the manifest itself comes out of the records if that very repository gave it before. While the
registry does not answer, a tag's digest, and the right to pull, count for mirror.offline_s longer. What it refuses, or
has no more, is forgotten at once. Every manifest was checked against its digest.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
import trio

from lazyfs import shapes
from lazyfs.errors import AuthError, DeadlineError, FormatError, NotFoundError, SourceError
from lazyfs.image.digest import Digest
from lazyfs.limits import LAYER_BYTES_MAX
from lazyfs.mirror.flights import Flights

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from lazyfs.mirror.believing import Word
    from lazyfs.mirror.hearsay import Hearsay
    from lazyfs.mirror.records import Records
    from lazyfs.mirror.upstream import Upstream
    from lazyfs.registry.place import Document
    from lazyfs.registry.reference import RegistryReference

    Hear = Callable[[RegistryReference], Awaitable[Word | None]]

T = TypeVar("T")
REGISTRY: Final = "registry"        # sources, for logs and metrics
MEMORY: Final = "memory"
OFFLINE: Final = "offline"
PEERS: Final = "peers"
THREAD_COUNT: Final = 32            # requests to registries at the same time, of the whole mirror; others wait
_ANSWER_S: Final = 15.0             # a client gets a manifest or an error by then
_log = logging.getLogger("lazyfs.mirror")


@dataclass(frozen=True, slots=True)
class Terms:
    """How long what a registry said counts: section [mirror] of the configuration, in seconds."""

    tag_fresh_s: float = 0.0
    proof_s: float = 300.0
    offline_s: float = 86_400.0


@dataclass(frozen=True, slots=True)
class FoundManifest:
    """`source`: who said so; OFFLINE and PEERS: `age_s` ago."""

    document: Document
    source: str
    age_s: float = 0.0


class Manifests:
    """See the module."""

    def __init__(self, upstream: Upstream, records: Records, terms: Terms, nursery: trio.Nursery,
                 hearsay: Hearsay) -> None:
        self._upstream = upstream
        self._records = records
        self.terms = terms
        self._hearsay = hearsay
        self._flights: Flights[FoundManifest] = Flights(nursery)
        self._threads = trio.CapacityLimiter(THREAD_COUNT)

    async def find(self, reference: RegistryReference) -> FoundManifest:
        """
        The manifest or index of a reference's digest or tag; asked for once, however many wait.

        Raises:
            NotFoundError, AuthError: the registry says so. SourceError: it says nothing, and neither do the records.
            FormatError: what it sent is none, or of a kind that we do not know.

        """
        ask = partial(self._of_digest if reference.digest is not None else self._of_tag, reference)
        with trio.move_on_after(_ANSWER_S):
            return await self._flights.once(reference, ask)
        raise DeadlineError(f"{reference.text}: no answer in {_ANSWER_S:g} s")

    async def in_thread(self, call: Callable[[], T]) -> T:
        """call() in a thread that may ask registries."""
        return await trio.to_thread.run_sync(call, limiter=self._threads, abandon_on_cancel=True)

    # --- by tag ---------------------------------------------------------------------------------------------------

    async def _of_tag(self, reference: RegistryReference) -> FoundManifest:
        """What this node and several others remember is of different age, perhaps: the younger one counts."""
        return await self._or_heard(partial(self._look_up_tag, reference), self._hearsay.tag, reference)

    async def _or_heard(self, look_up: Callable[[], FoundManifest], hear: Hear,
                        reference: RegistryReference) -> FoundManifest:
        found, failure = None, None
        try:
            found = await self.in_thread(look_up)
        except (NotFoundError, AuthError):
            raise
        except SourceError as error:
            failure = error
        if found is not None and found.source != OFFLINE:
            return found
        heard = await hear(reference)
        if heard is not None and (found is None or heard.age_s < found.age_s):
            _log.warning("%s: it is %s by word of peers, of %.0f s ago; its registry: %s", reference.text,
                         heard.document.digest.short, heard.age_s, failure or "not reached")
            return FoundManifest(heard.document, PEERS, heard.age_s)
        if found is None:
            assert failure is not None
            raise failure
        return found

    def _look_up_tag(self, reference: RegistryReference) -> FoundManifest:
        place, terms = reference.identity, self.terms
        known = self._records.tag(place, reference.tag)
        kept = self._records.manifest(place, known.digest) if known is not None else None
        if known is not None and kept is not None and known.age_s < terms.tag_fresh_s:
            return FoundManifest(kept.document, MEMORY)
        try:
            return self._ask_for_tag(reference)
        except (NotFoundError, AuthError):
            self._records.forget_tag(place, reference.tag)
            raise
        except SourceError as error:
            if known is None or kept is None or known.age_s >= terms.offline_s:
                raise
            _log.warning("%s: its digest is that of %.0f s ago: %s", reference.text, known.age_s, error)
            return FoundManifest(kept.document, OFFLINE, known.age_s)

    def _ask_for_tag(self, reference: RegistryReference) -> FoundManifest:
        place = reference.identity
        digest = self._upstream.resolve(reference)
        kept = self._records.manifest(place, digest) if digest is not None else None
        if kept is not None:
            self._records.prove_manifest(place, kept.document.digest)
            found = FoundManifest(kept.document, MEMORY)
        else:
            document = self._upstream.manifest(reference, digest)
            self._records.keep_manifest(place, document, listed_in(document.data))
            found = FoundManifest(document, REGISTRY)
        self._records.keep_tag(place, reference.tag, found.document.digest)
        return found

    # --- by digest ------------------------------------------------------------------------------------------------

    async def _of_digest(self, reference: RegistryReference) -> FoundManifest:
        return await self._or_heard(partial(self._look_up_digest, reference), self._hearsay.manifest, reference)

    def _look_up_digest(self, reference: RegistryReference) -> FoundManifest:
        place, digest = reference.identity, reference.digest
        assert digest is not None
        kept = self._records.manifest(place, digest)
        if kept is not None and kept.age_s < self.terms.proof_s:
            return FoundManifest(kept.document, MEMORY)
        try:
            if kept is None:
                document = self._upstream.manifest(reference, digest)
                self._records.keep_manifest(place, document, listed_in(document.data))
                return FoundManifest(document, REGISTRY)
            self._upstream.has_manifest(reference, digest)
        except (NotFoundError, AuthError):
            self._records.forget(place, digest)
            raise
        except SourceError:
            if kept is None or kept.age_s >= self.terms.offline_s:
                raise
            return FoundManifest(kept.document, OFFLINE)    # of age 0: it is what its digest says
        self._records.prove_manifest(place, digest)
        return FoundManifest(kept.document, MEMORY)


class _Listed(msgspec.Struct):
    digest: str = ""
    size: int = -1


class _Lists(msgspec.Struct):
    """What may list blobs in a manifest; members of an index are manifests, asked for as such."""

    config: _Listed | None = None
    layers: list[_Listed] | None = None
    blobs: list[_Listed] | None = None


def listed_in(data: bytes) -> Iterator[tuple[Digest, int]]:
    """Digest and size of each blob that a manifest lists; what is malformed is passed over."""
    try:
        lists = shapes.from_json(data, _Lists)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    for one in [*([lists.config] if lists.config else []), *(lists.layers or []), *(lists.blobs or [])]:
        try:
            digest = Digest(one.digest)
        except FormatError:
            continue
        if 0 <= one.size <= LAYER_BYTES_MAX:
            yield digest, one.size
