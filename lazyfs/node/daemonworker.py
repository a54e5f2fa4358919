"""
The daemon's worker: `python -m lazyfs.node.daemonworker PLACE`, started by the keeper and by nobody else.

It serves through descriptors that the keeper keeps, so that another one can go on in its place: after its death, or
when it is told to retire (another version of us, a new configuration). It imports everything first, then waits for
its turn: the pause that readers see is a hand-over, not a start.

Layer: node. PLACE: JSON of `Place`. Channel to the keeper (node.keeper has the other end), lines of text:

    worker  imported | ready | beat ANSWERED HELD    keeper  go | go-on | retire | leave

"go": mount, "go-on": take over, "retire": step aside, "leave": end if there is nothing to serve. The channel's end (a
keeper that died) changes nothing: a later keeper fetches the descriptors from here (keeper.json says their numbers).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lazyfs import stacks

if TYPE_CHECKING:
    from typing import BinaryIO

    import trio

    from lazyfs.cache.store import CacheDir
    from lazyfs.config import Config
    from lazyfs.fetch.engine import Fetcher
    from lazyfs.fs.mounter import MounterClient
    from lazyfs.fs.session import FuseSession
    from lazyfs.node.rundir import WorkerDir
    from lazyfs.node.worker import Worker

IMPORTED, READY, BEAT = b"imported\n", b"ready\n", b"beat %d %d\n"
GO, GO_ON, RETIRE, LEAVE = b"go\n", b"go-on\n", b"retire\n", b"leave\n"
_log = logging.getLogger("lazyfs.node")


@dataclass(frozen=True, slots=True)
class Place:
    """
    What a worker is told. Descriptors: `channel` to the keeper, `fuse`, `listener` of the control socket.

    JSON: the same, `config` as config.to_plain() wrote it.

    """

    root: str
    cache_dir: str
    channel: int
    fuse: int
    listener: int
    config: Config

    @classmethod
    def from_json(cls, text: str) -> Place:
        """What a keeper, perhaps of another version, says: fields we do not know are for others."""
        from lazyfs.config import from_plain  # noqa: PLC0415 - with the other imports

        data = json.loads(text)
        known = {one.name: data[one.name] for one in fields(cls) if one.name != "config"}
        return cls(**known, config=from_plain(data.get("config", {})))


def main() -> NoReturn:
    """Serve until told to stop. Exit code 0: retired, or nothing left to serve."""
    place = Place.from_json(sys.argv[1])
    for descriptor in (place.channel, place.fuse, place.listener):
        os.set_inheritable(descriptor, False)   # a credential helper must not hold our mounts
    signal.signal(signal.SIGINT, signal.SIG_IGN)   # ^C is for the keeper
    stacks.ignore()       # until there is something to tell, and for ever in what is started
    stacks.enable_hard()
    from lazyfs.fs.confine import hide_memory  # noqa: PLC0415
    from lazyfs.fs.mounter import start_mounter  # noqa: PLC0415

    hide_memory()

    _, mounter = start_mounter()   # before threads and big imports
    code = _run(place, mounter)
    sys.stdout.flush()
    os._exit(code)   # half of an ordinary end would be taking libraries apart, while readers wait


def _run(place: Place, mounter: socket.socket) -> int:
    import gc  # noqa: PLC0415

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.disable()
    import trio  # noqa: PLC0415

    from lazyfs import logs  # noqa: PLC0415
    from lazyfs.errors import BugError, LazyfsError  # noqa: PLC0415
    from lazyfs.fs.mounter import MounterClient  # noqa: PLC0415
    from lazyfs.node import serving  # noqa: PLC0415
    from lazyfs.node.noderegistry import set_node_registry  # noqa: PLC0415
    from lazyfs.node.verifying import set_node_verify  # noqa: PLC0415

    serving.import_registry_client()
    set_node_registry(place.config.registry)
    set_node_verify(place.config.verify)
    gc.freeze()
    gc.enable()
    logs.setup(place.config.log, program="worker")
    serving.tune_malloc()
    channel = socket.socket(fileno=place.channel)
    with contextlib.suppress(OSError):   # a keeper that is gone: the line that does not come says so
        channel.sendall(IMPORTED)
    lines = channel.makefile("rb")
    turn = lines.readline()
    if turn not in {GO, GO_ON}:
        return 0   # not needed, or the keeper is gone: the worker before us goes on
    try:
        if turn == GO:
            _mount(place, channel)
        serving.confine_worker(place.config.daemon, _ports(place.config))
        trio.run(_serve, place, channel, lines, MounterClient(mounter), turn == GO_ON)
    except (LazyfsError, BaseExceptionGroup) as raised:
        error = serving.first_error(raised)
        _log.error("cannot serve: %s", error, exc_info=None if isinstance(error, LazyfsError) else raised)
        return error.exit_code if isinstance(error, LazyfsError) else BugError.exit_code
    return 0


def _mount(place: Place, channel: socket.socket) -> None:
    """Mount the keeper's connection, as long as we may (fs.confine), and give signs of life. Raises HostError."""
    from lazyfs.fs.session import mount_fuse  # noqa: PLC0415
    from lazyfs.node.rundir import WorkerDir  # noqa: PLC0415
    from lazyfs.node.unmount import clean_stale  # noqa: PLC0415

    done = threading.Event()

    def beat() -> None:
        while not done.wait(place.config.daemon.heartbeat_s):
            _say(channel, BEAT % (0, -1))

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        directory = WorkerDir(Path(place.root))
        for target in clean_stale(directory):
            _log.error("%s was lost with the process that held it: restart what uses it", target)
        mount_fuse(directory.fuse, place.fuse)
    finally:
        done.set()
        beating.join()


