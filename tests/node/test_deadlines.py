"""No reader waits for ever: killed ones are free at once, lost requests are noticed, and somebody pulls the plug."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lazyfs.node.keeperchild import fetch_descriptor
from tests.daemonkit import WAIT_S, Daemon, end_daemon, start_daemon
from tests.faultproxy import Fault, FaultProxy, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.mountkit import Machine

pytestmark = pytest.mark.mount
RNG = random.Random(31)
FILES = {f"f{number}": RNG.randbytes(300_000) for number in range(6)}
KILLED_S = 10.0                  # for a killed process to be gone, on a machine that has other work
FREEZER = Path("/sys/fs/cgroup/freezer")
REQUEST_BYTES = (1 << 20) + 8192
# SIGTERM is handled: after it the kernel no longer tells of other signals. Then it says what it does, and does it.
READER = """
import mmap, os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: None)
how, path = sys.argv[1:]
if how == "stat":
    print("now", flush=True)
    os.stat(path)
else:
    file = os.open(path, os.O_RDONLY | (os.O_DIRECT if how == "direct" else 0))
    print("now", flush=True)
    if how == "mapped":
        mmap.mmap(file, 4096, prot=mmap.PROT_READ)[0]
    else:
        os.preadv(file, [mmap.mmap(-1, 4096)], 0)
