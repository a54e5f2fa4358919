"""
The control protocol between a worker and whoever asks it: the client's side, light to import.

A unix stream socket, mode 0600, in the worker's run directory; the worker also checks that the peer is root or its
own user (SO_PEERCRED). One JSON object a line each way: {"op": ..., ...} -> {"result": ...} or {"error": {...}}
(fs.isolate.error_to). Requests on one connection are answered in order. Operations: MOUNT, UNMOUNT, LIST, STATS,
TOUCHED, HEALTH, STATUS, TRACE, DUMP, USAGE, EVICT, SCRUB, CREDENTIALS, REST, SHUTDOWN; their arguments stand with the
functions of node.control.

Layer: node. Who calls: node.launch, cli.mount; the snapshotter, later.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import TYPE_CHECKING, Any, Self

from lazyfs.errors import BugError, DeadlineError
from lazyfs.fs.isolate import error_from

if TYPE_CHECKING:
    from pathlib import Path

MOUNT, UNMOUNT, LIST, STATS, SHUTDOWN = "mount", "unmount", "list", "stats", "shutdown"
TOUCHED, HEALTH, USAGE, EVICT = "touched", "health", "usage", "evict"
PIN, FETCH, COPIES = "pin", "fetch", "copies"    # node.copying
STATUS, TRACE, DUMP = "status", "trace", "dump"    # node.observing
CREDENTIALS, REST, SCRUB = "credentials", "rest", "scrub"
LINE_BYTES_MAX = 1 << 20         # a mount request is 1 KiB; 1,000 mounts 300 KiB; 15,000 touches 750 KiB


class WorkerGoneError(Exception):
    """The worker ended, or is ending: look again, or start another one. Never leaves lazyfs.node."""


def connect_to(client: socket.socket, path: Path) -> None:
    """Connect to a unix socket whose path may be of any length: sockaddr_un holds 108 bytes. Raises OSError."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        client.connect(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)


class ControlClient:
    """One connection to a worker. Blocking, one request at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = connection.makefile("rwb")

    @classmethod
    def connect(cls, path: Path, timeout_s: float = 5.0) -> Self:
        """
        Connect to a worker's socket.

        Raises:
            WorkerGoneError: nobody listens there.

        """
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout_s)
        try:
            connect_to(connection, path)
        except OSError as error:
            connection.close()
            raise WorkerGoneError(str(error)) from error
        return cls(connection)

    def request(self, operation: str, timeout_s: float, **arguments: Any) -> Any:
        """
        Ask, and wait for the answer.

        Raises:
            LazyfsError: what the worker answered.
            DeadlineError: no answer within `timeout_s`.
            WorkerGoneError: the worker ended without an answer.

        """
        self._connection.settimeout(timeout_s)
        try:
            self._send(json.dumps({"op": operation, **arguments}).encode() + b"\n")
            line = self._stream.readline(LINE_BYTES_MAX)
        except TimeoutError as error:
            hint = "if it does not recover, detach its mounts: lazyfs umount --force DIR"
            raise DeadlineError(f"the worker did not answer within {timeout_s:g} s", hint=hint) from error
        except OSError as error:
            raise WorkerGoneError(str(error)) from error
        if not line.endswith(b"\n"):
            raise WorkerGoneError("the worker closed the connection")
        reply = json.loads(line)
        if reply.get("closing"):
            raise WorkerGoneError("the worker is ending")
        if "error" in reply:
            raise error_from(reply["error"])
        if "result" not in reply:
            raise BugError(f"the worker answered {reply!r:.100}")
        return reply["result"]

    def _send(self, line: bytes) -> None:
        try:
            self._stream.write(line)
            self._stream.flush()
        except (BrokenPipeError, ConnectionResetError):
            pass   # a worker that cannot serve says why, and ends: what it said can still be read

    def wait_closed(self) -> None:
        """Block until the worker closes the connection (for as long as it takes; a signal ends it)."""
        self._connection.settimeout(None)
        while self._connection.recv(4096):
            pass

    def is_closed(self) -> bool:
        """Whether the worker has closed the connection. Does not wait."""
        self._connection.settimeout(0)   # with a time limit Python itself waits, whatever the flags say
        try:
            return not self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        with contextlib.suppress(OSError):   # the worker is gone, and what was still to be sent with it
            self._stream.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
