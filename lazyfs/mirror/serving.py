"""
The mirror's process: puts the parts together, and serves until it is told to end.

Layer: mirror. Who calls: cli.mirror. State: what is in mirror.dir; one process at a time uses it. On the same address:
the distribution API (mirror.pulling), `/healthz`, `/readyz`, `/metrics` and `/status` (JSON, for `lazyfs status`).
"""

from __future__ import annotations

import json
import logging
import os
import signal
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

import lazyfs
from lazyfs.cache.ownership import prepare_directory
from lazyfs.errors import CacheError, TargetError
from lazyfs.mirror import web
from lazyfs.mirror.access import Access
from lazyfs.mirror.blobs import PullBlobs
from lazyfs.mirror.contentstore import ContentStore
from lazyfs.mirror.figures import Figures
from lazyfs.mirror.files import Files, Rules
from lazyfs.mirror.hearsay import Hearsay, Trust
from lazyfs.mirror.manifests import Manifests, Terms
from lazyfs.mirror.peering import MirrorPeers, settings_of
from lazyfs.mirror.piecedir import PieceDirectory
from lazyfs.mirror.pieces import Blobs
from lazyfs.mirror.preheating import Preheating
from lazyfs.mirror.proxy import Proxy
from lazyfs.mirror.pulling import Pulling, refuse
from lazyfs.mirror.recalling import Recalling
from lazyfs.mirror.records import Records
from lazyfs.mirror.route import Refusal
from lazyfs.mirror.upstream import USER_AGENT, Upstream, anonymous
from lazyfs.mirror.urls import Urls
from lazyfs.registry.fields import from_config
from lazyfs.registry.hosts import OWN_MIRROR

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from lazyfs.config import Config
    from lazyfs.image.digest import Digest
    from lazyfs.mirror.web import Reply, Request

DEFAULT_ADDRESS: Final = "127.0.0.1:9453"
_log = logging.getLogger("lazyfs.mirror")


class Mirror:
    """One mirror; `opened()` makes it. `handle` answers a request of any kind."""

    def __init__(self, pulling: Pulling, figures: Figures, proxy: Proxy, peers: MirrorPeers | None) -> None:
        self._pulling = pulling
        self._proxy = proxy
        self._figures = figures
        self._peers = peers
        self._began = trio.current_time()

    async def handle(self, request: Request, reply: Reply) -> None:
        """For mirror.web."""
        if await self._proxy.answer(request, reply) or await self._pulling.answer(request, reply):
            return
        path = request.target.partition("?")[0]
        if request.method in {"GET", "HEAD"} and path in {"/healthz", "/readyz"}:
            await reply.whole(200, {"Content-Type": "text/plain"}, b"ok\n")
        elif request.method in {"GET", "HEAD"} and path == "/metrics":
            await reply.whole(200, {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}, self._figures.text())
        elif request.method in {"GET", "HEAD"} and path == "/status":
            await reply.whole(200, {"Content-Type": "application/json", OWN_MIRROR: USER_AGENT}, self._status())
        else:
            await refuse(reply, Refusal(404, "NAME_UNKNOWN", "this is lazyfs' mirror: it serves /v2/"))

    def _status(self) -> bytes:
        told = {"version": lazyfs.__version__, "pid": os.getpid(), "seconds": trio.current_time() - self._began,
                "peers": None if self._peers is None else self._peers.describe(), **self._figures.told()}
        return json.dumps(told).encode() + b"\n"


@asynccontextmanager
async def opened(settings: Config, drop: Callable[[Digest], int] | None = None) -> AsyncIterator[Mirror]:
    """
    A mirror, ready for requests. `drop`: of mirror.recalling; None: there is no containerd to be told.

    Raises:
        CacheError: its directory cannot be used, or is used by another one.

    """
    own = settings.mirror
    try:
        directory = await trio.to_thread.run_sync(prepare_directory, Path(own.dir))
        pieces = await trio.to_thread.run_sync(PieceDirectory, directory / "pieces", own.quota_bytes)
    except CacheError as error:      # its words are the worker's, whose option has another name
        raise type(error)(str(error), hint=error.hint.replace("--cache-dir", "mirror.dir")) from error
    async with AsyncExitStack() as stack:
        stack.callback(pieces.close)
        records = Records(directory / "records.sqlite")
        stack.callback(records.close)
        options = from_config(settings.registry)
        upstream = Upstream(anonymous(options, directory) if own.private == "never" else options)
        stack.callback(upstream.close)
        content = ContentStore(own.containerd_root)
        blobs = await stack.enter_async_context(Blobs(pieces, content=content).serving())
        if drop is not None:
            blobs.recall = Recalling(drop).recall
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        terms = Terms(own.tag_fresh_s, own.proof_s, own.offline_s)
        hearsay = Hearsay(records, _trust(settings))
        manifests = Manifests(upstream, records, terms, nursery, hearsay)
        access = Access(upstream, records, manifests, hearsay, nursery)
        figures = Figures(blobs.counted)
        pull = PullBlobs(content, blobs, access, upstream, peers_prove=settings.peers.tokens == "resource")
        urls = Urls(replace(options, user_agent=USER_AGENT))
        stack.callback(urls.close)
        files = Files(blobs, urls, Rules.of(own.proxy, own.proxy_immutable), share_unverified=own.share_unverified)
        peers = None
        if settings.peers.enabled:
            preheating = Preheating(blobs, upstream, options, content, files)
            peers = MirrorPeers(settings_of(settings.peers, own.peers_address), blobs, options,
                                preheating.do, hearsay)
            nursery.start_soon(peers.run)
        yield Mirror(Pulling(manifests, pull, upstream, figures), figures, Proxy(files, own.proxy_hosts), peers)


def _trust(settings: Config) -> Trust:
    """With tokens for single resources no member can show a right to a name: nothing is asked by it, or told."""
    own = settings.mirror
    if own.tags_from_peers_s and settings.peers.tokens == "resource":
        _log.warning('mirror.tags_from_peers_s counts for nothing with peers.tokens = "resource"')
        return Trust()
    return Trust(own.tags_from_peers_s, own.tags_from_peers_agree, own.offline_s)


async def run(settings: Config, address: str, ready: Callable[[str], None],
              drop: Callable[[Digest], int] | None = None) -> None:
    """
    Serve at `address` until SIGTERM or SIGINT; `ready` is told the address that is really listened at. `drop`: of
    opened().

    Raises:
        TargetError: the address cannot be used. CacheError: the directory cannot.

    """
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        listeners = await web.listen(address)
        if not listeners:
            raise TargetError(f"cannot listen at {address}", hint="set mirror.address")
        async with opened(settings, drop) as mirror, trio.open_nursery() as nursery:
            nursery.start_soon(web.serve, listeners, mirror.handle)
            host, port = listeners[0].socket.getsockname()[:2]
            ready(f"{host}:{port}")
            async for number in signals:
                _log.info("ends", extra={"fields": {"signal": signal.Signals(number).name}})
                break
            nursery.cancel_scope.cancel()
