"""
One HTTP request and its answer: blocking, with an absolute deadline, every failure a SourceError.

Layer: registry; used by endpoint.py, auth.py and client.py. Follows no redirect, knows no credentials, retries
nothing: those are decisions of the layers above. Urllib3 is the HTTP library (design.md: three times httpx' throughput
a core); its connections are those of dial.py.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import socket
import ssl
import time
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Self

import urllib3
import urllib3.exceptions as u3

from lazyfs import requestid
from lazyfs.errors import DeadlineError, FormatError, LazyfsError, ResourceError, SourceError
from lazyfs.limits import KIB
from lazyfs.registry.addresses import Reach, origin_of, printable, reach_of
from lazyfs.registry.dial import CURRENT, DeadlineResponse, check_reach, make_pool
from lazyfs.registry.proxies import Proxies
from lazyfs.registry.trust import Trust, tls_context

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from lazyfs.registry.dial import DeadlineSocketIO
    from lazyfs.registry.options import RegistryOptions
    from lazyfs.registry.proxies import Proxy

_DRAIN_BYTES = 64 * KIB  # an unread rest up to this is read off, so that the connection can be used again
_ON_NODES = 'for what a node reads: ca_file or insecure in [registry.host."NAME"], or hosts.toml (docs/credentials.md)'
# They pass: back-pressure, no failure of anybody. The last two are getaddrinfo's, when it has no descriptor or memory.
_OUR_LIMITS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, socket.EAI_SYSTEM, socket.EAI_MEMORY}
_FAILURES = (u3.HTTPError, OSError, http.client.HTTPException, ValueError)


@dataclass(frozen=True, slots=True)
class Call:
    """A request. `body`: bytes or a file from which exactly `body_size` bytes are sent."""

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | IO[bytes] | None = None
    body_size: int = 0
    io_timeout_s: float | None = None  # None: the options'
    reach: Reach = Reach.MACHINE       # the most private address that it may go to

    @property
    def where(self) -> str:
        return f"{self.method} {printable(self.url)}"


class HttpResponse:
    """
    An answer whose body is read as it comes. Use as a context manager, or call finish() or close().

    `on_failure`: told when the body did not come, or was not what it should be; says whether there is another server
    to ask. `server`: which of the registry's servers this is, where that was chosen; for statistics.
    `reach`: of the address that answered; through a proxy nobody knows, and it counts as public.
    """

    __slots__ = ("_body", "_open", "_raw", "_raw_io", "headers", "on_failure", "reach", "server", "status", "url",
                 "where")

    def __init__(self, raw: urllib3.BaseHTTPResponse, call: Call, *, direct: bool) -> None:
        body = getattr(raw, "_fp", None)
        self._raw = raw
        self._body: DeadlineResponse | None = body if isinstance(body, DeadlineResponse) else None
        self._raw_io: DeadlineSocketIO | None = self._body.raw_io if self._body is not None else None
        self._open = True
        self.reach = reach_of(self._body.peer) if direct and self._body is not None else Reach.PUBLIC
        self.server = ""
        self.on_failure: Callable[[LazyfsError], bool] | None = None
        self.status = raw.status
        self.headers = raw.headers
        self.url = call.url
        self.where = call.where

    @property
    def length(self) -> int | None:
        """Content-Length, if the answer has a believable one: none beside a Transfer-Encoding (RFC 9112 §6.3)."""
        text = "" if "Transfer-Encoding" in self.headers else self.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None

    def set_deadline(self, deadline: float) -> None:
        """From now on reads end at `deadline` (time.monotonic())."""
        if self._raw_io is not None:
            self._raw_io.deadline = deadline

    def read(self, size: int) -> bytes:
        """Up to `size` bytes as soon as some are there; b"" at the body's end. Raises SourceError."""
        try:
            return self._raw.read1(size)
        except _FAILURES as error:
            raise self._broken(error) from error

    def readinto(self, view: memoryview) -> int:
        """As read(), into `view`: how many bytes; 0 at the body's end. Through fewer hands, where the body allows."""
        try:
            count = self._body.receive_into(view) if self._body is not None else None
            if count is None:
                data = self._raw.read1(len(view))
                view[: len(data)] = data
                return len(data)
        except _FAILURES as error:
            raise self._broken(error) from error
        if self._raw.length_remaining is not None:
            self._raw.length_remaining -= count    # urllib3 has not seen these bytes go by
        return count

    def _broken(self, error: Exception) -> LazyfsError:
        self.close()
        explained = explain(error, self.where, self.url, self._raw_io.deadline if self._raw_io is not None else 0.0)
        self.fail(explained)
        return explained

    def fail(self, error: LazyfsError) -> bool:
        """What came is not what was promised: tell whoever chose this server. True: another one can be asked."""
        others = self.on_failure is not None and self.on_failure(error)
        if isinstance(error, SourceError):
            error.elsewhere = others
        return others

    def read_all(self, size_max: int) -> bytes:
        """
        The whole body.

        Raises:
            FormatError: it is larger than `size_max` bytes.
            SourceError: it did not arrive.

        """
        pieces, left = [], size_max + 1
        while left > 0 and (piece := self.read(left)):
            pieces.append(piece)
            left -= len(piece)
        if left <= 0:
            self.close()
            raise FormatError(f"{self.where}: the answer is larger than {size_max} bytes")
        self.finish()
        return b"".join(pieces)

    def finish(self) -> None:
        """Give the connection back for the next request if the body is at its end, or nearly; else drop it."""
        if not self._open:
            return
        left = self.length
        if self._raw_io is not None:
            self._raw_io.deadline = min(self._raw_io.deadline, time.monotonic() + 1.0)
        try:
            if left is not None and left <= _DRAIN_BYTES:
                while self._raw.read1(_DRAIN_BYTES):
                    pass
            elif self._raw.read1(1):
                self.close()
                return
        except _FAILURES:
            self.close()
            return
        self._open = False
        self._raw.release_conn()

    def close(self) -> None:
        """Drop the connection."""
        if self._open:
            self._open = False
            with contextlib.suppress(*_FAILURES):
                self._raw.close()
            self._raw.release_conn()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


