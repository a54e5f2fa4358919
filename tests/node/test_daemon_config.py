"""The daemon and the configuration: what it takes from where, what an upgrade changes, and what it refuses to."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.daemonkit import WAIT_S, Daemon, end_daemon, running_daemon, start_daemon

if TYPE_CHECKING:
    from tests.mountkit import Machine

pytestmark = pytest.mark.mount


def configure(machine: Machine, text: str) -> str:
    path = machine.directory / "config.toml"
    path.write_text(text)
    return str(path)


def worker_arguments(daemon: Daemon) -> dict[str, object]:
    words = Path(f"/proc/{daemon.worker()}/cmdline").read_bytes().split(b"\0")
    found: dict[str, object] = json.loads(words[3])
    return found


def test_the_file_reaches_the_worker_and_an_upgrade_reads_it_again(machine: Machine) -> None:
    path = configure(machine, "[daemon]\nheartbeat_s = 0.25\n[log]\nlevel = 'debug'\nformat = 'json'\n")
    with running_daemon(machine, "--config", path) as daemon:
        before = worker_arguments(daemon)
        assert before["cache_dir"] == str(machine.cache)   # the option, not the default
        assert before["config"]["daemon"]["heartbeat_s"] == 0.25  # type: ignore[index]
        worker = daemon.worker()
        configure(machine, "[daemon]\nheartbeat_s = 0.5\n")
        machine.lazyfs("daemon", "--config", path, "upgrade")
        daemon.wait_ready(not_worker=worker)
        assert worker_arguments(daemon)["config"]["daemon"]["heartbeat_s"] == 0.5  # type: ignore[index]
        daemon.stop()
    machine.assert_clean()


def test_an_upgrade_refuses_another_cache_directory_and_a_broken_file(machine: Machine) -> None:
    with running_daemon(machine) as daemon:
        worker = daemon.worker()
        path = configure(machine, "[daemon]\ncache_dir = '/elsewhere'\n")
        errors = machine.lazyfs("daemon", "--config", path, "upgrade", code=42)
        assert f"cache_dir is {machine.cache}, and cannot become /elsewhere" in errors
        errors = machine.lazyfs("daemon", "--config", configure(machine, "[daemon]\nhang = 1"), "upgrade", code=3)
        assert "did you mean daemon.hang_s?" in errors
        assert daemon.worker() == worker
        daemon.stop()


def test_a_broken_file_keeps_the_daemon_from_starting_in_one_line(machine: Machine) -> None:
    path = configure(machine, "[daemon]\nread_timeout_s = 'long'\n")
    errors = machine.lazyfs("daemon", "--config", path, code=3)
    assert errors == (f"lazyfs: error: {path}: daemon.read_timeout_s: expected a number from 0.1 to 3600, "
                      "found 'long'\n")


def test_records_are_json_where_nobody_looks(machine: Machine) -> None:
    with running_daemon(machine) as daemon:
        os.kill(daemon.process.pid, 9)
        daemon.process.wait()
        os.kill(daemon.worker(), 9)
        second = start_daemon(machine)
        try:
            second.wait_ready()
            second.stop()
        finally:
            end_daemon(second)
    lines = (machine.directory / "daemon.log").read_text().splitlines()
    for line in lines:
        assert line.startswith("lazyfs keeper: ") or json.loads(line)["program"] == "worker"


def test_the_watchdog_is_fed_before_and_after_a_worker_is_replaced(machine: Machine) -> None:
    path = machine.directory / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(path))
        receiver.settimeout(WAIT_S)
        daemon = start_daemon(machine, "--hang-timeout", "2",
                              environment={"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "900000"})
        try:
            wait_watchdog(receiver)
            while not daemon.directory.identity.exists():   # it is fed while the first one still imports
                wait_watchdog(receiver)
            os.kill(daemon.worker(), 19)   # SIGSTOP: silent from now on, and replaced after 2 s
            worker = daemon.worker()
            deadline = time.monotonic() + WAIT_S
            while daemon.worker() == worker:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            wait_watchdog(receiver)
            daemon.stop()
        finally:
            end_daemon(daemon)


def wait_watchdog(receiver: socket.socket) -> None:
    """Twice: what was said before this call may still be in the queue once."""
    heard = 0
    while heard < 2:
        data, descriptors, _, _ = socket.recv_fds(receiver, 4096, 4)
        for descriptor in descriptors:
            os.close(descriptor)
        heard += b"WATCHDOG=1" in data
