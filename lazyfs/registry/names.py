"""
Host names to addresses, with a deadline.

Layer: registry; used by dial.py. getaddrinfo() waits for its name servers as long as resolv.conf says (half a minute
where none answers) and cannot be interrupted, so it runs in a thread of its own, one a name however many wait; who is
late leaves it behind. Addresses need no name server and no thread.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

_LOCK = threading.Lock()
_RUNNING: dict[tuple[str, int], _Lookup] = {}   # bounded: one a name, and each ends when the C library gives up

Addresses = Sequence[tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[Any, ...]]]


class _Lookup:
    """One call of getaddrinfo()."""

    def __init__(self, host: str, port: int) -> None:
        self._key = (host, port)
        self.done = threading.Event()
        self.found: Addresses | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.found = socket.getaddrinfo(*self._key, 0, socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            self.error = error
        finally:
            with _LOCK:
                _RUNNING.pop(self._key, None)
            self.done.set()


def find_addresses(host: str, port: int, deadline: float) -> Addresses:
    """
    What socket.getaddrinfo() says about a stream to `host`, before `deadline` (absolute, time.monotonic()).

    Raises:
        socket.gaierror: there is no such name, or no name server; UnicodeError: a name that cannot be asked for.
        TimeoutError: no answer yet.

    """
    try:
        return socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass   # a name
    with _LOCK:
        lookup = _RUNNING.get((host, port))
        is_new = lookup is None
        if lookup is None:
            lookup = _RUNNING[host, port] = _Lookup(host, port)
    if is_new:
        try:
            threading.Thread(target=lookup.run, name=f"lookup of {host}", daemon=True).start()
        except RuntimeError:
            lookup.run()   # no thread to be had: late is better than never
    if not lookup.done.wait(max(deadline - time.monotonic(), 0)):
        raise TimeoutError(host)
    if lookup.error is not None:
        raise lookup.error
    assert lookup.found is not None
    return lookup.found
