"""
Who is at the other end of a unix socket: root and our own user may ask, nobody else, whatever the socket's mode is.

Light to import. Layer: node. Who calls: node.control, node.keeperclients, snapshotter.door. No state.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Protocol

_CREDENTIALS = struct.Struct("3i")   # struct ucred: pid, uid, gid (unix(7))


class HasOptions(Protocol):
    """A socket, the standard library's or trio's."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes: ...


def foreigner(connection: HasOptions) -> str:
    """Who the peer is, if it is neither root nor our own user: "user 1000, process 4711"; else ""."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return "" if uid in {0, os.geteuid()} else f"user {uid}, process {pid}"
