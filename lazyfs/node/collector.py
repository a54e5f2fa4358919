"""
Taking in what other nodes contribute: `POST /v1/profiles/<contributor>`, with the token, over HTTP or HTTPS.

Layer: node. Who calls: node.daemonworker, if `profile.collect` is configured. Whoever has the token is believed to be a
node, and nothing more: a contribution is checked (profile.contribution) in a thread, one at a time, and counts as one
of many (node.contributions). State: how much each peer has sent lately.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import ssl
import time
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from lazyfs.errors import ConfigError, FormatError, LazyfsError
from lazyfs.node import web
from lazyfs.node.contributions import Contributions
from lazyfs.node.token import node_secret, read_token
from lazyfs.profile.contribution import CONTRIBUTION_BYTES_MAX, read_contribution

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs import config

PATH = b"/v1/profiles/"
_CONNECTION_COUNT_MAX = 8        # of 4 MiB each
_CONNECTION_S = 30.0
_RETRY_S = 2.0                   # the worker before us still has the port
_RATE_COUNT_MAX = 60             # of one peer in _RATE_S: a node sends one an image and hour
_RATE_S = 60.0
_PEER_COUNT_MAX = 10_000         # remembered
_IPV6_HOST_BITS = 64             # a machine has as many addresses as it likes there
_CONTRIBUTOR = re.compile(rb"[0-9a-f]{32}")
_log = logging.getLogger("lazyfs.node.collector")


class Collector:
    """Of one daemon."""

    def __init__(self, settings: config.Profile, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._store: Contributions | None = None
        self._one_at_a_time = trio.CapacityLimiter(1)
        self._secret = b""               # addresses are not written down, and not to be found out by trying
        self._lately: dict[str, tuple[float, int]] = {}    # peer: when it began, how many

    async def run(self) -> None:
        """Serve for as long as the worker runs. Never raises an Exception."""
        try:
            context = await trio.to_thread.run_sync(self._tls)
            await trio.to_thread.run_sync(read_token, self._settings.token_file)
            self._store = await trio.to_thread.run_sync(self._open)
        except LazyfsError as error:
            _log.error("no profiles are collected: %s", error)
            return
        await web.serve(self._settings.collect, web.Site(
            "profile.collect", self.admit, self.respond, CONTRIBUTION_BYTES_MAX, _CONNECTION_COUNT_MAX, _CONNECTION_S,
            _RETRY_S, context))

    def admit(self, request: web.Request) -> web.Answer | None:
        """What can be said without the body; None: nothing is wrong so far."""
        path = request.target.partition(b"?")[0]
        if not path.startswith(PATH) or _CONTRIBUTOR.fullmatch(path.removeprefix(PATH)) is None:
            return 404, {"error": f"expected {PATH.decode()}<contributor>"}
        if request.method != b"POST":
            return 405, {"error": "expected POST", "allow": "POST"}
        refusal = self._refuse_sender(request)
        if refusal is not None:
            return refusal
        size = request.headers.get(b"content-length", b"0")
        if not size.isdigit() or len(size) > 12 or int(size) > CONTRIBUTION_BYTES_MAX:
            return 413, {"error": f"at most {CONTRIBUTION_BYTES_MAX} bytes are accepted"}
        return None

    def _refuse_sender(self, request: web.Request) -> web.Answer | None:
        kind, _, given = request.headers.get(b"authorization", b"").partition(b" ")
        try:
            token = read_token(self._settings.token_file).reveal().encode("ascii")
        except LazyfsError as error:
            _log.error("nobody can contribute: %s", error)
            return 500, {"error": "the collector has no token"}
        if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), token):
            return 401, {"error": "expected the token that this collector was given"}
        if not self._is_little(self._peer(request.peer)):
            return 429, {"error": "too many from one address", "retry_after_s": int(_RATE_S)}
        return None

    async def respond(self, request: web.Request, body: bytes) -> web.Answer:
        """Check it, and keep it."""
        contributor = request.target.partition(b"?")[0].removeprefix(PATH).decode("ascii")
        peer = self._peer(request.peer)
        try:
            await trio.to_thread.run_sync(self._keep, body, contributor, peer, limiter=self._one_at_a_time)
        except FormatError as error:
            _log.warning("a contribution is refused: %s", error)
            return 400, {"error": str(error)[:500]}
        except LazyfsError as error:
            _log.error("a contribution cannot be kept: %s", error)
            return 507, {"error": "no room"}
        return 200, {"kept": True}

    def _keep(self, body: bytes, contributor: str, peer: str) -> None:
        assert self._store is not None
        self._store.add(read_contribution(body), body, contributor, peer)

    def _open(self) -> Contributions:
        directory = Path(self._settings.collect_dir)
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._secret = node_secret(directory / "secret")
            return Contributions(directory, owner=True)
        except OSError as error:
            raise ConfigError(f"profile.collect_dir {self._settings.collect_dir}: {error.strerror}") from error

    def _tls(self) -> ssl.SSLContext | None:
        if not self._settings.cert_file:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self._settings.cert_file, self._settings.key_file, password=lambda: "")
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"profile.cert_file {self._settings.cert_file}: not usable with its key: "
                              f"{error.strerror or 'no such PEM content'}") from error
        return context

    def _peer(self, address: str) -> str:
        """16 hex digits that stand for an address (IPv6: its network)."""
        host = address.partition("%")[0]
        found = ipaddress.ip_address(host)
        if found.version == 6 and found.ipv4_mapped is None:
            host = str(ipaddress.ip_network((host, _IPV6_HOST_BITS), strict=False))
        return hashlib.blake2s(host.encode(), key=self._secret, digest_size=8).hexdigest()

    def _is_little(self, peer: str) -> bool:
        """Count a request; whether the peer has not sent too many lately."""
        now = self._clock()
        began, count = self._lately.pop(peer, (now, 0))
        if now - began >= _RATE_S:
            began, count = now, 0
        self._lately[peer] = began, count + 1
        if len(self._lately) > _PEER_COUNT_MAX:
            del self._lately[next(iter(self._lately))]
        return count < _RATE_COUNT_MAX
