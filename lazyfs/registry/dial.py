"""
Connections whose every wait ends at an absolute deadline, under urllib3's pool.

Layer: registry; used by transport.py alone. urllib3 and http.client know timeouts per system call only, so a server
that drips one byte a second would hold a reader for ever. Here each recv() of headers and body is given
min(io timeout, deadline - now), looking a name up and connecting share one budget, and a look at the resolved address,
before anything is sent there, keeps servers from sending us to networks that are closed to them (redirects, token
realms; a name that resolves differently the next time is looked at each time). Where a proxy is asked
(proxies.py) it resolves the name; its own address may be anywhere.

The limits of the request being sent travel in a thread-local (`CURRENT`), since urllib3 makes connections and
responses deep inside; a response keeps its own copy, so another thread may read it.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING, Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import NameResolutionError, NewConnectionError

from lazyfs.errors import DeadlineError, SourceError
from lazyfs.limits import CONNECT_TIMEOUT_S, IO_TIMEOUT_S
from lazyfs.registry.addresses import Reach, reach_of
from lazyfs.registry.names import find_addresses

if TYPE_CHECKING:
    from lazyfs.registry.hedge import Connection
    from lazyfs.registry.proxies import Proxy

# Headers and small bodies are read through this; large body reads bypass it (BufferedReader.read1 goes straight to
# the socket when its buffer is empty), so it costs no copy.
_BUFFER_BYTES = 16 * 1024
_SEND_BYTES = 256 * 1024  # of a file at a time when uploading
POOL_CONNECTIONS = 32     # one host's; a mount fetches with 16 threads, the mirror with 32
POOL_HOSTS = 8


class RequestLimits(threading.local):
    """What bounds the request that this thread is sending."""

    deadline: float = float("inf")      # time.monotonic()
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    io_timeout_s: float = IO_TIMEOUT_S
    reach: Reach = Reach.MACHINE        # the most private address that may be asked
    connection: Connection | None = None    # where another thread may cut the request off


CURRENT = RequestLimits()


def remaining_s(deadline: float, at_most_s: float) -> float:
    """
    A timeout for the next system call.

    Raises:
        TimeoutError: the deadline has passed.

    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("deadline")
    return min(left, at_most_s)


class DeadlineSocketIO(io.RawIOBase):
    """
    A socket's receiving side; `deadline` may be moved between reads.

    `plain` is the file that http.client opened: while it is open, closing the socket only marks it, so that the rest
    of a body can be read after "Connection: close".
    """

    def __init__(self, sock: socket.socket, plain: io.BufferedIOBase, deadline: float, io_timeout_s: float) -> None:
        self._sock = sock
        self._plain = plain
        self.deadline = deadline
        self.io_timeout_s = io_timeout_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        sock = self._sock
        sock.settimeout(remaining_s(self.deadline, self.io_timeout_s))
        count = sock.recv_into(buffer)
        if 0 < count < len(buffer) and isinstance(sock, ssl.SSLSocket):
            return count + _more(sock, memoryview(buffer)[count:])
        return count

    def close(self) -> None:
        super().close()
        self._plain.close()


def check_reach(host: str, address: str, allowed: Reach) -> None:
    """Raises SourceError: `host`, at `address`, is more private than whoever sent us there may send us."""
    found = reach_of(address)
    if found <= allowed:
        return
    if found is Reach.MACHINE:
        raise SourceError(f"{host} is an address of this machine or its link: a server elsewhere may not send us there",
                          transient=False)
    raise SourceError(f"{host} is a private address ({address}): a server outside may not send us there",
                      transient=False, hint='if this registry may: allow_private in [registry.host."NAME"] '
                                            "(docs/credentials.md)")


def _more(sock: ssl.SSLSocket, view: memoryview) -> int:
    """What has come besides, without waiting: TLS gives a record of 16 KiB at a time, and the way up costs as much."""
    count = 0
    sock.settimeout(0)
    try:
        while count < len(view) and (more := sock.recv_into(view[count:])):
            count += more
    except ssl.SSLWantReadError:
        pass
    return count


