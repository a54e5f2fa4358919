"""
The tracker as a process: its parts, put together from the configuration; signals; a graceful end.

Layer: tracker. Who calls: cli.tracker; tests and benchmarks, in a process or a nursery of theirs. One trio loop; the
only thread beside it is that of the Redis client.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import resource
import signal
from typing import TYPE_CHECKING

import trio

from lazyfs.config import split_address
from lazyfs.config.secretfile import read_word
from lazyfs.errors import AuthError, HostError
from lazyfs.peers.tlsfiles import TlsFiles
from lazyfs.tracker import issuing, preheat
from lazyfs.tracker.server import CONNECTION_COUNT_MAX, Server
from lazyfs.tracker.service import Service
from lazyfs.tracker.store import MemoryStore
from lazyfs.tracker.web import Answer, Routes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from lazyfs import config
    from lazyfs.tracker.store import Store
    from lazyfs.tracker.web import Request

    Extension = Callable[[Service, config.Config], Callable[[], Awaitable[None]] | None]

_BACKLOG = 4096                  # of connections that wait to be accepted: a cluster that is switched on
_DESCRIPTORS = CONNECTION_COUNT_MAX + 256
_log = logging.getLogger("lazyfs.tracker")

# Other parts of the tracker: each adds its routes and words of a beat to the service, and may give a task to run.
EXTENSIONS: tuple[Extension, ...] = (issuing.extend, preheat.extend)


class Guard:
    """Who may use the tracker: who shows the word of `token_file`; everybody, if there is none."""

    def __init__(self, token_file: str) -> None:
        """Raises ConfigError: it cannot be used."""
        self._file = token_file
        self._word = read_word(token_file, "tracker.token_file") if token_file else ""

    def __call__(self, request: Request) -> None:
        """Raises AuthError. The file is read again when another word is shown: it may have been replaced."""
        if not self._file:
            return
        shown = request.headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        if hmac.compare_digest(shown, self._word.encode()):
            return
        self._word = read_word(self._file, "tracker.token_file")
        if not hmac.compare_digest(shown, self._word.encode()):
            raise AuthError("the tracker wants to be shown a word, and this is not it",
                            hint="peers.tracker_token_file of the node, tracker.token_file of the tracker")


async def run(settings: config.Config, started: Callable[[list[str]], None] | None = None,
              extensions: tuple[Extension, ...] = EXTENSIONS) -> None:
    """
    Serve until SIGTERM or SIGINT.

    Args:
        settings: [tracker] of it, and what extensions need.
        started: told the addresses, host:port, when it listens.
        extensions: what it serves beside its own routes.

    Raises:
        ConfigError: a file that it names cannot be used. HostError: the address cannot.

    """
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        tracker = Tracker(settings, extensions)
        listeners = await tracker.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tracker.serve, listeners)
            if started is not None:
                started(tracker.addresses)
            async for number in signals:
                _log.info("ending", extra={"fields": {"signal": number}})
                await tracker.end()
                nursery.cancel_scope.cancel()


class Tracker:
    """One tracker. `addresses`: where it listens, host:port."""

    def __init__(self, settings: config.Config, extensions: tuple[Extension, ...] = EXTENSIONS) -> None:
        """Raises ConfigError."""
        own = settings.tracker
        self.addresses: list[str] = []
        self.store: Store = _make_store(own)
        routes = Routes(Guard(own.token_file))
        self.service = Service(self.store, routes)
        tls = None
        if own.cert_file:
            tls = TlsFiles("tracker", own.cert_file, own.key_file, own.ca_file)
            tls.load()
        self.server = Server(routes, tls.server if tls is not None else None)
        routes.add("GET", "/metrics", self._metrics, guarded=False)
        self._address = own.address
        self._tasks = [task for extend in extensions if (task := extend(self.service, settings)) is not None]
        self._ended = trio.Event()

    async def listen(self) -> list[trio.SocketListener]:
        """Raises HostError."""
        _allow_descriptors()
        host, port = split_address(self._address)
        try:
            listeners = await trio.open_tcp_listeners(port, host=host, backlog=_BACKLOG)
        except OSError as error:
            raise HostError(f"tracker.address {self._address} cannot be used: {error.strerror or error}",
                            hint="lazyfs tracker --address HOST:PORT") from error
        for listener in listeners:
            name = listener.socket.getsockname()
            self.addresses.append(f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}")
        return listeners

    async def serve(self, listeners: list[trio.SocketListener]) -> None:
        """Until cancelled; after `end` only what is under way."""
        _log.info("tracker serves", extra={"fields": {"addresses": ", ".join(self.addresses),
                                                      "store": type(self.store).__name__}})
        async with trio.open_nursery() as nursery:
            for task in (self.store.run, *self._tasks):
                nursery.start_soon(task)
            await self.server.serve(listeners)
            self._ended.set()

    async def end(self) -> None:
        """Answer what is under way, then return. Bounded by the server."""
        self.server.end()
        await self._ended.wait()

    async def _metrics(self, _request: Request) -> Answer:
        await trio.lowlevel.checkpoint()
        from lazyfs.tracker.metrics import page  # noqa: PLC0415 - heavy, and not everybody asks

        return Answer(200, page(self.service, self.server.traffic), "text/plain; version=0.0.4; charset=utf-8")


def _make_store(own: config.Tracker) -> Store:
    if not own.redis:
        return MemoryStore()
    from lazyfs.tracker.redisstore import RedisStore  # noqa: PLC0415 - only where there is one

    return RedisStore(own.redis, own.redis_password_file)


def _allow_descriptors() -> None:
    """A connection is one; the usual limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
