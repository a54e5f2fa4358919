"""
What proves this node's right to the data of its images, for tokens: the credential that their registry takes.

Layer: node. Who calls: node.peering tells which images there are; peers.authority asks for proofs. State: of each image
whose data was asked for, a client of its registry (no mirror: a mirror's word is no proof), which bootstrap layer it
has, and what was shown last. Registries are asked in threads, LOOK_S at most.

Invariants: a credential is only in the Proof that is returned, and in the client's memory; an image from a directory
proves nothing, so in a cluster with tokens for single resources it is fetched from the directory alone.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import trio

from lazyfs.errors import AuthError, LazyfsError, NotFoundError, PeerError, PeerRefusedError, SourceError
from lazyfs.image.digest import Digest
from lazyfs.image.manifest import parse_lazy_manifest, parse_manifest
from lazyfs.peers.tokenwire import Proof
from lazyfs.registry.client import RegistryClient
from lazyfs.registry.proving import show_right
from lazyfs.registry.reference import RegistryReference, parse_reference
from lazyfs.registry.remote import RegistrySource
from lazyfs.registry.select import select_image

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lazyfs.image.manifest import LazyBootstrap
    from lazyfs.node.order import MountOrder
    from lazyfs.registry.options import Secret

LOOK_S = 8.0                     # a registry; the gate waits less, what comes later counts the next time
REFUSED_S = 60.0                 # an image that its registry refuses us: others with the same layers are tried first
_THREADS: Final = 4


@dataclass(eq=False)
class _Image:
    """One mounted image. What a thread does to it, it does under `lock`."""

    order: MountOrder
    keys: frozenset[str]
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    client: RegistryClient | None = field(default=None, repr=False)
    bootstrap: LazyBootstrap | None = None
    shown: Secret | None = field(default=None, repr=False)
    refused_until: float = 0.0
    is_closed: bool = False


class NodeProver:
    """authority.Prover over the images of a node. On the loop."""

    def __init__(self) -> None:
        self._images: dict[object, _Image] = {}
        self._threads = trio.CapacityLimiter(_THREADS)

    def add(self, name: object, order: MountOrder, keys: Iterable[str]) -> None:
        """An image is mounted: `keys` are Resource.key of its devices, the hot one among them."""
        self._images[name] = _Image(order, frozenset(keys))

    async def remove(self, name: object) -> None:
        """It is not any more."""
        image = self._images.pop(name, None)
        if image is not None:
            await trio.to_thread.run_sync(_close, image, abandon_on_cancel=True, limiter=self._threads)

    async def proofs(self, keys: Sequence[str]) -> Sequence[tuple[Proof, Sequence[str]]]:
        """See authority.Prover. As few images as have all of `keys` among them."""
        found: list[tuple[Proof, Sequence[str]]] = []
        left, candidates = set(keys), list(self._images.values())
        failure: LazyfsError | None = None
        while left and candidates:
            now = trio.current_time()
            best = max(candidates, key=lambda image: (image.refused_until <= now, len(image.keys & left)))
            candidates.remove(best)
            covered = best.keys & left
            if not covered:
                continue
            try:
                proof = await trio.to_thread.run_sync(_prove, best, abandon_on_cancel=True, limiter=self._threads)
            except LazyfsError as error:
                failure = error
                best.refused_until = now + REFUSED_S
                continue
            found.append((proof, sorted(covered)))
            left -= covered
        if not found and isinstance(failure, SourceError) and failure.transient:
            raise PeerError(f"no proof of a right: {failure}", hint=failure.hint)
        if not found and failure is not None:
            raise PeerRefusedError(f"no proof of a right: {failure}", hint=failure.hint)
        return found


def _prove(image: _Image) -> Proof:
    """Blocking. Raises LazyfsError: there is none."""
    with image.lock:
        reference = parse_reference(image.order.image)
        if image.is_closed or not isinstance(reference, RegistryReference):
            raise PeerRefusedError(f"{image.order.image} is in no registry: nobody can say who may have it")
        if image.client is None:
            image.client = RegistryClient(reference.host, reference.repository, image.order.registry_options(),
                                          through_mirrors=False)
        if image.bootstrap is None:
            image.bootstrap = _bootstrap(image, image.client, reference)
        try:
            image.shown = show_right(image.client, image.bootstrap.digest, time.monotonic() + LOOK_S)
        except (AuthError, NotFoundError):
            image.shown = None
            raise
        except SourceError:
            if image.shown is None:
                raise              # the registry is down: what it took last may do, the tracker knows us
        return Proof(f"docker://{reference.host}/{reference.repository}", image.bootstrap.digest.text,
                     image.bootstrap.size, image.bootstrap.raw_size, image.shown.reveal())


def _bootstrap(image: _Image, client: RegistryClient, reference: RegistryReference) -> LazyBootstrap:
    """Of the image as the registry has it; a tag that was moved proves nothing, and the tracker says so."""
    order = image.order
    if order.manifest:
        reference = replace(reference, digest=Digest(order.manifest))
    document = select_image(RegistrySource(client, reference, is_owner=False), order.platform)
    return parse_lazy_manifest(parse_manifest(document.data, document.media_type), order.image).bootstrap


def _close(image: _Image) -> None:
    with image.lock:
        image.is_closed = True
        if image.client is not None:
            image.client.close()
