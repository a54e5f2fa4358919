"""
A Redis of the tests' own, trackers in this process, and nodes that say what they are told to say.

    with redis_server(tmp_path) as redis:
        async with tracker(redis.url) as one, tracker(redis.url) as two: ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from lazyfs import config
from lazyfs.peers.announce import Standing
from lazyfs.tracker.run import Tracker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

    from lazyfs.peers.announce import Report
    from lazyfs.peers.model import View

START_S = 30.0
KEY = "device/sha256:" + "a" * 64
OTHER = "device/sha256:" + "b" * 64


@dataclass
class Redis:
    """Its data are in memory: who kills it empties it."""

    directory: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.directory / "redis.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        words = ["redis-server", "--port", "0", "--unixsocket", str(self.socket), "--save", "", "--appendonly", "no",
                 "--dir", str(self.directory)]
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        limit = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self.socket))
                return
            assert time.monotonic() < limit, "redis-server does not answer"
            assert self.process.poll() is None, "redis-server has ended"
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def redis_server() -> Iterator[Redis]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not here: scripts/setup")
    with tempfile.TemporaryDirectory(prefix="lazyfs-redis-") as directory:   # a socket's path must be short
        redis = Redis(Path(directory))
        redis.start()
        try:
            yield redis
        finally:
            redis.stop()


def settings(**tracker: str) -> config.Config:
    """The configuration of a tracker on a free port of loopback."""
    own = dataclasses.replace(config.Tracker(), **{"address": "127.0.0.1:0", **tracker})
    return dataclasses.replace(config.Config(), tracker=own)


@dataclass
class Running:
    """`kill`: it is gone from one moment to the next."""

    tracker: Tracker
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def url(self) -> str:
        return f"http://{self.tracker.addresses[0]}"

    def kill(self) -> None:
        self.scope.cancel()


@contextlib.asynccontextmanager
async def tracker(redis: str = "", **keys: str) -> AsyncIterator[Running]:
    running = Running(Tracker(settings(redis=redis, **keys)))
    listeners = await running.tracker.listen()

    async def serve() -> None:
        with running.scope:
            await running.tracker.serve(listeners)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        yield running
        running.scope.cancel()


@dataclass
class Node:
    """A membership.Participant that notes what it hears."""

    has: dict[str, Standing] = field(default_factory=lambda: {KEY: Standing()})
    bad: list[Report] = field(default_factory=list)
    views: dict[str, View] = field(default_factory=dict)
    released: dict[str, str] = field(default_factory=dict)

    def standings(self) -> Mapping[str, Standing]:
        return self.has

    def reports(self) -> Sequence[Report]:
        bad, self.bad = self.bad, []
        return bad

    def set_view(self, key: str, view: View) -> None:
        self.views[key] = view

    def release(self, key: str, phase: str) -> None:
        self.released[key] = phase

    def sees(self, key: str = KEY) -> list[str]:
        return [member.id for member in self.views[key].members] if key in self.views else []


async def until(what: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for it; fails after that."""
    with trio.fail_after(seconds):
        while not what():    # noqa: ASYNC110 - views tell nobody
            await trio.sleep(0.02)


def environment() -> dict[str, str]:
    """For `lazyfs tracker` as a process: no configuration of this machine."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LAZYFS_TRACKER")}
