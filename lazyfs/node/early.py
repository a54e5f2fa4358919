"""
The worker's process, started before it is known whether it is needed.

Importing trio, numpy and urllib3 takes longer than all else that `lazyfs mount` does, so a process begins with
that while the command line is still being read. It does nothing else until it is told its place; if that never comes,
it ends. Light to import: nothing but the standard library's smallest modules.

Layer: node. Who calls: cli.entry (begin), node.launch (take, discard). State: the one process that is in store.
Protocol: the first line on the socket is the worker's place; then it is the starter's control connection.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
from dataclasses import dataclass
from typing import NoReturn

_LINE_BYTES_MAX = 64 * 1024
_store: list[EarlyWorker] = []   # of one at most


@dataclass(frozen=True, slots=True)
class EarlyWorker:
    """A process that is importing. `connection`: our end."""

    process: int
    connection: socket.socket

    def employ(self, cache_dir: str) -> None:
        """Tell it which cache directory it serves. Its errors arrive on the connection."""
        self.connection.sendall(json.dumps({"cache_dir": cache_dir}).encode() + b"\n")


def begin() -> None:
    """Fork one and keep it in store. Call it while this process has one thread."""
    if not _store:
        ours, theirs = socket.socketpair()
        process = os.fork()
        if process == 0:
            ours.close()
            _live(theirs)
        theirs.close()
        _store.append(EarlyWorker(process, ours))


def take() -> EarlyWorker:
    """The one in store, or a new one. It is the caller's now."""
    begin()
    return _store.pop()


def discard() -> None:
    """End the one in store: another worker does the job."""
    if _store:
        worker = _store.pop()
        worker.connection.close()
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(worker.process, signal.SIGKILL)
            os.waitpid(worker.process, 0)


def _live(connection: socket.socket) -> NoReturn:
    code = 70
    try:
        _leave_the_caller(connection)
        from lazyfs.fs.mounter import start_mounter  # noqa: PLC0415

        _, mounter = start_mounter()   # before threads, big imports and /dev/fuse
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")   # numpy's idle threads spin, and we need none
        gc.disable()                   # a tenth of the time that imports take
        from lazyfs.node import serving  # noqa: PLC0415

        gc.freeze()
        gc.enable()
        place = _read_line(connection)
        code = serving.run_employed(json.loads(place)["cache_dir"], connection, mounter) if place else 0
    except BaseException:  # noqa: BLE001 - the child must never come back into its parent's code
        import traceback  # noqa: PLC0415

        traceback.print_exc()
    finally:
        os._exit(code)


def _leave_the_caller(connection: socket.socket) -> None:
    """Own session, no streams and descriptors of the caller's (its pipes must see their end)."""
    os.setsid()
    os.chdir("/")
    os.umask(0o077)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for ignored in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):   # the latter two: lazyfs.stacks, later
        signal.signal(ignored, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    kept = connection.fileno()
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX") if kept < 1024 else kept + 1024)


def _read_line(connection: socket.socket) -> bytes:
    """Up to the first line's end and not a byte further; b"" when the other end closed first."""
    line = bytearray()
    while len(line) < _LINE_BYTES_MAX:
        byte = connection.recv(1)
        if byte in (b"", b"\n"):
            return bytes(line) if byte else b""
        line += byte
    return b""
