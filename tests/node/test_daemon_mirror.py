"""The daemon's mirror: a child of the keeper, there again when it dies, gone with the daemon."""

from __future__ import annotations

import http.client
import os
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.daemonkit import end_daemon, start_daemon
from tests.mirrorkit import ask
from tests.ports import free_port

if TYPE_CHECKING:
    from tests.mountkit import Machine

pytestmark = pytest.mark.mount
WAIT_S = 60.0


def answers(host: str) -> bool:
    try:
        return ask(host, "GET", "/readyz", timeout_s=10).status == 200
    except (OSError, http.client.HTTPException):
        return False


def wait_until_answers(host: str, *, wanted: bool = True) -> None:
    deadline = time.monotonic() + WAIT_S
    while answers(host) != wanted:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def child_of(keeper: int) -> int:
    """The mirror's pid."""
    children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
    found = [int(pid) for pid in children if b"\0mirror\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(found) == 1
    return found[0]


def test_it_lives_and_ends_with_the_daemon(machine: Machine) -> None:
    host = f"127.0.0.1:{free_port()}"
    environment = {"LAZYFS_MIRROR_ADDRESS": host, "LAZYFS_MIRROR_DIR": str(machine.directory / "mirror"),
                   "LAZYFS_MIRROR_CONTAINERD_ROOT": ""}
    daemon = start_daemon(machine, environment=environment)
    try:
        daemon.wait_ready()
        wait_until_answers(host)
        first = child_of(daemon.process.pid)
        status = Path(f"/proc/{first}/status").read_text()
        for line in ("CapEff:\t0000000000000004", "CapBnd:\t0000000000000004", "NoNewPrivs:\t1"):   # fs.confine
            assert line in status
        os.kill(first, signal.SIGKILL)
        deadline = time.monotonic() + WAIT_S
        while Path(f"/proc/{first}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        wait_until_answers(host)
        second = child_of(daemon.process.pid)
        daemon.machine.lazyfs("daemon", "stop")
        assert daemon.process.wait(WAIT_S) == 0
        assert not Path(f"/proc/{second}").exists()
        assert not answers(host)
    finally:
        end_daemon(daemon)


def test_one_that_hangs_is_killed_and_there_again(machine: Machine) -> None:
    host = f"127.0.0.1:{free_port()}"
    environment = {"LAZYFS_MIRROR_ADDRESS": host, "LAZYFS_MIRROR_DIR": str(machine.directory / "mirror"),
                   "LAZYFS_MIRROR_CONTAINERD_ROOT": "", "LAZYFS_DAEMON_HANG_S": "6"}
    daemon = start_daemon(machine, environment=environment)
    try:
        daemon.wait_ready()
        wait_until_answers(host)
        first = child_of(daemon.process.pid)
        os.kill(first, signal.SIGSTOP)
        with closing(http.client.HTTPConnection(host, timeout=WAIT_S)) as client:
            client.request("GET", "/readyz")        # it is taken, and never answered
            with pytest.raises(ConnectionError):
                client.getresponse()
        wait_until_answers(host)
        assert child_of(daemon.process.pid) != first
        assert "the mirror gave no sign of life for 6 s" in (machine.directory / "daemon.log").read_text()
    finally:
        end_daemon(daemon)


def test_a_keeper_that_is_killed_takes_it_along(machine: Machine) -> None:
    host = f"127.0.0.1:{free_port()}"
    environment = {"LAZYFS_MIRROR_ADDRESS": host, "LAZYFS_MIRROR_DIR": str(machine.directory / "mirror")}
    daemon = start_daemon(machine, environment=environment)
    try:
        daemon.wait_ready()
        wait_until_answers(host)
        daemon.process.kill()
        daemon.process.wait(WAIT_S)
        wait_until_answers(host, wanted=False)
    finally:
        end_daemon(daemon)


def test_an_upgrade_starts_it_anew_with_the_settings_of_then(machine: Machine) -> None:
    hosts = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    path = machine.directory / "config.toml"

    def configure(host: str) -> None:
        path.write_text(f"[mirror]\naddress = '{host}'\ndir = '{machine.directory / 'mirror'}'\ncontainerd_root = ''\n")
        path.chmod(0o600)

    configure(hosts[0])
    daemon = start_daemon(machine, "--config", str(path))
    try:
        daemon.wait_ready()
        wait_until_answers(hosts[0])
        first, worker = child_of(daemon.process.pid), daemon.worker()
        configure(hosts[1])
        machine.lazyfs("daemon", "--config", str(path), "upgrade")
        daemon.wait_ready(not_worker=worker)
        wait_until_answers(hosts[1])
        assert child_of(daemon.process.pid) != first
        assert not answers(hosts[0])
    finally:
        end_daemon(daemon)