def _ports(config: Config) -> tuple[int, ...]:
    """Where this worker listens."""
    from lazyfs.config.kinds import split_address  # noqa: PLC0415

    peers = config.peers.address if config.peers.enabled else ""
    return tuple(split_address(one)[1] for one in (config.daemon.health_address, config.profile.collect, peers) if one)


async def _serve(
    place: Place, channel: socket.socket, lines: BinaryIO, mounter: MounterClient, take_over: bool
) -> None:
    import trio  # noqa: PLC0415

    from lazyfs.cache.store import CacheDir  # noqa: PLC0415
    from lazyfs.fetch.engine import Fetcher  # noqa: PLC0415
    from lazyfs.fs.operations import LazyOperations  # noqa: PLC0415
    from lazyfs.fs.served import Served  # noqa: PLC0415
    from lazyfs.fs.session import FuseSession  # noqa: PLC0415
    from lazyfs.node import serving  # noqa: PLC0415
    from lazyfs.node.prefetching import bounds_of  # noqa: PLC0415
    from lazyfs.node.rundir import ProcessIdentity, WorkerDir  # noqa: PLC0415
    from lazyfs.node.worker import Worker  # noqa: PLC0415

    directory = WorkerDir(Path(place.root))
    identity = ProcessIdentity.of(os.getpid())
    assert identity is not None
    try:
        directory.write_worker(identity)
    except OSError as error:   # readers wait: to serve them is more than to be found
        _log.error("%s cannot be written: %s", directory.identity, error)
    served = Served()
    operations = LazyOperations(served, patient=place.config.daemon.read_policy == "wait")
    session = FuseSession(operations, directory.fuse, os.dup(place.fuse))
    cache = CacheDir.open(Path(place.cache_dir))
    async with Fetcher(bounds_of(place.config.daemon)) as fetcher, trio.open_nursery() as signs:
        signs.start_soon(_beat, channel, place.config.daemon.heartbeat_s, session)
        worker = Worker(directory, cache, fetcher, served, mounter, lasting=True,
                        lists=place.config.daemon.prefetch_lists)
        worker.observer.begin(place.config.daemon.slow_read_s, place.config.snapshotter.root)
        worker.copying.configured = place.config.cache
        if take_over:
            await worker.restore()
            session.take_over()
        async with serving.running(session) as nursery:
            nursery.start_soon(serving.accept, serving.listener_of(place.listener), worker, nursery)
            nursery.start_soon(worker.tend)
            nursery.start_soon(worker.housekeeper.run, place.config.cache)
            nursery.start_soon(worker.scrubbing.run, place.config.cache)
            nursery.start_soon(_listen, lines, worker)
            _start_services(place.config, directory, worker, nursery)
            _start_peers(place.config, cache, fetcher, worker, nursery)
            await nursery.start(_watch_term, worker)
            _say(channel, READY)
            nursery.start_soon(worker.resume_prefetch)
            nursery.start_soon(trio.to_thread.run_sync, serving.import_for_mounts)
            await worker.finished.wait()
            nursery.cancel_scope.cancel()
        if worker.dissolving:
            session.close(mounter)
            await trio.to_thread.run_sync(cache.checkpoint)
        else:
            session.leave()   # no goodbye to the mounts, if any: whoever comes next goes on with the connection
        os._exit(0)   # the fetcher's end would wait for downloads under way


