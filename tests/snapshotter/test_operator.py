"""What an operator does wrong on the command line gets one clear answer, and the next step."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest

from lazyfs.cli.main import as_lazyfs_error
from lazyfs.errors import HostError
from snapshotter.install.version import find_version
from tests.daemonkit import end_daemon, start_daemon
from tests.mountkit import LAZYFS, Machine, require_mounting

if TYPE_CHECKING:
    from pathlib import Path


def lazyfs(tmp_path: Path, *words: str, code: int) -> str:
    """Both outputs of a command in a run directory of its own."""
    done = subprocess.run([*LAZYFS, *words], env={**os.environ, "LAZYFS_RUN_DIR": str(tmp_path / "run")}, text=True,
                          capture_output=True, check=False, timeout=60, cwd=tmp_path)
    assert done.returncode == code, (words, done.stderr)
    assert "report this" not in done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("group", [[], ["cache"], ["config"]])
def test_a_command_without_a_subcommand_shows_its_help(tmp_path: Path, group: list[str]) -> None:
    """It was one line of an error, with the help's line ends written as \\n."""
    text = lazyfs(tmp_path, *group, code=2)
    assert "\\n" not in text
    assert text.splitlines() == lazyfs(tmp_path, *group, "--help", code=0).splitlines()


@pytest.mark.parametrize("words", [["cache", "--cache-dir", "", "gc"], ["cache", "--cache-dir", "", "ls"],
                                   ["daemon", "--cache-dir", ""]])
def test_an_empty_directory_name_is_not_the_current_directory(tmp_path: Path, words: list[str]) -> None:
    """`--cache-dir "$UNSET"` in a script."""
    assert "--cache-dir: expected a directory" in lazyfs(tmp_path, *words, code=2)
    assert not list(tmp_path.iterdir())


def test_a_directory_of_hosts_that_is_not_there(tmp_path: Path) -> None:
    assert "does not exist" in lazyfs(tmp_path, "pull", "--hosts-dir", str(tmp_path / "gone"), "r.example/a", code=2)


def test_a_keeper_that_ends_while_it_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "run" / "daemon" / "keeper.sock"
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def end() -> None:
            connection, _ = server.accept()
            connection.recv(1000)
            connection.close()

        thread = threading.Thread(target=end)
        thread.start()
        assert "the daemon ended before it answered" in lazyfs(tmp_path, "daemon", "status", code=42)
        thread.join(10)


@pytest.mark.mount
def test_the_status_of_a_daemon_that_is_starting_is_of_one_moment(tmp_path: Path) -> None:
    """It said "worker 0", then how many mounts this serves, and that all that is not ready, without a word why."""
    require_mounting()
    machine = Machine(tmp_path / ("m" * 100))   # sockets of a path that is too long for one
    daemon = start_daemon(machine)
    words = [*LAZYFS, "daemon", "status"]
    try:
        deadline = time.monotonic() + 30
        while True:
            done = subprocess.run(words, env=machine.environment, capture_output=True, text=True, check=False,
                                  timeout=60)
            serves = "version" in done.stdout and "worker 0" not in done.stdout
            assert serves or "not ready: " in done.stdout or "no daemon runs" in done.stderr, done.stdout
            assert serves == (done.returncode == 0)
            if serves:
                break
            assert time.monotonic() < deadline
    finally:
        end_daemon(daemon)


@pytest.mark.mount
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("worker_too", [False, True])
def test_a_signal_ends_the_daemon_in_order(tmp_path: Path, number: signal.Signals, worker_too: bool) -> None:
    """systemctl stop, ^C, `systemctl kill`: the keeper took its worker's end in twice, and died of that."""
    require_mounting()
    machine = Machine(tmp_path / "m")
    daemon = start_daemon(machine)
    try:
        worker = daemon.wait_ready()
        if worker_too:
            os.kill(worker, number)
        daemon.process.send_signal(number)
        assert daemon.process.wait(30) == 0, (machine.directory / "daemon.log").read_text()
        assert "Traceback" not in (machine.directory / "daemon.log").read_text()
        machine.assert_clean()
    finally:
        end_daemon(daemon)


def test_who_may_not_is_told_to_be_root(monkeypatch: pytest.MonkeyPatch) -> None:
    error = PermissionError(13, "Permission denied", "/run/lazyfs/daemon")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "sudo" in as_lazyfs_error(error).hint
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "sudo" not in as_lazyfs_error(error).hint


def test_a_program_that_is_no_containerd_is_not_believed() -> None:
    """`true --version` says 9.1, and a configuration for containerd 9.1 was written."""
    with pytest.raises(HostError, match="is not containerd"):
        find_version("/bin/true", "/nowhere")
