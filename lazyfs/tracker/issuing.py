"""
Tokens, given by the tracker: the routes, and what is asked before one is signed.

Layer: tracker. Who calls: tracker.run (extend). State: the signing keys and the rights.

    GET  /v1/keys                        the public keys, a JWK Set; for everybody
    POST /v1/clusters/{cluster}/tokens?proof=SIGNATURE   tokenwire.TokenAsk -> TokenAnswer; for who may use the tracker,
                                         signed by the key that the tokens are bound to

Policy (`tracker.tokens`): `cluster`: whoever may use the tracker gets a token for everything in it; `resource`: a token
for each resource whose right is proved (tracker.rights). A body is never logged: it may hold a credential.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import trio

from lazyfs.errors import FormatError, LazyfsError, PeerRefusedError
from lazyfs.peers.announce import CLUSTER
from lazyfs.peers.model import Kind
from lazyfs.peers.tokens import EVERYTHING, LIFETIME_S_MAX, PUBLIC_KEY_BYTES, Claims, dump_keys, is_signed_by
from lazyfs.peers.tokenwire import (
    ASK_BYTES_MAX,
    KEYS_PATH,
    PROOF_QUERY,
    TOKENS_PATH,
    TokenAnswer,
    TokenAsk,
    parse_ask,
)
from lazyfs.registry.fields import from_config
from lazyfs.tracker.rights import Rights
from lazyfs.tracker.signing import SigningKeys
from lazyfs.tracker.web import Answer

if TYPE_CHECKING:
    from collections import Counter

    from lazyfs import config
    from lazyfs.tracker.service import Service
    from lazyfs.tracker.web import Request, Routes

_BATCH = 32                      # signatures between two looks at other requests: 2 ms


def extend(service: Service, settings: config.Config) -> None:
    """
    What the configuration says of tokens, added to a tracker.

    Raises:
        ConfigError: the keys cannot be used.

    """
    own = settings.tracker
    if own.tokens == "off":
        return
    keys = SigningKeys(Path(own.keys_dir) if own.keys_dir else None, own.keys_rotate_s)
    keys.load()
    rights = None
    if own.tokens == "resource":
        rights = Rights(own.registries, from_config(settings.registry), service.store)
    Issuing(service.routes, keys, rights, service.counters)


class Issuing:
    """The routes. `rights` None: tokens for the whole cluster."""

    def __init__(self, routes: Routes, keys: SigningKeys, rights: Rights | None, counters: Counter[str]) -> None:
        """`counters`: tokens_asked, tokens_issued, tokens_refused, tokens_failed."""
        self._keys = keys
        self._rights = rights
        self._counters = counters
        routes.add("GET", KEYS_PATH, self._public, guarded=False)
        routes.add("POST", TOKENS_PATH, self._issue, body_bytes_max=ASK_BYTES_MAX)

    async def _public(self, _request: Request) -> Answer:
        await trio.lowlevel.checkpoint()
        return Answer(200, dump_keys(self._keys.publics(), self._keys.now()))

    async def _issue(self, request: Request) -> Answer:
        self._counters["tokens_asked"] += 1
        cluster = request.names["cluster"]
        if CLUSTER.fullmatch(cluster) is None:
            raise FormatError("this is not the name of a cluster")
        ask = parse_ask(request.body)
        holder = _raw(ask.holder)
        if not is_signed_by(holder, cluster, request.body, request.query.removeprefix(PROOF_QUERY)):
            self._counters["tokens_refused"] += 1
            raise PeerRefusedError("the question is not signed by the key that the tokens are to be bound to")
        try:
            granted = await self._granted(ask, holder)
        except LazyfsError as error:
            self._counters["tokens_refused" if isinstance(error, PeerRefusedError) else "tokens_failed"] += 1
            raise
        tokens = await self._sign(cluster, ask.member, holder, granted)
        self._counters["tokens_issued"] += len(tokens)
        return Answer(200, msgspec.json.encode(TokenAnswer(tokens, LIFETIME_S_MAX)))

    async def _granted(self, ask: TokenAsk, holder: bytes) -> list[str]:
        """Raises PeerRefusedError: none of them."""
        if self._rights is None:
            if ask.keys != [EVERYTHING]:
                raise PeerRefusedError("this tracker gives tokens for the whole cluster only",
                                       hint='[peers] tokens = "cluster" on the nodes, or "resource" on the tracker')
            return ask.keys
        if all(key.startswith(f"{Kind.FILE}/") for key in ask.keys):
            return ask.keys        # of no registry: whoever knows the digest of a file (docs/tokens.md)
        if ask.proof is None or EVERYTHING in ask.keys:
            raise PeerRefusedError("this tracker gives tokens for single resources, to who proves the right to them",
                                   hint='[peers] tokens = "resource" on the nodes')
        found = await self._rights.granted(ask.keys, ask.proof, holder)
        if not found:
            raise PeerRefusedError(f"{ask.proof.source[:200]} does not have what a token was asked for")
        return sorted(found)

    async def _sign(self, cluster: str, member: str, holder: bytes, granted: list[str]) -> dict[str, str]:
        key, now, found = self._keys.current(), self._keys.now(), {}
        for number, one in enumerate(granted):
            if number % _BATCH == 0:
                await trio.lowlevel.checkpoint()
            found[one] = key.sign(Claims(member, cluster, one, now + LIFETIME_S_MAX, holder), now)
        return found


def _raw(text: str) -> bytes:
    """Raises FormatError: it is no Ed25519 public key."""
    try:
        raw = urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError:
        raw = b""
    if len(raw) != PUBLIC_KEY_BYTES:
        raise FormatError("the holder's key is not an Ed25519 public key in base64url")
    return raw
