"""
Find the worker of a cache directory, or start one, and give it a mount order.

Layer: node; light to import: the time from the command to the mount counts.
Who calls: cli.mount. Several commands at once: whoever gets the run directory's lock starts the worker, the others
find it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyfs.errors import BugError, DeadlineError
from lazyfs.node import early
from lazyfs.node.protocol import MOUNT, ControlClient, WorkerGoneError
from lazyfs.node.rundir import ProcessIdentity, WorkerDir, daemon_dir
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
    daemon = find_daemon()
    if daemon is not None and daemon.cache_dir == cache_dir:
        early.discard()
        return _ask_daemon(daemon.directory, order, attached=attached)
    directory = WorkerDir.of_cache(cache_dir)
    deadline = time.monotonic() + _FIND_S
    while time.monotonic() < deadline:
        directory.create()
        with contextlib.suppress(WorkerGoneError):
            client = ControlClient.connect(directory.socket)
            early.discard()
            return _ask(client, order, None, attached=attached)
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


@dataclass(frozen=True, slots=True)
class Daemon:
    """The node's daemon: it runs, or is just getting a new worker."""

    directory: WorkerDir
    cache_dir: str


def find_daemon() -> Daemon | None:
    """The daemon of this node, if its keeper or its worker lives."""
    directory = daemon_dir()
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        data = json.loads(directory.keeper_identity.read_bytes())
        keeper = ProcessIdentity(int(data["pid"]), int(data["start_ticks"]), str(data["boot_id"]))
        if keeper.alive or directory.worker() is not None:
            return Daemon(directory, str(data["cache_dir"]))
    return None


def _ask_daemon(directory: WorkerDir, order: MountOrder, *, attached: bool) -> MountHandle:
    """A worker that dies meanwhile is followed by another, which is asked again."""
    deadline = time.monotonic() + _FIND_S
    ensure = False
    while True:
        try:
            client = ControlClient.connect(directory.socket)
            try:
                result = client.request(MOUNT, MOUNT_REQUEST_S, order=order.to_json(), attached=attached, ensure=ensure)
            except BaseException:
                client.close()
                raise
            return MountHandle(client, result, None)
        except WorkerGoneError:
            if time.monotonic() > deadline:
                raise DeadlineError("the daemon's worker does not answer", hint="lazyfs daemon status") from None
            ensure = True
            time.sleep(_POLL_S)


def _ask(client: ControlClient, order: MountOrder, child: int | None, *, attached: bool) -> MountHandle:
    try:
        result = client.request(MOUNT, MOUNT_REQUEST_S, order=order.to_json(), attached=attached)
    except BaseException:
        client.close()   # the worker undoes what it has begun
        raise
    return MountHandle(client, result, child)


def _start(directory: WorkerDir, order: MountOrder, cache_dir: str, *, attached: bool) -> MountHandle:
    """Employ a worker and be its first client. The caller holds the lock."""
    worker = early.take()
    child = worker.process
    client = ControlClient(worker.connection)
    try:
        worker.employ(cache_dir)
        return _ask(client, _with_seed(directory, order, cache_dir), child, attached=attached)
    except (WorkerGoneError, ConnectionError):
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
