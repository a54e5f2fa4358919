"""
Who may have a resource: whoever shows the registry a credential that may pull it, at this moment.

Layer: tracker. Who calls: tracker.issuing. The asker says where it pulls from and hands over what its credential is on
the wire; the tracker shows just that to the registry (HEAD of the blob, or of the bootstrap layer that lists the
devices), and nothing of its own. State: proofs that held, by a keyed hash of everything that they depend on, for
PROVED_S; and, so that swarms outlive an outage of the registry, that a holder's key has proved its right once.

A cluster that starts an image asks all at once. One credential is shown to the registry once, whoever else shows it
meanwhile or within PROVED_S: it is the credential that may pull. Nodes with credentials of their own (a token server
gives each another one) cost a HEAD each, _CONCURRENT_MAX at a time.

Invariants: a credential is in no log, message, record or repr, and is not kept; it goes to the registry that the asker
names and to no mirror; only registries of `tracker.registries` are asked, and never this machine unless it is listed
there; what could not be asked is no "no", and no "yes" to whoever has not had one.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import trio

from lazyfs.errors import AuthError, LazyfsError, NotFoundError, PeerRefusedError, SourceError, UsageError
from lazyfs.image.digest import Digest
from lazyfs.peers.model import Kind
from lazyfs.registry.addresses import is_loopback_host
from lazyfs.registry.client import RegistryClient
from lazyfs.registry.options import Secret
from lazyfs.registry.reference import RegistryReference, parse_reference
from lazyfs.tracker.seeds import Seeds

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from lazyfs.peers.tokenwire import Proof
    from lazyfs.registry.options import RegistryOptions
    from lazyfs.tracker.store import Items

PROVED_S = 60.0                  # a right that is taken away: a minute, and the ten of the tokens
OUTAGE_S = 12 * 3600.0           # a registry that is down: who had the right keeps it for so long
PROOF_COUNT_MAX = 16_384
_ASK_S = 10.0                    # a registry, for a HEAD
_BLOB_COUNT_MAX = 64             # blobs in one question, each of them a HEAD
_CONCURRENT_MAX = 32             # threads that wait for registries: a cluster that starts one image together; more
                                 # at once is what registries answer with 429
_HELD: Final = "rights"


@dataclass(frozen=True, slots=True)
class _Claim:
    """One blob of one repository. `holder`: who asks, raw public key."""

    reference: RegistryReference
    holder: bytes
    authorization: Secret

    @property
    def digest(self) -> Digest:
        assert self.reference.digest is not None
        return self.reference.digest

    def name(self, *parts: bytes) -> bytes:
        ours = (self.reference.host, self.reference.repository, self.digest.text)
        return b"\0".join((*(part.encode() for part in ours), *parts))


@dataclass(slots=True, eq=False)
class _Flight:
    """A question to a registry that is under way. `error`, when `done` is set: what came of it; None: a yes."""

    done: trio.Event = field(default_factory=trio.Event)
    error: LazyfsError | None = None


class _Client:
    """A client of a registry, made when it is needed: mostly, all is known already."""

    def __init__(self, make: Callable[[], RegistryClient]) -> None:
        self._make = make
        self._made: RegistryClient | None = None

    async def get(self) -> RegistryClient:
        if self._made is None:
            self._made = await trio.to_thread.run_sync(self._make)
        return self._made

    def close(self) -> None:
        if self._made is not None:
            self._made.close()


class Rights:
    """Asks registries. `options`: how (authorities, plain http); its own credentials are never used."""

    def __init__(self, registries: Collection[str], options: RegistryOptions, items: Items,
                 clock: Callable[[], float] = trio.current_time) -> None:
        self._registries = frozenset(registries)
        self._options = replace(options, username=None, password=None, retry_count=0)
        self._items = items
        self._seeds = Seeds(items)
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._proved: OrderedDict[bytes, float] = OrderedDict()      # by credential, and by credential and holder
        self._flights: dict[bytes, _Flight] = {}
        self._limit = trio.CapacityLimiter(_CONCURRENT_MAX)
        self.asked_count = 0

    async def granted(self, keys: Iterable[str], proof: Proof, holder: bytes) -> frozenset[str]:
        """
        Those of `keys` that the proof is good for.

        Raises:
            PeerRefusedError: the registry refuses the proof, or is none that this tracker asks.
            FormatError, UsageError: the proof is malformed. SourceError: the registry could not be asked.

        """
        wanted = frozenset(keys)
        place = self._place(proof.source)
        authorization = Secret(proof.authorization)
        devices = frozenset(key for key in wanted if key.startswith(f"{Kind.DEVICE}/"))
        blobs = frozenset(key for key in wanted if key.startswith(f"{Kind.BLOB}/"))
        found: frozenset[str] = frozenset()
        if len(blobs) > _BLOB_COUNT_MAX:
            raise UsageError(f"expected at most {_BLOB_COUNT_MAX} blobs in one question, found {len(blobs)}")
        client = _Client(lambda: self._client(place, authorization))
        try:
            if devices:
                reference = replace(place, digest=Digest(proof.bootstrap))
                await self._prove(client, _Claim(reference, holder, authorization))
                found |= devices & await self._seeds_of(client, reference, proof)
            for key in sorted(blobs):
                reference = replace(place, digest=Digest(key.partition("/")[2]))
                await self._prove(client, _Claim(reference, holder, authorization))
                found |= {key}
        finally:
            client.close()
        return found

    async def _seeds_of(self, client: _Client, reference: RegistryReference, proof: Proof) -> frozenset[str]:
        known = await self._seeds.known(proof.bootstrap)
        return known if known is not None else await self._seeds.resources(await client.get(), reference, proof.size,
                                                                           proof.raw_size)

    def _place(self, text: str) -> RegistryReference:
        """Raises UsageError, PeerRefusedError."""
        reference = parse_reference(text)
        if not isinstance(reference, RegistryReference):
            raise UsageError("the right to an image is proved by a registry", hint="images in directories have none")
        if self._registries and reference.host not in self._registries:
            raise PeerRefusedError(f"this tracker does not ask {reference.host}", hint="[tracker] registries")
        if reference.host not in self._registries and is_loopback_host(_host_name(reference.host)):
            raise PeerRefusedError(f"{reference.host} is this very machine of the tracker",
                                   hint="[tracker] registries names it, if that is meant")
        return reference

    def _client(self, place: RegistryReference, authorization: Secret) -> RegistryClient:
        return RegistryClient(place.host, place.repository, replace(self._options, shown=authorization),
                              through_mirrors=False)

    async def _prove(self, client: _Client, claim: _Claim) -> None:
        """Raises PeerRefusedError: it may not pull that. SourceError: the registry could not be asked."""
        credential = claim.authorization.reveal().encode()
        shown = hmac.digest(self._secret, claim.name(credential), "sha256")
        own = hmac.digest(self._secret, claim.name(claim.holder, credential), "sha256")
        if self._proved.get(own, 0.0) > self._clock():
            return
        held = hashlib.sha256(claim.name(claim.holder)).hexdigest()
        error: LazyfsError | None = None
        while error is None and self._proved.get(shown, 0.0) <= self._clock():
            error = await self._shown_to_registry(shown, client, claim)
        if isinstance(error, PeerRefusedError):
            self._proved.pop(own, None)
            await self._items.drop(_HELD, held)
            raise type(error)(str(error), hint=error.hint)
        if isinstance(error, SourceError) and error.transient and await self._items.get(_HELD, held) is not None:
            return     # only where the registry says nothing: what it does not like, the asker may have made so
        if error is not None:
            raise error
        self._note(own, self._proved[shown])
        await self._items.put(_HELD, held, b"1", OUTAGE_S)

    async def _shown_to_registry(self, shown: bytes, client: _Client, claim: _Claim) -> LazyfsError | None:
        """Ask it, or wait for who asks the same already; None: nothing is wrong, `_proved` says whether it is a yes."""
        flight = self._flights.get(shown)
        if flight is not None:
            await flight.done.wait()
            return flight.error
        flight = self._flights[shown] = _Flight()
        try:
            await trio.to_thread.run_sync(_ask, await client.get(), claim, limiter=self._limit)
            self.asked_count += 1
            self._note(shown, self._clock() + PROVED_S)
        except (PeerRefusedError, SourceError) as error:
            self._proved.pop(shown, None)
            self.asked_count += 1
            flight.error = error
        finally:
            del self._flights[shown]
            flight.done.set()
        return flight.error

    def _note(self, name: bytes, until: float) -> None:
        self._proved[name] = until
        self._proved.move_to_end(name)
        if len(self._proved) > PROOF_COUNT_MAX:
            self._proved.popitem(last=False)


def _host_name(host: str) -> str:
    """Without its port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).strip("[]")


def _ask(client: RegistryClient, claim: _Claim) -> None:
    """Blocking."""
    where = f"{claim.reference.host}/{claim.reference.repository}"
    deadline = time.monotonic() + _ASK_S
    try:
        client.head(f"blobs/{claim.digest}", deadline)
    except (AuthError, NotFoundError):
        raise PeerRefusedError(f"{where} does not show {claim.digest.short} to this credential",
                               hint="docs/tokens.md, When it does not work") from None
    except SourceError:
        raise
    except LazyfsError as error:
        raise PeerRefusedError(f"{where}: {error}") from None
