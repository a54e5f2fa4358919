"""What the worker gives up: rights that it does not need, and being looked into."""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazyfs.fs import confine, seccomp
from tests.daemonkit import Daemon, running_daemon
from tests.mountkit import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.mount
FILES = {"a": bytes(range(256)) * 3000, "b": b"x" * 100_000}
KEPT = 1 << confine.CAP_DAC_READ_SEARCH


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path / "machine")
    made.directory.mkdir()
    yield made
    made.close()


def statuses(pid: int) -> list[dict[str, str]]:
    """/proc/PID/task/*/status: one of each thread."""
    found = []
    for path in Path(f"/proc/{pid}/task").iterdir():
        lines = (path / "status").read_text().splitlines()
        found.append({name: value.strip() for name, _, value in (line.partition(":") for line in lines)})
    return found


def assert_confined(pid: int) -> None:
    for thread in statuses(pid):
        for name in ("CapEff", "CapPrm", "CapBnd"):
            assert int(thread[name], 16) & ~KEPT == 0, (name, thread[name])
        assert int(thread["CapInh"], 16) == int(thread["CapAmb"], 16) == 0
        assert (thread["NoNewPrivs"], thread["Seccomp"]) == ("1", "2")


def mount_and_read(machine: Machine, host: str, driver: str, name: str = "mnt") -> Path:
    target = machine.target(name)
    machine.mount(f"{host}/app:lazy", target, "--insecure", "--driver", driver)
    for file, data in FILES.items():
        assert (target / file).read_bytes() == data
    return target


@pytest.mark.parametrize("driver", ["erofs", "fuse"])
def test_the_daemons_worker_keeps_only_what_it_needs(machine: Machine, registry: str, driver: str) -> None:
    """All threads; after a hand-over too; and mounts, reads and unmounts work."""
    with running_daemon(machine) as daemon:
        target = mount_and_read(machine, registry, driver)
        first = daemon.worker()
        assert_confined(first)
        machine.lazyfs("daemon", "upgrade")
        second = daemon.wait_ready(not_worker=first)
        assert_confined(second)
        other = mount_and_read(machine, registry, driver, "other")
        for one in (target, other):
            machine.umount(one)
        daemon.stop()
        assert not machine.mounts()


def test_the_worker_of_one_mount_too(machine: Machine, registry: str) -> None:
    target = mount_and_read(machine, registry, "erofs")
    worker = machine.worker()
    assert worker is not None
    assert_confined(worker.pid)
    machine.umount(target)
    machine.assert_clean()


def test_where_helpers_need_more_it_can_be_turned_off(machine: Machine, registry: str,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYFS_DAEMON_CONFINE", "false")
    with running_daemon(machine) as daemon:
        mount_and_read(machine, registry, "erofs")
        assert all(thread["NoNewPrivs"] == "0" for thread in statuses(daemon.worker()))


def test_a_crash_leaves_no_core(machine: Machine, registry: str) -> None:
    """Keeper and worker: the limit is 0, and the kernel writes none, whatever the limit of who started it was."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
    try:
        with running_daemon(machine) as daemon:
            mount_and_read(machine, registry, "erofs")
            for pid in (daemon.worker(), daemon.process.pid):
                limits = Path(f"/proc/{pid}/limits").read_text()
                assert re.search(r"Max core file size +0 +0 ", limits), limits
            worker = daemon.worker()
            os.kill(worker, signal.SIGSEGV)
            daemon.wait_ready(not_worker=worker)
            kept = [*machine.directory.rglob("core*"), *Path.cwd().glob("core*")]
            assert not [path for path in kept if path.is_file()]
            assert core_flag(daemon) == []
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)


def core_flag(daemon: Daemon) -> list[int]:
    """Processes that could be looked into by their own user, had he no capabilities."""
    script = textwrap.dedent("""
        import ctypes, json, os, struct, sys
        libc = ctypes.CDLL(None)
        nothing = struct.pack("=6I", *[0] * 6)
        assert libc.capset(struct.pack("=Ii", 0x20080522, 0), nothing) == 0
        found = []
        for pid in map(int, sys.argv[1:]):
            try:
                os.readlink(f"/proc/{pid}/exe")
                found.append(pid)
            except PermissionError:
                pass
        print(json.dumps(found))
    """)
    pids = [str(daemon.worker()), str(daemon.process.pid)]
    done = subprocess.run([sys.executable, "-c", script, *pids], capture_output=True, text=True, check=True)
    found: list[int] = json.loads(done.stdout)
    return found


def test_calls_of_the_list_fail_and_programs_run() -> None:
    script = textwrap.dedent("""
        import ctypes, errno, os, subprocess, threading
        from lazyfs.fs.confine import confine
        assert confine() == []
        libc = ctypes.CDLL(None, use_errno=True)
        def fails(number, *arguments):
            ctypes.set_errno(0)
            return libc.syscall(number, *arguments) == -1 and ctypes.get_errno() == errno.EPERM
        numbers = {"x86_64": (101, 165, 272, 321, 304, 56), "aarch64": (117, 40, 97, 280, 265, 220)}[os.uname().machine]
        for number in numbers[:-1]:
            assert fails(number, 0, 0, 0, 0, 0), number
        assert fails(numbers[-1], 0x10000000 | 17, 0, 0, 0, 0), "clone with CLONE_NEWUSER"
        assert subprocess.run(["sh", "-c", "echo $(id -u)"], capture_output=True).stdout == b"0\\n"
        done = []
        thread = threading.Thread(target=lambda: done.append(open("/proc/thread-self/status").read()))
        thread.start(); thread.join()
        assert "CapEff:\\t0000000000000004" in done[0] and "Seccomp:\\t2" in done[0]
        try:
            open("/proc/1/mem", "rb")
        except PermissionError:
            print("confined")
    """)
    if os.geteuid() != 0:
        pytest.skip("needs root, to have something to give up")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "confined\n", done.stderr


def test_it_is_not_done_while_threads_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their capabilities would stay: said, not passed over."""
    import threading  # noqa: PLC0415

    monkeypatch.setattr(confine, "_ALONE_S", 0.0)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        (problem,) = confine.confine()
        assert "threads run already" in problem
    finally:
        stop.set()
        thread.join()
    assert ctypes.CDLL(None).prctl(39, 0, 0, 0, 0) == 0, "this process has not given up anything"


@pytest.mark.parametrize("machine_name", ["x86_64", "aarch64"])
def test_the_filter_is_well_formed(machine_name: str) -> None:
    code = seccomp.program(machine_name)
    assert len(code) % 8 == 0
    assert 8 * 4096 > len(code) > 8 * 80
