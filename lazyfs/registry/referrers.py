"""
Prefetch lists beside images: found by the digest of the image's manifest, and put there.

Where a registry has the referrers API (distribution-spec v1.1 "Listing Referrers"), it is asked; where it has not,
and in image layouts, the tag sha256-<hex> names an index of what refers to the manifest. Of several lists the newest
counts.

Layer: registry. Who calls: lazyfs.cli.profile_push, profile_pull; node.listed. find_list_text() is made for the moment
of a mount, too: at most five small requests and one of ARTIFACT_LIST_BYTES_MAX, nothing after its deadline.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lazyfs.errors import BusyError, FormatError, IntegrityError, NotFoundError, UnsupportedError
from lazyfs.image.artifact import (
    EMPTY,
    PREFETCH_TYPE,
    TIME_FORMAT,
    add_referrer,
    build_artifact,
    parse_artifact,
    parse_referrers,
    referrers_tag,
)
from lazyfs.image.digest import Digest
from lazyfs.image.prefetch import parse_prefetch
from lazyfs.registry.documents import check_blob
from lazyfs.registry.streams import read_exactly

if TYPE_CHECKING:
    from lazyfs.image.artifact import Referrer
    from lazyfs.image.descriptor import Descriptor
    from lazyfs.image.prefetch import PrefetchList
    from lazyfs.registry.place import Document, ImageDestination, ImageSource

_ATTEMPTS_MAX = 3     # of changing a listing that somebody else changes at the same time


@runtime_checkable
class ReferrersPlace(Protocol):
    """What a source can do besides place.ImageSource, if lists can be found there. Deadlines: time.monotonic()."""

    def referrers(self, subject: Digest, artifact_type: str, deadline: float) -> list[bytes] | None:
        """The pages of the referrers API, as they came; None: there is no such API here."""
        ...

    def named(self, name: str | Digest, deadline: float) -> Document:
        """A document by tag or digest, whatever the source's reference says. Raises NotFoundError."""
        ...


@dataclass(frozen=True, slots=True)
class PutList:
    """`digest`: of the artifact's manifest. `is_new`: False: the same list was there already, as the newest."""

    digest: Digest
    is_new: bool


def find_list(source: ImageSource, subject: Digest, deadline: float) -> PrefetchList | None:
    """
    The newest prefetch list that refers to a lazy image, parsed: find_list_text().

    Raises:
        FormatError: it is none. As find_list_text().

    """
    text = find_list_text(source, subject, deadline)
    return None if text is None else parse_prefetch(text)


def find_list_text(source: ImageSource, subject: Digest, deadline: float) -> bytes | None:
    """
    The text of the newest prefetch list that refers to a lazy image; only its digest has been checked.

    Args:
        source: the image's place.
        subject: digest of the image's manifest (not of an index).
        deadline: absolute, in time.monotonic() seconds.

    Returns: the list; None: there is none, or such a place cannot have one.

    Raises:
        FormatError, IntegrityError: what refers to the image is malformed, too large, or another one's.
        SourceError: it could not be read in time. (Whoever mounts goes on without a list.)

    """
    if not isinstance(source, ReferrersPlace):
        return None
    found = _newest(source, subject, deadline)
    if found is None:
        return None
    with source.read_range(found.digest, 0, found.size, deadline) as stream:
        return check_blob(read_exactly(stream, found.size), found.digest, found.size, source.name)


def put_list(destination: ImageDestination, subject: Document, text: bytes, created: str, deadline: float) -> PutList:
    """
    Put a list beside the image that it is for. Idempotent: a list that is there as the newest is not put again.

    Args:
        destination: the image's place, opened at the tag referrers_tag(subject.digest).
        subject: the lazy image's manifest.
        text: the list.
        created: now, as build_artifact() wants it; later, if the newest list that is there says so.
        deadline: of what is read; writing has the destination's own.

    Raises:
        UnsupportedError: the place cannot have lists, or the list is too large.
        BusyError: others change the listing all the time.
        FormatError: the tag names something else.

    """
    place = destination.reader()
    if not isinstance(place, ReferrersPlace):
        raise UnsupportedError(f"{destination.name}: no lists can be put there")
    known = _listed(place, subject.digest, deadline)
    if known and _holds(place, known[0], subject.digest, text, deadline):
        return PutList(known[0].digest, is_new=False)
    created = max(created, _just_after(known[0].created)) if known and known[0].created else created
    artifact = build_artifact(subject, text, created)
    destination.put_bytes(EMPTY, Digest.of(EMPTY))
    destination.put_bytes(text, Digest.of(text))
    destination.put_document(artifact)
    if place.referrers(subject.digest, PREFETCH_TYPE, deadline) is None:
        _put_in_listing(destination, place, subject.digest, artifact, created, deadline=deadline)
    return PutList(artifact.digest, is_new=True)


def _newest(place: ReferrersPlace, subject: Digest, deadline: float) -> Descriptor | None:
    """Where the newest list is."""
    known = _listed(place, subject, deadline)
    return parse_artifact(place.named(known[0].digest, deadline), subject) if known else None


def _holds(place: ReferrersPlace, known: Referrer, subject: Digest, text: bytes, deadline: float) -> bool:
    """Whether an artifact is this list; one that cannot be used is none."""
    try:
        return parse_artifact(place.named(known.digest, deadline), subject).digest == Digest.of(text)
    except (FormatError, IntegrityError, NotFoundError):
        return False


def _just_after(created: str) -> str:
    """A second later: lists of one second, or of clocks that differ, have an order all the same."""
    try:
        return (dt.datetime.fromisoformat(created) + dt.timedelta(seconds=1)).strftime(TIME_FORMAT)
    except (ValueError, OverflowError):
        return ""        # no time that there is


def _listed(place: ReferrersPlace, subject: Digest, deadline: float) -> list[Referrer]:
    pages = place.referrers(subject, PREFETCH_TYPE, deadline)
    if pages is None:
        listing = _listing(place, subject, deadline)
        pages = [] if listing is None else [listing]
    return parse_referrers(pages, PREFETCH_TYPE)


def _listing(place: ReferrersPlace, subject: Digest, deadline: float) -> bytes | None:
    try:
        return place.named(referrers_tag(subject), deadline).data
    except NotFoundError:
        return None


def _put_in_listing(
    destination: ImageDestination, place: ReferrersPlace, subject: Digest, artifact: Document, created: str, *,
    deadline: float,
) -> None:
    """A tag cannot be changed under a lock: look afterwards whether somebody else has undone it."""
    for _ in range(_ATTEMPTS_MAX):
        destination.commit(add_referrer(_listing(place, subject, deadline), artifact, created))
        written = _listing(place, subject, deadline)
        if written is not None and artifact.digest in {one.digest for one in parse_referrers([written], PREFETCH_TYPE)}:
            return
    raise BusyError(f"{destination.name}: others change what refers to the image at the same time",
                    hint="try again when they are done")
