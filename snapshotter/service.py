"""
containerd's snapshots service over gRPC on a unix socket: words in, words out; the work is in snapshotter.core.

Layer: snapshotter, the top. Who calls: the command line (`lazyfs snapshotter --behind`), tests. The socket is not the
one that containerd knows: that is snapshotter.door's, which passes its connections on to here.

State: a thread pool that answers, no more than `threads` at once; more requests wait in gRPC's queue, bounded too. A
refusal is a gRPC status with one line of text; containerd makes its own errors of the codes. Metadata of a request is
never read: the namespace is not in it for every containerd, and is part of the keys anyway.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.empty_pb2 import Empty

from lazyfs.errors import DiskFullError, HostError, LazyfsError
from snapshotter import failures
from snapshotter.api import snapshots_pb2 as api
from snapshotter.api.mount_pb2 import Mount as MountMessage
from snapshotter.api.snapshots_pb2_grpc import SnapshotsServicer, add_SnapshotsServicer_to_server
from snapshotter.calls import CALLS, SLOW_S
from snapshotter.model import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from snapshotter.core import Snapshots
    from snapshotter.model import Mount, SnapshotInfo

_LOG = logging.getLogger("lazyfs.snapshotter")
STOP_GRACE_S = 10.0              # requests under way may end
_REQUESTS_MAX = 4096             # waiting or being answered; above it RESOURCE_EXHAUSTED
_LIST_PAGE_BYTES = 256 * 1024    # a message of List; gRPC's clients take 4 MiB, containerd 16
_DETAIL_CHARS = 1024             # gRPC carries it in a header
_KINDS = {Kind.VIEW: api.VIEW, Kind.ACTIVE: api.ACTIVE, Kind.COMMITTED: api.COMMITTED}
_STATUS: tuple[tuple[type[LazyfsError], grpc.StatusCode], ...] = (
    (failures.SnapshotMissingError, grpc.StatusCode.NOT_FOUND),
    (failures.SnapshotExistsError, grpc.StatusCode.ALREADY_EXISTS),
    (failures.SnapshotStateError, grpc.StatusCode.FAILED_PRECONDITION),
    (failures.SnapshotInvalidError, grpc.StatusCode.INVALID_ARGUMENT),
    (failures.SnapshotUnavailableError, grpc.StatusCode.UNAVAILABLE),
    (DiskFullError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (LazyfsError, grpc.StatusCode.INTERNAL),
)


class SnapshotsService(SnapshotsServicer):
    """The ten calls."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots

    def Prepare(self, request: Any, context: Any) -> Any:  # noqa: N802 - so the interface has it
        with _answering(context, "Prepare", request.key):
            found = self._snapshots.prepare(request.key, request.parent, dict(request.labels))
            return api.PrepareSnapshotResponse(mounts=map(_mount, found))

    def View(self, request: Any, context: Any) -> Any:  # noqa: N802
        with _answering(context, "View", request.key):
            found = self._snapshots.view(request.key, request.parent, dict(request.labels))
            return api.ViewSnapshotResponse(mounts=map(_mount, found))

    def Mounts(self, request: Any, context: Any) -> Any:  # noqa: N802
        with _answering(context, "Mounts", request.key):
            return api.MountsResponse(mounts=map(_mount, self._snapshots.mounts(request.key)))

    def Commit(self, request: Any, context: Any) -> Any:  # noqa: N802
        with _answering(context, "Commit", request.name):
            self._snapshots.commit(request.name, request.key, dict(request.labels), request.parent)
            return Empty()

    def Remove(self, request: Any, context: Any) -> Any:  # noqa: N802
        with _answering(context, "Remove", request.key):
            self._snapshots.remove(request.key)
            return Empty()

    def Stat(self, request: Any, context: Any) -> Any:  # noqa: N802
        with _answering(context, "Stat", request.key):
            return api.StatSnapshotResponse(info=_info(self._snapshots.stat(request.key)))

    def Update(self, request: Any, context: Any) -> Any:  # noqa: N802
        with _answering(context, "Update", request.info.name):
            changed = self._snapshots.update(request.info.name, dict(request.info.labels), request.update_mask.paths)
            return api.UpdateSnapshotResponse(info=_info(changed))

    def List(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        with _answering(context, "List", ""):
            found = self._snapshots.find(request.filters)
        page = api.ListSnapshotsResponse()
        room = _LIST_PAGE_BYTES
        for info in map(_info, found):
            room -= info.ByteSize()
            if room < 0 and page.info:
                yield page
                page, room = api.ListSnapshotsResponse(), _LIST_PAGE_BYTES - info.ByteSize()
            page.info.append(info)
        if page.info:
            yield page

    def Usage(self, request: Any, context: Any) -> Any:  # noqa: N802
        with _answering(context, "Usage", request.key):
            usage = self._snapshots.usage(request.key)
            return api.UsageResponse(size=usage.size_bytes, inodes=usage.inodes)

    def Cleanup(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        with _answering(context, "Cleanup", ""):
            self._snapshots.cleanup()
            return Empty()


class Server:
    """The listening server. `start()` after all of `services` are in; `stop()` waits for what is under way."""

    def __init__(self, address: str, threads: int) -> None:
        """Prepare to listen on `address`, a path in a directory of ours; what a killed one left there is replaced."""
        self._path = Path(address)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="rpc")
        self._server = grpc.server(self._pool, maximum_concurrent_rpcs=_REQUESTS_MAX)
        self._inode = 0

    def add(self, register: Callable[[Any], None]) -> None:
        """`register` adds a service to the gRPC server: before start()."""
        register(self._server)

    def start(self) -> None:
        """Listen, for root only. Raises HostError."""
        previous = os.umask(0o177)   # the socket is never open to others, not for a moment
        try:
            self._server.add_insecure_port(f"unix:{self._path}")
        except RuntimeError as error:
            raise HostError(f"cannot listen on {self._path}: {error}") from error
        finally:
            os.umask(previous)
        self._path.chmod(0o600)
        self._inode = self._path.stat().st_ino
        self._server.start()

    def later(self, work: Callable[[], None]) -> None:
        """Do something beside the requests, once; its failure is logged."""
        def guarded() -> None:
            try:
                work()
            except Exception:  # noqa: BLE001 - the requests must go on
                _LOG.exception("work beside the requests failed")

        self._pool.submit(guarded)

    def stop(self) -> None:
        """Take no more requests, let those under way end, remove the socket."""
        self._server.stop(STOP_GRACE_S).wait(STOP_GRACE_S * 2)
        self._pool.shutdown(wait=True, cancel_futures=True)
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:   # not that of somebody who came after us
                self._path.unlink()


def serve(snapshots: Snapshots, address: str, threads: int, until_end: Callable[[], object], *,
          ready: Callable[[], None], extra: Callable[[Any], None] | None = None) -> None:
    """
    Answer until `until_end` returns.

    Args:
        snapshots: what the calls work on; not closed here.
        address: path of the socket.
        threads: requests that are worked on at once.
        until_end: waits for a signal. Not on a lock: one that another thread takes does not wake us there.
        ready: called once, when the socket answers.
        extra: adds other services to the same gRPC server.

    Raises:
        HostError: as Server.start().

    """
    server = Server(address, threads)
    server.add(lambda grpc_server: add_SnapshotsServicer_to_server(SnapshotsService(snapshots), grpc_server))
    if extra is not None:
        server.add(extra)
    server.start()
    try:
        server.later(snapshots.cleanup)   # what a kill has left; nobody waits for it
        ready()
        until_end()
    finally:
        server.stop()


@contextlib.contextmanager
def _answering(context: Any, call: str, name: str) -> Iterator[None]:
    """Errors become a status, and all are counted. Raises what gRPC's abort() raises."""
    with CALLS.answering(call, name) as end, _failing(context, call, name, end):
        yield


@contextlib.contextmanager
def _failing(context: Any, call: str, name: str, end: list[str]) -> Iterator[None]:
    """As above; `end`: of Calls.answering()."""
    began = time.monotonic()
    try:
        yield
    except LazyfsError as error:
        code = next(status for kind, status in _STATUS if isinstance(error, kind))
        text = f"{error} (hint: {error.hint})" if error.hint else str(error)
        expected = isinstance(error, failures.SnapshotExistsError | failures.SnapshotMissingError)
        _LOG.log(logging.DEBUG if expected else logging.WARNING, "%s %s: %s", call, name, text)
    except Exception as error:  # noqa: BLE001 - the last frame before gRPC, which would not say what it was
        code, text = grpc.StatusCode.INTERNAL, f"a bug in lazyfs: unexpected {type(error).__name__}, see its log"
        _LOG.exception("%s %s: unexpected", call, name)
    else:
        if (took_s := time.monotonic() - began) >= SLOW_S:
            _LOG.info("%s %s took %.1f s", call, name, took_s)
        return
    end.append(code.name)
    context.abort(code, _one_line(text))


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)[:_DETAIL_CHARS]


def _mount(mount: Mount) -> Any:
    return MountMessage(type=mount.type, source=mount.source, target=mount.target, options=mount.options)


def _info(info: SnapshotInfo) -> Any:
    message = api.Info(name=info.name, parent=info.parent, kind=_KINDS[info.kind], labels=dict(info.labels))
    message.created_at.FromNanoseconds(info.created)
    message.updated_at.FromNanoseconds(info.updated)
    return message
