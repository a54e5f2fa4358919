"""
Whoever asks the keeper: the socket keeper.sock, its connections, one JSON request and one answer each.

Light to import. Layer: node. Who calls: node.keeper. State: connections that have not asked yet, a bounded number: the
one that has been silent longest goes first.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

from lazyfs.node.callers import foreigner
from lazyfs.node.keeperstart import listen

if TYPE_CHECKING:
    import socket

_BACKLOG = 8
_REQUEST_BYTES_MAX = 64 * 1024
_CLIENT_COUNT_MAX = 16
_REPLY_S = 1.0


class Clients:
    """See the module. For root only: the socket's mode says so, and callers.foreigner(). `root`: the run directory."""

    def __init__(self, root: str) -> None:
        self._server = listen(root, "keeper.sock", _BACKLOG)
        self._silent: dict[int, socket.socket] = {}

    @property
    def descriptors(self) -> list[int]:
        """To be polled for input."""
        return [self._server.fileno(), *self._silent]

    def take(self, ready: set[int]) -> list[tuple[socket.socket, dict[str, Any]]]:
        """Who has asked what, of those that have input; the caller answers by reply(), soon or later."""
        if self._server.fileno() in ready:
            self._accept()
        found = []
        for descriptor in [one for one in self._silent if one in ready]:
            client = self._silent.pop(descriptor)
            try:
                request = json.loads(client.recv(_REQUEST_BYTES_MAX))
                request["op"]
            except (OSError, ValueError, LookupError, TypeError, RecursionError):
                client.close()
            else:
                found.append((client, request))
        return found

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._server.accept()
            if who := foreigner(client):
                print(f"lazyfs keeper: connection refused: {who}", file=sys.stderr, flush=True)
                client.close()
                return
            client.setblocking(False)
            self._silent[client.fileno()] = client
            if len(self._silent) > _CLIENT_COUNT_MAX:
                self._silent.pop(next(iter(self._silent))).close()


def reply(client: socket.socket, answer: dict[str, Any]) -> None:
    """Answer, and be done with it."""
    with contextlib.suppress(OSError):
        client.setblocking(True)
        client.settimeout(_REPLY_S)
        client.sendall(json.dumps(answer).encode() + b"\n")
    client.close()
