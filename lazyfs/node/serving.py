"""
The worker process from its first line to its last: cache, FUSE session, control socket, signals, the end.

Layer: node. Who calls: node.early, in the process it forked. Heavy imports (trio, numpy, urllib3) begin here.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import logging
import os
import signal
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from lazyfs import config, logs
from lazyfs.cache.store import CacheDir
from lazyfs.errors import BugError, HostError, LazyfsError
from lazyfs.fetch.engine import Fetcher
from lazyfs.fs import drivers
from lazyfs.fs.confine import confine, hide_memory
from lazyfs.fs.isolate import error_to
from lazyfs.fs.mounter import MounterClient
from lazyfs.fs.operations import LazyOperations
from lazyfs.fs.served import Served
from lazyfs.fs.session import FuseSession, mount_fuse, open_device
from lazyfs.limits import MIB
from lazyfs.node import control
from lazyfs.node.prefetching import bounds_of
from lazyfs.node.rundir import ProcessIdentity, WorkerDir
from lazyfs.node.verifying import set_node_verify
from lazyfs.node.worker import Worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_ACCEPT_PAUSE_S = 0.1            # after one that failed
_END_S = 20.0                    # how long taking everything away may take
# mallopt(3). Freed memory at an arena's end goes back to the kernel above M_TRIM_THRESHOLD only: with glibc's moving
# bound the buffers of each lz4 chunk went and came again, 22,000 page faults for 64 MiB, a third of all its CPU time.
_M_TRIM_THRESHOLD, _TRIM_BYTES = -1, 8 * MIB
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 4 * MIB
_M_ARENA_MAX, _ARENA_COUNT = -8, 2
_log = logging.getLogger("lazyfs.node")


def run_worker(directory: WorkerDir, cache_dir: str, first: socket.socket, mounter: socket.socket) -> int:
    """
    Serve until the last mount is gone. Returns the process's exit code.

    Args:
        directory: its run directory, created; the caller holds its lock.
        cache_dir: absolute, resolved.
        first: the starter's control connection; also told when the worker cannot start.
        mounter: the connection to the mounter process.

    """
    logs.setup(config.Log(format="text"), program="worker")
    tune_malloc()
    client = MounterClient(mounter)
    try:
        with CacheDir.open(Path(cache_dir)) as cache:
            settings, served = _settings(), Served()
            session = _mount(directory, served, settings)
            confine_worker(settings)
            try:
                trio.run(partial(_serve, directory, cache, settings, served, session, first=first, mounter=client))
            finally:
                session.close(client)
            cache.checkpoint()
        _leave(directory)
    except (LazyfsError, BaseExceptionGroup) as raised:
        error = first_error(raised)
        _log.error("cannot serve: %s", error, exc_info=None if isinstance(error, LazyfsError) else raised)
        with contextlib.suppress(OSError):
            first.setblocking(True)
            first.sendall(json.dumps({"error": error_to(error)}).encode() + b"\n")
        return error.exit_code if isinstance(error, LazyfsError) else BugError.exit_code
    return 0


def run_employed(cache_dir: str, first: socket.socket, mounter: socket.socket) -> int:
    """run_worker() for a process that was started early: now its messages have a place to go."""
    hide_memory()
    directory = WorkerDir.of_cache(cache_dir)
    log = os.open(directory.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    for number in (1, 2):
        os.dup2(log, number)
    os.close(log)
    return run_worker(directory, cache_dir, first, mounter)


def tune_malloc() -> None:
    """
    Two arenas are enough for the fetch threads; glibc would give each its own, and keep what they freed.

    Each of the two keeps up to _TRIM_BYTES of what was freed, so that the next chunk finds it.
    """
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, _ARENA_COUNT)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)


def _mount(directory: WorkerDir, served: Served, settings: config.Daemon) -> FuseSession:
    """A FUSE mount of our own. Raises HostError."""
    descriptor = open_device()
    mount_fuse(directory.fuse, descriptor)
    return FuseSession(LazyOperations(served, patient=settings.read_policy == "wait"), directory.fuse, descriptor)


def confine_worker(settings: config.Daemon, ports: tuple[int, ...] = ()) -> None:
    """Give up what a worker does not need (fs.confine); `ports`: on which it is to listen."""
    for problem in confine(ports) if settings.confine else ():
        _log.warning("this worker keeps more rights than it needs: %s", problem)


async def _serve(directory: WorkerDir, cache: CacheDir, settings: config.Daemon, served: Served, session: FuseSession,
                 *, first: socket.socket, mounter: MounterClient) -> None:
    identity = ProcessIdentity.of(os.getpid())
    assert identity is not None
    directory.write_worker(identity)
    async with Fetcher(bounds_of(settings)) as fetcher, running(session) as nursery:
        worker = Worker(directory, cache, fetcher, served, mounter, lists=settings.prefetch_lists)
        worker.observer.begin(settings.slow_read_s)
        listener = control.listen(directory.socket)
        try:
            nursery.start_soon(_serve_first, _stream(first), worker)
            nursery.start_soon(trio.to_thread.run_sync, import_registry_client)
            nursery.start_soon(accept, listener, worker, nursery)
            nursery.start_soon(worker.tend)
            nursery.start_soon(worker.housekeeper.run)
            nursery.start_soon(worker.scrubbing.run)
            await nursery.start(_watch_signals, worker)
            await worker.finished.wait()
            await trio.sleep(0.05)   # the last answer goes out
        finally:
            directory.socket.unlink(missing_ok=True)
            with trio.move_on_after(_END_S, shield=True):
                await worker.unmount_all()


def _leave(directory: WorkerDir) -> None:
    """Nothing of us stays in the run directory."""
    directory.identity.unlink(missing_ok=True)
    lock = directory.try_lock(make=False)
    if lock is not None:   # else another command is about to start a worker here
        directory.remove()
        os.close(lock)


def _settings() -> config.Daemon:
    """What a worker without a daemon is configured to do. Its starter has refused what is wrong; it may be by now."""
    try:
        found = config.load()
    except LazyfsError as error:
        _log.warning("the configuration is left aside: %s", error)
        found = config.Config(verify=config.Verify(policy="enforce"))   # what it said about signatures is not known
    set_node_verify(found.verify)
    return found.daemon


@contextlib.asynccontextmanager
async def running(session: FuseSession) -> AsyncIterator[trio.Nursery]:
    """Serve an open session as long as the block runs; its end from outside cancels the block."""
    async with trio.open_nursery() as nursery:
        await nursery.start(_run_session, session)
        drivers.set_read_ahead([session.device()], drivers.READ_AHEAD_FUSE_KIB)
        yield nursery
        nursery.cancel_scope.cancel()


def import_registry_client() -> None:
    """What the first read needs, 60 ms of it: now, while the starter still reads and checks the bootstrap."""
    importlib.import_module("lazyfs.registry.client")
    importlib.import_module("lazyfs.registry.remote")


def import_for_mounts() -> None:
    """What a first mount needs, 70 ms of it: for a daemon, which has the time. Not before a hand-over: readers wait."""
    importlib.import_module("lazyfs.image.manifest")
    importlib.import_module("lazyfs.registry.select")
    importlib.import_module("lazyfs.image.erofs.reader")
    importlib.import_module("numpy.ma")   # behind its set operations, on the first chunk table
    importlib.import_module("encodings.idna")   # behind the first host name


async def _run_session(session: FuseSession, task_status: trio.TaskStatus[None]) -> None:
    await session.serve(task_status)
    raise HostError(f"the FUSE mount {session.mount_point} was taken away",
                    hint="mount the images again; do not unmount what is below /run/lazyfs")


async def _serve_first(connection: trio.SocketStream, worker: Worker) -> None:
    """The starter's connection: if it closes without a mount, there is nothing to live for."""
    await control.serve_connection(connection, worker, starter=True)
    worker.awaits_order = False
    worker.finish_if_idle()


async def accept(listener: trio.SocketListener, worker: Worker, nursery: trio.Nursery) -> None:
    """Serve whoever connects, for ever."""
    async with listener:
        while True:
            try:
                connection = await listener.accept()
            except OSError as error:   # no descriptor is left: no reason to end what is served
                _log.error("a control connection was not accepted: %s", error)
                await trio.sleep(_ACCEPT_PAUSE_S)
                continue
            nursery.start_soon(control.serve_connection, connection, worker)


async def _watch_signals(worker: Worker, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            _log.info("signal %d: unmounting everything", number)
            worker.shut_down()


def listener_of(descriptor: int) -> trio.SocketListener:
    """The control socket that the keeper listens on for us."""
    return trio.SocketListener(trio.socket.from_stdlib_socket(socket.socket(fileno=descriptor)))


def _stream(connection: socket.socket) -> trio.SocketStream:
    connection.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(connection))


def first_error(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
