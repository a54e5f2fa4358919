"""
What a member says of a tag or a manifest, and when several of them are believed. Pure.

Layer: mirror. Who calls: mirror.hearsay. A manifest checks itself by its digest; that a tag names this digest nothing
can prove but the registry. So a digest counts if enough members say the same, and as young as enough of them vouch for:
one alone can neither bring in a digest, nor make an old one look fresh, nor keep a new one out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec
from msgspec import Meta

from lazyfs import shapes
from lazyfs.errors import FormatError
from lazyfs.image.digest import Digest
from lazyfs.limits import MANIFEST_BYTES_MAX
from lazyfs.registry.documents import KNOWN_TYPES
from lazyfs.registry.place import Document

if TYPE_CHECKING:
    from collections.abc import Iterable

_SHOWN_COUNT_MAX = 1024          # blobs of one manifest


class _Said(msgspec.Struct):
    age_s: float
    media_type: Annotated[str, Meta(max_length=200)]
    data: Annotated[bytes, Meta(max_length=MANIFEST_BYTES_MAX)]
    shown: Annotated[list[Annotated[str, Meta(max_length=100)]], Meta(max_length=_SHOWN_COUNT_MAX)] = []


class Word(NamedTuple):
    """
    What a member has of its registry, first hand.

    Attributes:
        age_s: since the registry last told it so.
        shown: blobs that this very repository has shown bytes of (mirror.access).

    """

    document: Document
    age_s: float
    shown: frozenset[Digest]


def encode(word: Word) -> bytes:
    """As it goes over the wire."""
    shown = sorted(digest.text for digest in word.shown)[:_SHOWN_COUNT_MAX]
    return msgspec.msgpack.encode(_Said(word.age_s, word.document.media_type, word.document.data, shown))


def parse(data: bytes) -> Word:
    """
    What somebody sent.

    Raises:
        FormatError: it is no word of a manifest.

    """
    try:
        said = shapes.from_msgpack(data, _Said)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"peer: not a manifest: {str(error)[:200]}") from None
    if not (math.isfinite(said.age_s) and said.age_s >= 0) or said.media_type not in KNOWN_TYPES:
        raise FormatError(f"peer: a manifest of type {said.media_type[:100]!r}, {said.age_s:g} s old")
    return Word(Document(said.data, said.media_type, Digest.of(said.data)), said.age_s,
                frozenset(map(Digest, said.shown)))


def believed(words: Iterable[Word], agree: int, limit_s: float) -> Word | None:
    """
    The youngest digest that `agree` members say, none of them longer ago than `limit_s`; None: there is none.

    Its age is the one that `agree` of them vouch for. What they say was shown is taken together: a member could have
    these bytes anyway.
    """
    votes: dict[Digest, list[Word]] = {}
    for word in words:
        if word.age_s <= limit_s:
            votes.setdefault(word.document.digest, []).append(word)
    found = [Word(said[0].document, sorted(one.age_s for one in said)[agree - 1],
                  frozenset().union(*(one.shown for one in said)))
             for said in votes.values() if len(said) >= agree]
    return min(found, key=lambda word: word.age_s, default=None)