def _peer(sock: socket.socket) -> str:
    """The address that answers; "": it has gone already."""
    with contextlib.suppress(OSError):
        return str(sock.getpeername()[0])
    return ""


def _show(sock: socket.socket) -> None:
    """To whoever may cut this thread's request off."""
    if CURRENT.connection is not None:
        CURRENT.connection.attach(sock)


class DeadlineResponse(http.client.HTTPResponse):
    """
    http.client's response, reading through a DeadlineSocketIO.

    `fp`, `length` (of what is left of the body) and `chunked` are http.client's. `peer`: the address that answers.
    """

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        _show(sock)
        self.peer = _peer(sock)
        self.raw_io = DeadlineSocketIO(sock, self.fp, CURRENT.deadline, CURRENT.io_timeout_s)
        self.fp = io.BufferedReader(self.raw_io, _BUFFER_BYTES)

    def receive_into(self, view: memoryview) -> int | None:
        """As read1, but into `view` and past urllib3; None: not for this body, whose length is not known."""
        if self.isclosed() or self.chunked or self.length is None:
            return None
        count = self.fp.readinto1(view[: self.length])
        self.length -= count
        if not (count and self.length):
            self.close()    # as urllib3 does: the connection is free for the next request
        return count


class _Dialling(HTTPConnection):
    """Mixed into both connection classes."""

    response_class = DeadlineResponse

    def request(self, *args: Any, **kwargs: Any) -> None:
        """urllib3 would send with the connect timeout, for each piece of the body."""
        self.timeout = remaining_s(CURRENT.deadline, CURRENT.io_timeout_s)
        super().request(*args, **kwargs)

    def _new_conn(self) -> socket.socket:
        deadline = min(CURRENT.deadline, time.monotonic() + CURRENT.connect_timeout_s)
        try:
            found = find_addresses(self._dns_host, self.port, deadline)
        except TimeoutError as error:
            late = DeadlineError if time.monotonic() >= CURRENT.deadline else SourceError
            raise late(f"cannot find the host {self.host}: no name server answered in time",
                       hint="check /etc/resolv.conf, and whether its servers can be reached") from error
        except (socket.gaierror, UnicodeError) as error:
            reason = error if isinstance(error, socket.gaierror) else socket.gaierror(socket.EAI_NONAME, "no such name")
            raise NameResolutionError(self.host, self, reason) from error
        last: OSError = OSError("no address")
        for family, kind, protocol, _, address in found:
            if self.proxy is None:
                check_reach(self.host, str(address[0]), CURRENT.reach)
            sock = socket.socket(family, kind, protocol)
            _show(sock)
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.settimeout(remaining_s(deadline, CURRENT.connect_timeout_s))
                sock.connect(address)
                # Bounds a TLS handshake too: CPython counts it as one operation.
                sock.settimeout(remaining_s(CURRENT.deadline, CURRENT.io_timeout_s))
            except OSError as error:
                sock.close()
                last = error
            except BaseException:
                sock.close()
                raise
            else:
                return sock
        if isinstance(last, TimeoutError):
            raise last
        raise NewConnectionError(self, str(last)) from last


class DeadlineHTTPConnection(_Dialling):
    pass


class DeadlineHTTPSConnection(_Dialling, HTTPSConnection):
    pass


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = DeadlineHTTPConnection


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = DeadlineHTTPSConnection

    def _validate_conn(self, conn: Any) -> None:
        """Connects, as the base does; without its warning where --insecure was asked for."""
        if conn.is_closed:
            conn.connect()


def make_pool(context: ssl.SSLContext, proxy: Proxy | None = None) -> urllib3.PoolManager:
    """A pool manager of such connections, or of such through a proxy; thread-safe."""
    settings: dict[str, Any] = {"num_pools": POOL_HOSTS, "maxsize": POOL_CONNECTIONS, "block": False, "retries": False,
                                "ssl_context": context, "blocksize": _SEND_BYTES}
    pool = (urllib3.PoolManager(**settings) if proxy is None
            else urllib3.ProxyManager(proxy.url, proxy_headers=proxy.headers, **settings))
    pool.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
    return pool
