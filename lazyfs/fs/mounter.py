"""
The mounter: a small process beside the worker that mounts and unmounts for it.

It is forked before the worker imports anything heavy or opens /dev/fuse, has one thread, and runs each request in a
child of its own with a deadline (fs.isolate says why a worker must not do this itself). It ends when the worker's end
of the socket closes, and deliberately unmounts nothing then: whoever still reads sees errors, not an empty directory.

Layer: fs. Who calls: node.launch starts it, node.worker uses the client. Protocol: one JSON object a line each way,
one request at a time: {"call": name, "arguments": [...], "timeout_s": s} -> {"result": ...} or {"error": {...}}.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any

from lazyfs.errors import BugError
from lazyfs.fs import drivers, mountapi
from lazyfs.fs.isolate import call_isolated, error_from, error_to

if TYPE_CHECKING:
    from collections.abc import Callable

_DESCRIPTOR_COUNT_MAX = 64     # the starter is young: it has a handful
_CALLS: dict[str, Callable[..., Any]] = {
    "mount_erofs": drivers.mount_erofs,
    "mount_tree": drivers.mount_tree,
    "unmount": mountapi.unmount,
}


def start_mounter() -> tuple[int, socket.socket]:
    """
    Fork the mounter. Call it while the process has one thread and no descriptor that must not be kept open.

    Returns:
        Its process id and the worker's end of the socket.

    """
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child:
        theirs.close()
        return child, ours
    try:
        os.closerange(3, theirs.fileno())   # others must see the worker's descriptors close when it dies
        os.closerange(theirs.fileno() + 1, theirs.fileno() + _DESCRIPTOR_COUNT_MAX)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)   # a terminal's ^C is for the worker; we end with it
        serve(theirs)
    finally:
        os._exit(0)


def serve(connection: socket.socket) -> None:
    """Answer requests until the other end closes."""
    with connection, connection.makefile("rwb") as stream:
        for line in stream:
            try:
                request = json.loads(line)
                function = _CALLS[request["call"]]
                result = call_isolated(function, *request["arguments"], timeout_s=request["timeout_s"])
                reply = {"result": result}
            except Exception as error:  # noqa: BLE001 - the worker is told
                reply = {"error": error_to(error)}
            stream.write(json.dumps(reply).encode() + b"\n")
            stream.flush()


class MounterClient:
    """
    The worker's end. Blocking; call it from a thread. One call at a time, the others wait.

    `lost`: the process has died, or does not answer: no call will succeed any more.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.lost = False
        self._lock = threading.Lock()
        self._connection = connection
        self._stream = connection.makefile("rwb")

    def call(self, name: str, *arguments: Any, timeout_s: float) -> Any:
        """
        Have `name` (a key of the mounter's table) called.

        Raises:
            LazyfsError: what the call raised; DeadlineError after `timeout_s`.
            BugError: the mounter process is gone.

        """
        with self._lock:
            reply = self._ask({"call": name, "arguments": arguments, "timeout_s": timeout_s}, timeout_s)
        if "error" in reply:
            raise error_from(reply["error"])
        return reply["result"]

    def _ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        try:
            self._connection.settimeout(timeout_s + 5)   # it answers at timeout_s; this is for a dead one
            self._stream.write(json.dumps(request).encode() + b"\n")
            self._stream.flush()
            line = self._stream.readline()
        except OSError as error:
            self.lost = True   # also after a late answer: nobody would know whose it is
            raise BugError(f"the mounter process does not answer: {error}") from error
        if not line:
            self.lost = True
            raise BugError("the mounter process has died")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        """Let the mounter end."""
        with contextlib.suppress(OSError):   # it is dead, and what was still to be sent with it
            self._stream.close()
        self._connection.close()