print("done", flush=True)
"""


@contextlib.contextmanager
def serving(machine: Machine, registry: str, **settings: Any) -> Iterator[tuple[Daemon, FaultProxy]]:
    """A daemon with these keys of [daemon], and a registry that can fail."""
    environment = {f"LAZYFS_DAEMON_{name}".upper(): str(value) for name, value in settings.items()}
    environment["LAZYFS_CACHE_FULL_COPY"] = "off"
    daemon = start_daemon(machine, environment=environment)
    try:
        with FaultProxy(registry) as proxy:
            daemon.wait_ready()
            yield daemon, proxy
    finally:
        end_daemon(daemon)
        print((machine.directory / "daemon.log").read_text())    # shown if the test fails


def mount(machine: Machine, proxy: FaultProxy, driver: str, *words: str, name: str = "mnt") -> Path:
    target = machine.target(name)
    machine.lazyfs("mount", f"{proxy.host}/app:lazy", target, "--insecure", "--driver", driver, "--no-prefetch", *words)
    return target


@contextlib.contextmanager
def reading(how: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is about to read; killed at the end."""
    with subprocess.Popen([sys.executable, "-c", READER, how, str(path)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "now\n"
            yield process
        finally:
            process.kill()


def wait_for(what: Callable[[], object], text: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < deadline, text
        time.sleep(0.02)


def waiting(daemon: Daemon) -> int:
    """Requests that wait in the kernel, as the keeper sees them."""
    return int(daemon.keeper()["waiting"])


def kill_and_wait(process: subprocess.Popen[str]) -> None:
    """A signal that it handles, then one that it cannot."""
    process.send_signal(signal.SIGTERM)
    process.kill()
    poll, descriptor = select.poll(), os.pidfd_open(process.pid)
    poll.register(descriptor, select.POLLIN)
    try:
        assert poll.poll(KILLED_S * 1000), Path(f"/proc/{process.pid}/status").read_text()
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(("driver", "how"), [
    ("erofs", "buffered"), ("erofs", "mapped"), ("fuse", "buffered"), ("fuse", "mapped"), ("fuse", "direct")])
def test_a_killed_reader_is_free_at_once_and_nobody_works_for_it(
    machine: Machine, registry: str, driver: str, how: str
) -> None:
    """Its deadline is a minute away."""
    with serving(machine, registry) as (daemon, proxy):
        target = mount(machine, proxy, driver)
        silence = proxy.add(Fault(Kind.BLACK_HOLE, path=r"/blobs/"))
        with reading(how, target / "f1") as process:
            wait_for(lambda: silence.applied, "the read does not reach the registry")
            kill_and_wait(process)
        wait_for(lambda: waiting(daemon) == 0, "its request is still there")
        machine.umount(target)


def test_a_question_to_a_stopped_worker_can_be_killed(machine: Machine, registry: str) -> None:
    """What no worker has taken yet is the kernel's to drop, long before the worker is replaced."""
    with serving(machine, registry, hang_s=60) as (daemon, proxy):
        target = mount(machine, proxy, "fuse")
        worker = daemon.worker()
        os.kill(worker, signal.SIGSTOP)
        with reading("stat", target / "f2") as process:
            wait_for(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] in "SD",
                     "it does not wait")
            kill_and_wait(process)
        os.kill(worker, signal.SIGCONT)
        daemon.wait_ready()
        machine.umount(target)


def test_a_patient_reader_waits_until_its_source_is_back_or_it_is_killed(machine: Machine, registry: str) -> None:
    with serving(machine, registry, read_policy="wait") as (_, proxy):
        target = mount(machine, proxy, "erofs", "--read-timeout", "1")
        proxy.down()
        with reading("buffered", target / "f1") as process, reading("mapped", target / "f5") as other:
            assert process.stdout is not None
            wait_for(lambda: machine.statistics()["fetch"]["errors"] >= 4, "it does not try again")
            assert not select.select([process.stdout], [], [], 0)[0], "it was told of an error"
            kill_and_wait(other)
            proxy.up()
            assert process.stdout.readline() == "done\n"
        assert (target / "f1").read_bytes() == FILES["f1"]
        machine.umount(target)


def test_a_patient_reader_does_not_outlive_its_mount(machine: Machine, registry: str) -> None:
    with serving(machine, registry, read_policy="wait") as (daemon, proxy):
        target = mount(machine, proxy, "erofs", "--read-timeout", "1")
        proxy.down()
        with reading("buffered", target / "f1") as process:
            wait_for(lambda: machine.statistics()["fetch"]["errors"] >= 2, "it does not try again")
            machine.umount(target, "--force")
            assert process.wait(WAIT_S) != 0
        wait_for(lambda: waiting(daemon) == 0, "its request is still there")


def test_a_request_that_gets_lost_is_noticed_and_asked_again(machine: Machine, registry: str) -> None:
    """We take it out of the queue, as a worker with a bug would, and do not answer."""
    with serving(machine, registry, hang_s=3, heartbeat_s=0.25) as (daemon, proxy):
        target = mount(machine, proxy, "fuse")
        worker = daemon.worker()
        number = json.loads((daemon.directory.root / "keeper.json").read_text())["fuse"]
        connection = fetch_descriptor(worker, number)
        try:
            os.kill(worker, signal.SIGSTOP)
            with reading("stat", target / "f3") as process:
                assert process.stdout is not None
                assert select.select([connection], [], [], WAIT_S)[0]
                assert os.read(connection, REQUEST_BYTES)
                os.kill(worker, signal.SIGCONT)
                assert process.stdout.readline() == "done\n"
        finally:
            os.close(connection)
        daemon.wait_ready(not_worker=worker)
        assert (target / "f3").read_bytes() == FILES["f3"]
        status = daemon.status()
        assert status is not None
        assert "answered nothing" in status["trouble"] or "no sign of life" in status["trouble"]
        machine.umount(target)


def test_a_worker_that_cannot_even_be_killed_costs_its_mounts_and_nothing_more(
    machine: Machine, registry: str
) -> None:
    """A frozen control group stands for a disk that does not answer: SIGKILL has no effect on who waits for it."""
    if not FREEZER.joinpath("tasks").exists():
        pytest.skip("there is no freezer (cgroup v1)")
    group = FREEZER / f"lazyfs-test-{os.getpid()}"
    with serving(machine, registry, hang_s=2, heartbeat_s=0.25, start_timeout_s=7, abort_s=10) as (daemon, proxy):
        target = mount(machine, proxy, "fuse")
        worker = daemon.worker()
        group.mkdir()
        try:
            group.joinpath("cgroup.procs").write_text(str(worker))
            group.joinpath("freezer.state").write_text("FROZEN")
            wait_for(lambda: group.joinpath("freezer.state").read_text() == "FROZEN\n", "it does not freeze")
            with pytest.raises(OSError, match=r"."):
                (target / "f4").stat()
            assert "aborted" in (machine.directory / "daemon.log").read_text()
        finally:
            group.joinpath("freezer.state").write_text("THAWED")
            wait_for(lambda: not group.joinpath("tasks").read_text(), "it does not end")
            group.rmdir()
        daemon.wait_ready(not_worker=worker)
        again = mount(machine, proxy, "fuse", name="again")
        assert (again / "f4").read_bytes() == FILES["f4"]
        machine.umount(again)


def test_the_next_worker_is_loaded_while_the_first_is_only_suspected(machine: Machine, registry: str) -> None:
    """It ends nobody: the suspected one serves on when it gives a sign, and an upgrade does without it."""
    with serving(machine, registry, hang_s=12, heartbeat_s=0.25) as (daemon, proxy):
        target = mount(machine, proxy, "erofs")
        worker, keeper = daemon.worker(), daemon.process.pid
        children = Path(f"/proc/{keeper}/task/{keeper}/children")
        os.kill(worker, signal.SIGSTOP)
        wait_for(lambda: len(children.read_text().split()) == 2, "no other worker is begun")
        os.kill(worker, signal.SIGCONT)
        assert (target / "f1").read_bytes() == FILES["f1"]
        assert daemon.wait_ready() == worker
        machine.lazyfs("daemon", "upgrade")
        assert daemon.wait_ready(not_worker=worker) != worker
        wait_for(lambda: len(children.read_text().split()) == 1, "what was dismissed is still there")
        machine.umount(target)
