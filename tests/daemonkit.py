"""
A node daemon of a test's own: `lazyfs daemon` as a process, in the run and cache directory of a Machine.

    with running_daemon(machine) as daemon:
        machine.mount(...)
        os.kill(daemon.worker(), signal.SIGKILL)
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lazyfs.errors import LazyfsError
from lazyfs.node import protocol
from lazyfs.node.keeperasking import ask_keeper
from lazyfs.node.rundir import WorkerDir
from tests.mountkit import LAZYFS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.mountkit import Machine

WAIT_S = 60.0                    # a machine that is busy with other tests takes its time


@dataclass
class Daemon:
    """A running keeper. `process`: its pid is the keeper's, for `lazyfs daemon` becomes the keeper."""

    machine: Machine
    process: subprocess.Popen[str]

    @property
    def directory(self) -> WorkerDir:
        return WorkerDir(self.machine.run_dir / "daemon")

    def status(self) -> dict[str, Any] | None:
        """What `lazyfs daemon status --json` says; None: nobody is there."""
        done = subprocess.run(
            [*LAZYFS, "daemon", "status", "--json"], env=self.machine.environment, capture_output=True, text=True,
            check=False, timeout=30)
        return json.loads(done.stdout) if done.stdout else None

    def keeper(self) -> dict[str, Any]:
        """What the keeper says of itself."""
        return ask_keeper(self.directory, "status")

    def health(self) -> dict[str, Any]:
        """What the worker says of itself; without a process, for who waits. Raises WorkerGoneError: there is none."""
        with protocol.ControlClient.connect(self.directory.socket) as client:
            found: dict[str, Any] = client.request(protocol.HEALTH, 5.0)
            return found

    def wait_ready(self, *, not_worker: int = 0) -> int:
        """Until a worker (another one than `not_worker`) serves; its pid."""
        deadline = time.monotonic() + WAIT_S
        while True:
            assert self.process.poll() is None, f"the keeper ended: {self.process.returncode}"
            worker = self._ready_worker()
            if worker is not None and worker != not_worker:
                return worker
            assert time.monotonic() < deadline, self.status()
            time.sleep(0.02)

    def _ready_worker(self) -> int | None:
        """What `lazyfs daemon status` asks, without a process each time: a test waits for this before it begins."""
        try:
            healthy = self.health()["ready"]
            status = self.keeper()
        except (LazyfsError, protocol.WorkerGoneError):
            return None
        return int(status["worker"]) if healthy and status["ready"] else None

    def worker(self) -> int:
        """The worker's pid."""
        return int(json.loads(self.directory.identity.read_bytes())["pid"])

    def stop(self) -> None:
        """`lazyfs daemon stop`, and the keeper's end."""
        self.machine.lazyfs("daemon", "stop")
        assert self.process.wait(WAIT_S) == 0


def start_daemon(machine: Machine, *words: str, environment: dict[str, str] | None = None, **options: Any) -> Daemon:
    """Start one; it is not ready yet."""
    machine.directory.mkdir(exist_ok=True)
    log = (machine.directory / "daemon.log").open("a")
    with log:
        process = subprocess.Popen(
            [*LAZYFS, "daemon", "--cache-dir", str(machine.cache), *words],
            env={**machine.environment, **(environment or {})}, stdout=log, stderr=log, text=True, **options)
    return Daemon(machine, process)


@contextlib.contextmanager
def running_daemon(machine: Machine, *words: str) -> Iterator[Daemon]:
    """A daemon that is ready; taken away at the end, with its worker and its mounts."""
    daemon = start_daemon(machine, *words)
    try:
        daemon.wait_ready()
        yield daemon
    finally:
        end_daemon(daemon)


@contextlib.contextmanager
def daemon_with(machine: Machine, **settings: str) -> Iterator[Daemon]:
    """One that is ready, with keys of section [cache] in its environment."""
    environment = {f"LAZYFS_CACHE_{name.upper()}": value for name, value in settings.items()}
    daemon = start_daemon(machine, environment=environment)
    try:
        daemon.wait_ready()
        yield daemon
    finally:
        end_daemon(daemon)


def end_daemon(daemon: Daemon) -> None:
    """However the test ended."""
    with contextlib.suppress(ProcessLookupError):
        daemon.process.kill()
    daemon.process.wait(WAIT_S)
    worker = daemon.directory.worker()
    if worker is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)
    daemon.machine.close()
