"""
Signatures beside images: found by the digest of a manifest or index, and put there. As cosign does both.

Layer: registry. Who calls: lazyfs.node.verifying at a mount, lazyfs.cli.sign. A place without the referrers API (and
every image layout) has the tag alone. Bounded: one manifest by tag, at most ARTIFACT_COUNT_MAX by reference, at most
SIGNATURE_COUNT_MAX payloads in all, nothing after the deadline.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from lazyfs.errors import BusyError, FormatError, IntegrityError, NotFoundError, UnsupportedError
from lazyfs.image.artifact import parse_referrers, referrers_tag
from lazyfs.image.digest import Digest
from lazyfs.image.signature import (
    ARTIFACT_TYPE,
    SIGNATURE_COUNT_MAX,
    add_signature,
    parse_signatures,
    signature_tag,
)
from lazyfs.registry.documents import check_blob
from lazyfs.registry.referrers import ReferrersPlace
from lazyfs.registry.streams import read_exactly

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazyfs.image.signature import Signature
    from lazyfs.registry.place import ImageDestination, ImageSource

ARTIFACT_COUNT_MAX: Final = 16
_ATTEMPTS_MAX = 3     # of changing a tag that somebody else changes at the same time


def find_signatures(source: ImageSource, subject: Digest, deadline: float) -> Iterator[tuple[bytes, bytes]]:
    """
    Payloads and the signatures over them, as they are; nothing of it has been verified.

    Args:
        source: the image's place.
        subject: digest of the manifest or index.
        deadline: absolute, in time.monotonic() seconds.

    Raises:
        SourceError: they could not be read in time.

    """
    if not isinstance(source, ReferrersPlace):
        return
    count = 0
    for signature in _listed(source, subject, deadline):
        count += 1
        if count > SIGNATURE_COUNT_MAX:
            return
        payload = signature.payload
        try:
            with source.read_range(payload.digest, 0, payload.size, deadline) as stream:
                data = check_blob(read_exactly(stream, payload.size), payload.digest, payload.size, source.name)
        except (NotFoundError, IntegrityError):     # this one is lost; others may be there
            continue
        yield data, signature.value


def _listed(source: ReferrersPlace, subject: Digest, deadline: float) -> Iterator[Signature]:
    with contextlib.suppress(NotFoundError, FormatError, IntegrityError):
        yield from parse_signatures(source.named(signature_tag(subject), deadline).data)
    try:
        pages = source.referrers(subject, ARTIFACT_TYPE, deadline)
        if pages is None:
            pages = [source.named(referrers_tag(subject), deadline).data]
        found = parse_referrers(pages, ARTIFACT_TYPE)[:ARTIFACT_COUNT_MAX]
    except (NotFoundError, FormatError, IntegrityError):
        return
    for one in found:
        try:
            yield from parse_signatures(source.named(one.digest, deadline).data)
        except (NotFoundError, FormatError, IntegrityError):
            continue


def put_signature(
    destination: ImageDestination, subject: Digest, payload: bytes, value: bytes, deadline: float
) -> Digest:
    """
    Put one more signature beside an image.

    Args:
        destination: the image's place, opened at the tag signature_tag(subject).
        subject: what is signed.
        payload: the signed bytes.
        value: the signature.
        deadline: of what is read; writing has the destination's own.

    Returns: the digest of the signatures' manifest.

    Raises:
        UnsupportedError: the place cannot have signatures. BusyError: others change them all the time.
        FormatError: the tag names something else.

    """
    place = destination.reader()
    if not isinstance(place, ReferrersPlace):
        raise UnsupportedError(f"{destination.name}: no signature can be put there")
    tag = signature_tag(subject)
    destination.put_bytes(payload, Digest.of(payload))
    for _ in range(_ATTEMPTS_MAX):
        document, config = add_signature(_tagged(place, tag, deadline), payload, value)
        destination.put_bytes(config, Digest.of(config))
        destination.commit(document)
        written = _tagged(place, tag, deadline)
        if written is not None and value in {one.value for one in parse_signatures(written)}:
            return document.digest
    raise BusyError(f"{destination.name}: others sign the image at the same time", hint="try again when they are done")


def _tagged(place: ReferrersPlace, tag: str, deadline: float) -> bytes | None:
    try:
        return place.named(tag, deadline).data
    except NotFoundError:
        return None