def _start_services(config: Config, directory: WorkerDir, worker: Worker, nursery: trio.Nursery) -> None:
    """What is only there where it was asked for; so are its imports."""
    if config.daemon.health_address:
        from lazyfs.node import health  # noqa: PLC0415

        nursery.start_soon(health.serve, config.daemon.health_address, worker.health, worker.observer.page)
    if config.profile.collect:
        from lazyfs.node.collector import Collector  # noqa: PLC0415

        nursery.start_soon(Collector(config.profile).run)
    if config.profile.upload:
        from lazyfs.node.uploads import Uploads  # noqa: PLC0415

        uploads = Uploads(config.profile, directory.contributor, worker.mounts)
        worker.leaving = uploads.leaving
        nursery.start_soon(uploads.run)


def _start_peers(config: Config, cache: CacheDir, fetcher: Fetcher, worker: Worker, nursery: trio.Nursery) -> None:
    if config.peers.enabled:
        from lazyfs.node.peering import NodePeers  # noqa: PLC0415 - as above
        from lazyfs.node.peerproof import NodeProver  # noqa: PLC0415
        from lazyfs.node.preheating import NodePreheating  # noqa: PLC0415
        from lazyfs.peers.authority import make_gate  # noqa: PLC0415

        prover = NodeProver(fetcher.peering.in_use)
        worker.peers = NodePeers(config.peers, cache, fetcher, lambda me: make_gate(config.peers, me.id, prover))
        worker.peers.preheat = NodePreheating(worker.copying.fetching).do
        nursery.start_soon(worker.peers.run)


async def _beat(channel: socket.socket, every_s: float, session: FuseSession) -> None:
    """Tell the keeper that the loop turns, also while images are restored; and what it did (node.keeperwatch)."""
    import trio  # noqa: PLC0415

    while True:
        _say(channel, BEAT % session.progress)
        await trio.sleep(every_s)


def _say(channel: socket.socket, word: bytes) -> None:
    """Tell the keeper. It may be gone, or not read: that must not stop us."""
    with contextlib.suppress(OSError):
        channel.send(word, socket.MSG_DONTWAIT)


async def _listen(lines: BinaryIO, worker: Worker) -> None:
    """What the keeper says, until it says that we are not needed, or is gone."""
    import trio  # noqa: PLC0415

    def next_line() -> bytes:
        try:
            return lines.readline()
        except OSError:   # it died with something of ours unread
            return b""

    while line := await trio.to_thread.run_sync(next_line, abandon_on_cancel=True):
        if line == LEAVE:
            worker.finish_if_idle(even_lasting=True)
        elif line == RETIRE:
            worker.shut_down()


async def _watch_term(worker: Worker, task_status: trio.TaskStatus[None]) -> None:
    """SIGTERM: step aside and leave the mounts; a keeper that found us without one sends it."""
    import trio  # noqa: PLC0415

    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            worker.shut_down()


if __name__ == "__main__":
    main()
