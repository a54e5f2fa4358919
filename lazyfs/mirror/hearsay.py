"""
Tags and manifests by word of peers, while the registry is down: what they are told here, and what is believed of them.

Layer: mirror. Who calls: mirror.manifests and mirror.access ask; mirror.peering brings questions of others, and has
this node known as one that has a repository. Only what a registry told this very node is told on; what was heard is
kept in memory, as long as the operator lets it count (mirror.tags_from_peers_s; 0: nothing is asked or told), and never
said again. What a repository's blobs are is heard with its manifest: which of them that repository has shown.

A repository has a name among peers, `place_key`: members that have pulled from it are found by it as by a resource's.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol
from urllib.parse import quote, unquote

import trio

from lazyfs.errors import FormatError, LazyfsError, PeerBusyError, PeerLacksError
from lazyfs.image.digest import Digest
from lazyfs.mirror.believing import Word, believed, encode, parse
from lazyfs.mirror.manifests import listed_in
from lazyfs.peers.model import Kind
from lazyfs.registry.reference import RegistryReference, parse_reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazyfs.mirror.records import Records
    from lazyfs.peers.model import Member

ASKED_MAX: Final = 8             # members, of those that have the repository
ANSWER_S: Final = 2.0            # a client waits
TOLD_AT_ONCE_MAX: Final = 8      # each may hold a manifest of 4 MiB
HEARD_MAX: Final = 64            # manifests
BLOBS_MAX: Final = 16_384
PLACES_MAX: Final = 256          # repositories that this node is known for; a beat holds 2048 keys
_log = logging.getLogger("lazyfs.mirror")


class Members(Protocol):
    """The cluster as it is asked."""

    async def having(self, key: str) -> Sequence[Member]:
        """Who has this repository, the best to ask first, this node not. Waits for a first view, for a short time."""
        ...

    async def question(self, member: Member, words: str, key: str) -> bytes:
        """See peers.endpoint.Endpoint.question."""
        ...

    def admit(self, token: str, key: str) -> None:
        """Raises PeerRefusedError: who shows this token may not ask about that repository."""
        ...


class HeardBlob(NamedTuple):
    """`is_shown`: some member says that the repository has shown it."""

    size: int
    is_shown: bool


@dataclass(frozen=True, slots=True)
class Trust:
    """Of [mirror]: `limit_s`: tags_from_peers_s; `agree`: tags_from_peers_agree; `offline_s`."""

    limit_s: float = 0.0
    agree: int = 2
    offline_s: float = 86_400.0


def place_key(place: str) -> str:
    """Of a repository (RegistryReference.identity), as the key of a resource: it has the form of one, and no bytes."""
    return f"{Kind.FILE}/{Digest.of(f'lazyfs tags of {place}'.encode())}"


class Hearsay:
    """See the module. `members`: None while this node takes no part in a cluster. Of threads only `blob` is called."""

    def __init__(self, records: Records, trust: Trust) -> None:
        self.members: Members | None = None
        self._records = records
        self._trust = trust
        self._heard: OrderedDict[tuple[str, Digest], tuple[Word, float]] = OrderedDict()    # and when
        self._blobs: OrderedDict[tuple[str, Digest], tuple[HeardBlob, float]] = OrderedDict()
        self._telling = 0

    @property
    def is_on(self) -> bool:
        return self._trust.limit_s > 0

    # --- asking ---------------------------------------------------------------------------------------------------

    async def tag(self, reference: RegistryReference) -> Word | None:
        """What enough members say that a reference's tag names; None: they do not."""
        word = believed(await self._ask_all(reference), self._trust.agree, self._trust.limit_s)
        if word is not None:
            self._keep(reference.identity, word)
        return word

    async def manifest(self, reference: RegistryReference) -> Word | None:
        """The manifest of a reference's digest; one member is enough for it."""
        assert reference.digest is not None
        known = self._heard.get((reference.identity, reference.digest))
        if known is not None and known[0].age_s + trio.current_time() - known[1] <= self._trust.limit_s:
            return known[0]
        words = [word for word in await self._ask_all(reference) if word.document.digest == reference.digest]
        word = believed(words, 1, self._trust.limit_s)
        if word is not None:
            self._keep(reference.identity, word)
        return word

    def blob(self, place: str, digest: Digest, now: float) -> HeardBlob | None:
        """What was heard of a blob of a repository. `now`: trio's clock."""
        found = self._blobs.get((place, digest))
        return found[0] if found is not None and now < found[1] else None

    async def _ask_all(self, reference: RegistryReference) -> list[Word]:
        if self.members is None or not self.is_on:
            return []
        key, words = place_key(reference.identity), quote(reference.text, safe="")
        members, found = self.members, []

        async def ask(member: Member) -> None:
            try:
                found.append(parse(await members.question(member, words, key)))
            except LazyfsError as error:
                _log.debug("%s: %s: %s", reference.text, member.id, error)

        asked = (await members.having(key))[:ASKED_MAX]
        with trio.move_on_after(ANSWER_S):
            async with trio.open_nursery() as nursery:
                for member in asked:
                    nursery.start_soon(ask, member)
        return found

    def _keep(self, place: str, word: Word) -> None:
        now = trio.current_time()
        until = now + self._trust.limit_s - word.age_s
        self._heard[place, word.document.digest] = word, now
        while len(self._heard) > HEARD_MAX:
            self._heard.popitem(last=False)
        for digest, size in listed_in(word.document.data):
            self._blobs[place, digest] = HeardBlob(size, digest in word.shown), until
        while len(self._blobs) > BLOBS_MAX:
            self._blobs.popitem(last=False)

    # --- telling --------------------------------------------------------------------------------------------------

    async def places(self) -> set[str]:
        """Keys of the repositories that this node is to be known for: those pulled from last."""
        if not self.is_on:
            return set()
        ask = partial(self._records.places, self._trust.limit_s, PLACES_MAX)
        return {place_key(place) for place in await trio.to_thread.run_sync(ask)}

    async def tell(self, words: str, token: str) -> bytes:
        """
        peers.questions.Desk.

        Raises:
            PeerLacksError: no registry has told us. PeerRefusedError: he may not ask. PeerBusyError: too many do.
            FormatError, UsageError: he asks for something else.

        """
        reference = parse_reference(unquote(words))
        if not isinstance(reference, RegistryReference) or not self.is_on or self.members is None:
            raise FormatError("expected an image of a registry")
        self.members.admit(token, place_key(reference.identity))
        if self._telling >= TOLD_AT_ONCE_MAX:
            raise PeerBusyError("busy: too many ask at once", retry_after_s=1.0)
        self._telling += 1
        try:
            return await trio.to_thread.run_sync(self._told, reference)
        finally:
            self._telling -= 1

    def _told(self, reference: RegistryReference) -> bytes:
        place, digest, age_s = reference.identity, reference.digest, 0.0
        if digest is None:
            tag = self._records.tag(place, reference.tag)
            if tag is None:
                raise PeerLacksError(f"{reference.text}: no registry has told this node")
            digest, age_s = tag
        kept = self._records.manifest(place, digest)
        if kept is None:
            raise PeerLacksError(f"{reference.text}: no registry has told this node")
        age_s = age_s if reference.digest is None else kept.age_s
        if age_s > self._trust.limit_s:
            raise PeerLacksError(f"{reference.text}: that was {age_s:.0f} s ago")
        blobs = ((one, self._records.blob(place, one)) for one, _ in listed_in(kept.document.data))
        shown = frozenset(one for one, known in blobs
                          if known is not None and known.is_shown and known.age_s < self._trust.offline_s)
        return encode(Word(kept.document, age_s, shown))