class Transport:
    """Sends requests over pooled connections. Thread-safe. `trust` None: the options'."""

    def __init__(self, options: RegistryOptions, trust: Trust | None = None) -> None:
        """Raises UsageError: a certificate, or a proxy of the environment, cannot be used."""
        self._options = options
        self._proxies = Proxies.of_environment()
        self._context = tls_context(trust or Trust.of(options))
        self._pools: dict[Proxy | None, urllib3.PoolManager] = {None: make_pool(self._context)}

    def _pool_for(self, proxy: Proxy | None) -> urllib3.PoolManager:
        """At most three: straight, and through the proxies for http and https."""
        return self._pools.get(proxy) or self._pools.setdefault(proxy, make_pool(self._context, proxy))

    def send(self, call: Call, deadline: float) -> HttpResponse:
        """
        Send one request and wait for the answer's header.

        `deadline` is absolute, time.monotonic(); it bounds the body's reads too, unless set_deadline() moves it.

        Raises:
            SourceError: nothing, or something that is not HTTP, came back (DeadlineError: in time).

        """
        options = self._options
        origin = origin_of(call.url)
        proxy = self._proxies.find(origin)
        if proxy is not None:     # which resolves names by itself: only of addresses we know where they are
            check_reach(origin.host, origin.host, call.reach)
        CURRENT.deadline, CURRENT.reach = deadline, call.reach
        CURRENT.connect_timeout_s = options.connect_timeout_s
        CURRENT.io_timeout_s = call.io_timeout_s or options.io_timeout_s
        headers = {"User-Agent": options.user_agent, "Accept-Encoding": "identity", **call.headers}
        if request := requestid.current():
            headers["X-Request-Id"] = request
        if call.body is not None:
            headers["Content-Length"] = str(call.body_size)
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise DeadlineError(f"{call.where}: no time left")
        timeout = urllib3.Timeout(connect=min(left_s, options.connect_timeout_s), read=CURRENT.io_timeout_s)
        try:
            pool = self._pool_for(proxy).connection_from_host(origin.host, origin.port, origin.scheme)
            target = _target(call.url)
            if proxy is not None and origin.scheme == "http":
                target = f"http://{origin.netloc}{target}"   # RFC 9112, absolute form
            raw = pool.urlopen(
                call.method, target, body=call.body, headers=headers, retries=False, redirect=False,
                assert_same_host=False, timeout=timeout, preload_content=False, decode_content=False,
            )
        except _FAILURES as error:
            root = _root(error)
            if proxy is not None and (isinstance(error, u3.ProxyError) or isinstance(root, TimeoutError)):
                raise proxy.explain(root, call.where, deadline) from error
            raise explain(error, call.where, call.url, deadline) from error
        response = HttpResponse(raw, call, direct=proxy is None)
        if proxy is not None and response.status == 407:
            response.close()
            raise proxy.demands_credentials(call.where)
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in {"", "identity"}:
            response.close()
            raise SourceError(f"{call.where}: the body is encoded as {encoding[:30]!r}, though identity was asked for",
                              hint="a proxy between here and the registry changes bodies", transient=False)
        return response

    def close(self) -> None:
        for pool in list(self._pools.values()):
            pool.clear()


