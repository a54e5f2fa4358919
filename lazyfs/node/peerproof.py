"""
What proves this node's right to the data of its images, for tokens: the credential that their registry takes.

Layer: node. Who calls: node.daemonworker makes one; peers.authority asks it for proofs. State: of each image in use
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
from lazyfs.node.order import MountOrder
from lazyfs.peers.tokenwire import KEY_COUNT_MAX, Proof
from lazyfs.registry.client import RegistryClient
from lazyfs.registry.proving import show_right
from lazyfs.registry.reference import RegistryReference, parse_reference
from lazyfs.registry.remote import RegistrySource
from lazyfs.registry.select import select_image

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lazyfs.fetch.device import FetchDevice
    from lazyfs.image.manifest import LazyBootstrap
    from lazyfs.registry.options import Secret

LOOK_S = 8.0                     # a registry; the gate waits less, what comes later counts the next time
REFUSED_S = 60.0                 # an image that its registry refuses us: others with the same layers are tried first
_THREADS: Final = 4


@dataclass(eq=False)
class _Image:
    """One image in use. What a thread does to it, it does under `lock`."""

    order: MountOrder
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    client: RegistryClient | None = field(default=None, repr=False)
    bootstrap: LazyBootstrap | None = None
    shown: Secret | None = field(default=None, repr=False)
    refused_until: float = 0.0
    is_closed: bool = False


class NodeProver:
    """authority.Prover over the devices that a node uses. On the loop."""

    def __init__(self, in_use: Mapping[str, Sequence[FetchDevice]]) -> None:
        """`in_use`: as fetch.peering has it: devices by Resource.key, each with the order that it is of."""
        self._in_use = in_use
        self._images: dict[int, _Image] = {}     # by id of the order, which they hold
        self._threads = trio.CapacityLimiter(_THREADS)

    async def _current(self) -> dict[int, set[str]]:
        """Keys of the devices of each image, by id of its order; images that are gone are forgotten."""
        found: dict[int, set[str]] = {}
        for key, devices in self._in_use.items():
            for device in devices:
                order = device.image
                if isinstance(order, MountOrder):
                    self._images.setdefault(id(order), _Image(order))
                    found.setdefault(id(order), set()).add(key)
        for name in self._images.keys() - found.keys():
            await trio.to_thread.run_sync(_close, self._images.pop(name), abandon_on_cancel=True,
                                          limiter=self._threads)
        return found

    async def proofs(self, keys: Sequence[str]) -> Sequence[tuple[Proof, Sequence[str]]]:
        """See authority.Prover. As few images as have all of `keys` among them."""
        found: list[tuple[Proof, Sequence[str]]] = []
        left, candidates = set(keys), await self._current()
        failure: LazyfsError | None = None
        while left and candidates:
            now = trio.current_time()
            name = max(candidates, key=lambda one: (self._images[one].refused_until <= now,
                                                    len(candidates[one] & left)))
            best, whole = self._images[name], candidates.pop(name)
            covered = whole & left
            if not covered:
                continue
            try:
                proof = await trio.to_thread.run_sync(_prove, best, abandon_on_cancel=True, limiter=self._threads)
            except LazyfsError as error:
                failure = error
                best.refused_until = now + REFUSED_S
                continue
            found.append((proof, [*covered, *(whole - covered)][:KEY_COUNT_MAX]))     # the others are wanted soon
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
