"""
The trackers as a gate asks them: their keys, and tokens for what this node can prove its right to.

Layer: peers, on trio. Who calls: peers.gate. What proves a right (which image has a resource, which credential its
registry takes) is told by a Prover of the node or the mirror. No state.

Invariant: a name and password goes to a tracker only over TLS, or on this machine; a token of a registry's token
server, which is good for pulling from one repository for some minutes, over plain HTTP too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import urlsplit

import msgspec

from lazyfs.errors import ConfigError, FormatError, NotFoundError, PeerError, PeerRefusedError, UsageError
from lazyfs.peers.gate import OpenGate, TokenGate
from lazyfs.peers.model import Kind
from lazyfs.peers.tokens import PublicKeys, parse_keys
from lazyfs.peers.tokenwire import KEYS_PATH, PROOF_QUERY, TOKENS_PATH, Proof, TokenAsk, parse_answer
from lazyfs.peers.tracked import tracker_client

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lazyfs import config
    from lazyfs.peers.tokens import NodeKey
    from lazyfs.peers.trackerclient import Reply, TrackerClient

_ISSUE_S: Final = 10.0           # a tracker asks a registry first; the gate has a bound of its own
_LOCAL: Final = frozenset({"localhost", "127.0.0.1", "::1"})


def make_gate(settings: config.Peers, member: str, prover: Prover) -> OpenGate | TokenGate:
    """
    The gate that [peers] asks for; a TokenGate's `run` must run beside it.

    Args:
        settings: [peers].
        member: our id in the cluster.
        prover: asked only where there are tokens for single resources.

    Raises:
        ConfigError: what it says of trackers cannot be used.

    """
    if settings.tokens == "off":
        return OpenGate()
    by_resource = settings.tokens == "resource"
    authority = TrackerAuthority(tracker_client(settings), settings.tracker, settings.cluster, member,
                                 prover if by_resource else None)
    return TokenGate(settings.cluster, (member,), authority, by_resource, settings.token_grace_s)


class Prover(Protocol):
    """Who knows what this node's resources are of."""

    async def proofs(self, keys: Sequence[str]) -> Sequence[tuple[Proof, Sequence[str]]]:
        """
        What proves the right to resources: each proof with the keys that it is for. A key may be in several: the first
        that counts is enough. One that is in none is not this node's.

        Raises PeerRefusedError: the registry refuses us. PeerError: it does not answer.
        """
        ...


class TrackerAuthority:
    """gate.Authority. `prover` None: tokens of the whole cluster prove nothing but membership."""

    def __init__(self, client: TrackerClient, urls: Sequence[str], cluster: str, member: str,
                 prover: Prover | None) -> None:
        """`urls`: of the client's trackers."""
        self._client = client
        self._cluster, self._member = cluster, member
        self._prover = prover
        self._is_private = all(_is_private(url) for url in urls)

    async def keys(self) -> PublicKeys:
        """See gate.Authority."""
        return parse_keys((await self._request("GET", KEYS_PATH)).body)

    async def issue(self, keys: Sequence[str], holder: NodeKey) -> Mapping[str, tuple[str, float]]:
        """See gate.Authority."""
        asks: list[tuple[Proof | None, Sequence[str]]] = [(None, keys)]
        if self._prover is not None:
            files = [key for key in keys if key.startswith(f"{Kind.FILE}/")]
            others = [key for key in keys if key not in files]
            asks = [(None, files), *(await self._prover.proofs(others) if others else ())]
        found: dict[str, tuple[str, float]] = {}
        refusal: PeerRefusedError | None = None
        for proof, listed in asks:
            wanted = [key for key in listed if key not in found]
            if not wanted:
                continue
            try:
                found.update(await self._issue(wanted, proof, holder))
            except PeerRefusedError as error:
                refusal = error
        if not found:
            raise refusal or PeerRefusedError("this node pulls from no registry what a token was asked for")
        return found

    async def aclose(self) -> None:
        """See gate.Authority."""
        await self._client.aclose()

    async def _issue(self, keys: Sequence[str], proof: Proof | None, holder: NodeKey) -> dict[str, tuple[str, float]]:
        if proof is not None and proof.authorization.startswith("Basic ") and not self._is_private:
            raise PeerRefusedError("the registry's password is not shown to a tracker without TLS",
                                   hint="[peers] tracker with https, or a registry with a token server; docs/tokens.md")
        body = msgspec.json.encode(TokenAsk(self._member, holder.name, list(keys), proof))
        path = f"{TOKENS_PATH.format(cluster=self._cluster)}?{PROOF_QUERY}{holder.sign_question(self._cluster, body)}"
        reply = await self._request("POST", path, body)
        try:
            answer = parse_answer(reply.body)
        except FormatError as error:
            raise PeerError(f"{reply.tracker}: {error}") from None
        return {key: (answer.tokens[key], answer.seconds) for key in keys if key in answer.tokens}

    async def _request(self, method: str, path: str, body: bytes = b"") -> Reply:
        try:
            return await self._client.request(method, path, body, seconds=_ISSUE_S)
        except NotFoundError as error:
            raise PeerRefusedError("the tracker gives no tokens", hint='[tracker] tokens = "resource"') from error
        except UsageError as error:
            raise PeerRefusedError(str(error), hint=error.hint) from None
        except ConfigError as error:
            raise PeerError(str(error), hint=error.hint) from None


def _is_private(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "https" or parts.hostname in _LOCAL