def _target(url: str) -> str:
    """Path and query as they stand in the URL (a presigned one must not be changed by a single byte)."""
    rest = url.partition("://")[2].partition("#")[0]
    cut = min((i for i in (rest.find("/"), rest.find("?")) if i >= 0), default=len(rest))
    target = rest[cut:]
    return target if target.startswith("/") else "/" + target


def explain(error: Exception, where: str, url: str, deadline: float) -> LazyfsError:
    """The SourceError that a failed request or read is, with the cause in words."""
    origin = origin_of(url)
    host = f"{origin.host}:{origin.port}"
    root = _root(error)
    if isinstance(root, OSError) and root.errno in _OUR_LIMITS:
        return ResourceError(f"{where}: this process cannot open another connection: {root.strerror}",
                             hint="raise the limit of open files (LimitNOFILE=) or of memory")
    if isinstance(root, socket.gaierror):
        # Only "try again" is worth trying again; a wrong name stays wrong.
        return SourceError(f"cannot find the host {origin.host}: {root.strerror}", hint="check the name",
                           transient=root.errno == socket.EAI_AGAIN)
    if isinstance(root, TimeoutError):
        if time.monotonic() >= deadline:
            return DeadlineError(f"{where}: {host} did not deliver in time")
        return SourceError(f"{where}: {host} sent nothing for too long", hint="is the registry reachable and healthy?")
    if isinstance(root, ssl.SSLError) and not isinstance(root, ssl.SSLEOFError):
        return _explain_tls(root, host)
    refused = isinstance(error, u3.NewConnectionError)
    return SourceError(f"cannot connect to {host}: {_cause(root)}" if refused else
                       f"{where}: the connection to {host} broke: {_cause(root)}",
                       hint="is the registry running and reachable?" if refused else "")


def _explain_tls(root: ssl.SSLError, host: str) -> SourceError:
    if isinstance(root, ssl.SSLCertVerificationError):
        return SourceError(f"{host}: its certificate is not trusted: {root.verify_message}", transient=False,
                           hint=f"name its authority with --ca-file, or accept anything with --insecure; {_ON_NODES}")
    return SourceError(f"{host}: no TLS connection: {_cause(root)}", transient=False,
                       hint=f"a registry that speaks plain http needs --insecure; {_ON_NODES}")


def is_untrusted(error: BaseException) -> bool:
    """Whether a SourceError of send() means a certificate that nobody we trust vouches for."""
    return isinstance(_root(error), ssl.SSLCertVerificationError)


def _root(error: BaseException) -> BaseException:
    """The lowest cause that the standard library raised."""
    for _ in range(8):
        inner = next((a for a in (*error.args, error.__cause__) if isinstance(a, BaseException)), None)
        if inner is None:
            break
        error = inner
    return error


def _cause(error: BaseException) -> str:
    """A short reason, of fixed words where we know it: texts of libraries may hold a URL with its query."""
    if isinstance(error, ssl.SSLError):
        return str(error.reason or "TLS failure").replace("_", " ").lower()
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    known: dict[type[BaseException], str] = {
        http.client.IncompleteRead: "the body ended early", u3.IncompleteRead: "the body ended early",
        http.client.RemoteDisconnected: "closed without an answer", http.client.BadStatusLine: "not an HTTP answer",
        u3.InvalidChunkLength: "a broken chunk header", http.client.LineTooLong: "a header line too long",
    }
    return next((text for kind, text in known.items() if isinstance(error, kind)), type(error).__name__)
