"""
Find the worker of a cache directory, or start one, and give it a mount order.

Layer: node; light to import, and forks before anything heavy is: the time from the command to the mount counts.
Who calls: cli.mount. Several commands at once: whoever gets the run directory's lock starts the worker, the others
find it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lazyfs.errors import BugError, DeadlineError, HostError
from lazyfs.node.protocol import MOUNT, ControlClient, WorkerGoneError
from lazyfs.node.rundir import WorkerDir
from lazyfs.node.unmount import clean_stale

if TYPE_CHECKING:
    from lazyfs.node.order import MountOrder

MOUNT_REQUEST_S = 600.0          # a bootstrap of millions of files over a slow link
_FIND_S = 60.0                   # for a worker that is starting or ending
_POLL_S = 0.01
_END_S = 5.0                     # a worker that could not mount cleans up after itself
_LOG_TAIL_BYTES = 2000


class MountHandle:
    """A mount that was made. `result`: node.mounted describe(). An attached one ends when it is closed."""

    def __init__(self, client: ControlClient, result: dict[str, Any], child: int | None) -> None:
        self.result = result
        self._client = client
        self._child = child

    def wait(self) -> None:
        """Until the mount's worker goes away."""
        self._client.wait_closed()

    def close(self) -> None:
        """Give the connection back. An attached mount is now taken away: wait for a worker that we started."""
        self._client.close()
        if self._child is not None:
            _wait_child(self._child, _END_S)


def mount_image(order: MountOrder, cache_dir: str, *, attached: bool = False) -> MountHandle:
    """
    Mount an image by the worker of `cache_dir`, which is started if there is none.

    Args:
        order: what and where.
        cache_dir: absolute, resolved.
        attached: the mount lasts only as long as the handle.

    Raises:
        LazyfsError: whatever is in the way; nothing is left behind.

    """
    directory = WorkerDir.of_cache(cache_dir)
    deadline = time.monotonic() + _FIND_S
    while time.monotonic() < deadline:
        directory.create()
        with contextlib.suppress(WorkerGoneError):
            return _ask(ControlClient.connect(directory.socket), order, None, attached=attached)
        lock = directory.try_lock()
        if lock is not None:
            try:
                if directory.worker() is None:
                    clean_stale(directory)
                    return _start(directory, order, cache_dir, attached=attached)
            finally:
                os.close(lock)
        time.sleep(_POLL_S)   # another command is starting one, or one is ending
    raise DeadlineError(
        f"the worker of {cache_dir} neither answers nor ends", hint=f"look at it: {directory.identity}, {directory.log}"
    )


def _ask(client: ControlClient, order: MountOrder, child: int | None, *, attached: bool) -> MountHandle:
    try:
        result = client.request(MOUNT, MOUNT_REQUEST_S, order=order.to_json(), attached=attached)
    except BaseException:
        client.close()   # the worker undoes what it has begun
        raise
    return MountHandle(client, result, child)


def _start(directory: WorkerDir, order: MountOrder, cache_dir: str, *, attached: bool) -> MountHandle:
    """Fork a worker and be its first client. The caller holds the lock."""
    ours, theirs = socket.socketpair()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        ours.close()
        _become_worker(directory, cache_dir, theirs)
    theirs.close()
    client = ControlClient(ours)
    try:
        return _ask(client, _with_seed(directory, order, cache_dir), child, attached=attached)
    except WorkerGoneError:
        status = _wait_child(child, _END_S)
        text = f"the worker process ended unexpectedly ({_status_text(status)})"
        raise BugError(text, hint=f"its last words: {_log_tail(directory)}") from None
    except BaseException:
        client.close()   # the worker ends when it sees that
        _wait_child(child, _END_S)
        directory.remove()
        raise


def _with_seed(directory: WorkerDir, order: MountOrder, cache_dir: str) -> MountOrder:
    from lazyfs.node.seed import fetch_seed  # noqa: PLC0415 - heavy, and the worker is already on its way

    return fetch_seed(order, Path(cache_dir), directory.seed)


def _become_worker(directory: WorkerDir, cache_dir: str, first: socket.socket) -> NoReturn:
    code = 70
    try:
        os.setsid()
        os.chdir("/")
        os.umask(0o077)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        _redirect(directory, first)
        from lazyfs.fs.mounter import start_mounter  # noqa: PLC0415

        _, mounter = start_mounter()   # before threads, big imports and /dev/fuse
        from lazyfs.node.serving import run_worker  # noqa: PLC0415

        code = run_worker(directory, cache_dir, first, mounter)
    except BaseException:  # noqa: BLE001 - the child must never come back into its parent's code
        import traceback  # noqa: PLC0415

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def _redirect(directory: WorkerDir, keep: socket.socket) -> None:
    """Standard streams to the log, nothing else of the caller's stays open (its pipes must see their end)."""
    try:
        log = os.open(directory.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(f"cannot write {directory.log}: {error.strerror}") from error
    null = os.open(os.devnull, os.O_RDONLY)
    for source, number in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, number)
    kept = keep.fileno()
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX") if kept < 1024 else kept + 1024)


def _wait_child(child: int, timeout_s: float) -> int | None:
    """Its wait status, or None: still running (it then is on its own)."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(ChildProcessError):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return status
        if time.monotonic() > deadline:
            return None
        time.sleep(_POLL_S)


def _status_text(status: int | None) -> str:
    if status is None:
        return "it does not end"
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return f"exit code {os.WEXITSTATUS(status)}"


def _log_tail(directory: WorkerDir) -> str:
    with contextlib.suppress(OSError):
        text = directory.log.read_bytes()[-_LOG_TAIL_BYTES:].decode("utf-8", "replace").strip()
        return text.splitlines()[-1] if text else "none"
    return f"see {directory.log}"
