"""The door of `lazyfs snapshotter`: servers die behind it, and who asks only waits."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from snapshotter.api import snapshots_pb2 as api
from snapshotter.api.snapshots_pb2_grpc import SnapshotsStub
from tests.mountkit import LAZYFS
from tests.snapshotter.test_service import WAIT_S, Running, commit, running, start

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the snapshotter needs root")


def server_of(door: int) -> int:
    """The pid of the server behind; 0: there is none now."""
    words = Path(f"/proc/{door}/task/{door}/children").read_text(encoding="ascii").split()
    return int(words[0]) if words else 0


def wait_until(condition: Callable[[], object], failure: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(0.01)


def kill_server(found: Running) -> int:
    """Returns the pid that it had, when it is gone: one that is just dying may still take a connection."""
    pid = server_of(found.process.pid)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: server_of(found.process.pid) != pid, "it does not die")
    return pid


def ask(address: Path, name: str = "base") -> int:
    """As a client does that never waits for a server that is not there, on a connection of its own."""
    with grpc.insecure_channel(f"unix:{address}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        kind: int = SnapshotsStub(channel).Stat(api.StatSnapshotRequest(key=name), timeout=WAIT_S).info.kind
        return kind


def test_a_killed_server_is_followed_by_another_and_nobody_is_refused(tmp_path: Path) -> None:
    with running(tmp_path) as found:
        commit(found.stub, "base")
        for _ in range(3):
            before = kill_server(found)
            assert ask(found.address) == api.COMMITTED
            assert server_of(found.process.pid) != before
        assert found.stop() == 0
    assert "died: signal 9" in (tmp_path / "log").read_text()


def test_a_server_that_hangs_is_followed_by_another(tmp_path: Path) -> None:
    with running(tmp_path, more=("--beat", "0.25")) as found:
        commit(found.stub, "base")
        before = server_of(found.process.pid)
        for _ in range(2):
            assert ask(found.address) == api.COMMITTED
            assert server_of(found.process.pid) == before, "one that lives is left alone"
        os.kill(before, signal.SIGSTOP)
        wait_until(lambda: server_of(found.process.pid) != before, "it hangs on")
        assert ask(found.address) == api.COMMITTED
        assert found.stop() == 0
    assert "no sign of life for 3 s" in (tmp_path / "log").read_text()


def test_a_client_is_greeted_while_no_server_can_answer(tmp_path: Path) -> None:
    with running(tmp_path) as found:
        commit(found.stub, "base")
        (tmp_path / "root" / "metadata.db").rename(tmp_path / "hidden")
        (tmp_path / "root" / "metadata.db").mkdir()           # no server can start
        kill_server(found)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(WAIT_S)
            client.connect(str(found.address))
            assert client.recv(9) == b"\0\0\0\4\0\0\0\0\0"
            (tmp_path / "root" / "metadata.db").rmdir()
            (tmp_path / "hidden").rename(tmp_path / "root" / "metadata.db")
            assert ask(found.address) == api.COMMITTED


def test_servers_that_cannot_start_end_it_and_it_says_why(tmp_path: Path) -> None:
    with running(tmp_path) as found:
        commit(found.stub, "base")
        for name in ("metadata.db", "metadata.db-wal", "metadata.db-shm"):
            (tmp_path / "root" / name).rename(tmp_path / name)
        (tmp_path / "root" / "metadata.db").mkdir()
        kill_server(found)
        assert found.process.wait(2 * WAIT_S) == 40
        assert not found.address.exists()
    assert "records" in (tmp_path / "log").read_text()


def test_a_door_that_is_killed_takes_its_server_with_it(tmp_path: Path) -> None:
    with running(tmp_path) as first:
        commit(first.stub, "base")
        server = server_of(first.process.pid)
        first.process.kill()
        first.process.wait(WAIT_S)
        wait_until(lambda: not Path(f"/proc/{server}").exists() or "State:\tZ" in status_of(server), "it lives on")
    with running(tmp_path) as second:
        assert second.stub.Stat(api.StatSnapshotRequest(key="base")).info.kind == api.COMMITTED


def status_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return "State:\tZ"


def test_a_signal_that_another_thread_takes_ends_the_server(tmp_path: Path) -> None:
    with running(tmp_path) as found:
        server = server_of(found.process.pid)
        threads = [int(path.name) for path in Path(f"/proc/{server}/task").iterdir()]
        other = max(thread for thread in threads if thread != server)
        assert ctypes.CDLL(None).tgkill(server, other, signal.SIGTERM) == 0
        wait_until(lambda: server_of(found.process.pid) != server, "it goes on as if nothing had been said")


def test_a_door_that_is_told_to_end_while_a_server_begins_ends(tmp_path: Path) -> None:
    for number in range(4):
        found = start(tmp_path, tmp_path / f"{number}.sock")
        door = found.process.pid
        try:
            wait_until(partial(server_of, door), "no server")
            assert found.stop() == 0
        finally:
            found.process.kill()
            found.process.wait(WAIT_S)


def test_requests_under_way_are_answered_before_the_end(tmp_path: Path) -> None:
    with running(tmp_path) as found:
        commit(found.stub, "base")
        calls = [found.stub.Prepare.future(api.PrepareSnapshotRequest(key=f"c{number}", parent="base"))
                 for number in range(50)]
        calls[0].result(WAIT_S)
        assert found.stop() == 0
        done = [call for call in calls if call.exception(WAIT_S) is None]
        assert done
    with running(tmp_path) as second:
        names = {info.name for page in second.stub.List(api.ListSnapshotsRequest()) for info in page.info}
        assert {f"c{number}" for number, call in enumerate(calls) if call.exception() is None} <= names


def test_systemd_keeps_the_socket_over_our_death(tmp_path: Path) -> None:
    notified = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(notified))
        listener.settimeout(WAIT_S)
        first = start(tmp_path, NOTIFY_SOCKET=str(notified))
        stack.callback(first.process.kill)
        message, (kept,), _, _ = socket.recv_fds(listener, 200, 1)
        stack.callback(os.close, kept)
        assert message == b"FDSTORE=1\nFDNAME=snapshotter\nFDPOLL=0"
        assert listener.recv(100) == b"READY=1"
        first.process.kill()
        first.process.wait(WAIT_S)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(WAIT_S)
            client.connect(str(first.address))           # nobody is there, and it is not refused
            inode = first.address.stat().st_ino
            second = start_stored(tmp_path, first.address, kept, str(notified))
            try:
                assert client.recv(9)[3] == 4, "SETTINGS, of the door or of the server"
                client.close()
                channel = grpc.insecure_channel(f"unix:{first.address}")
                stack.callback(channel.close)
                assert list(SnapshotsStub(channel).List(api.ListSnapshotsRequest(), timeout=WAIT_S)) == []
            finally:
                assert second.stop() == 0
        assert first.address.stat().st_ino == inode, "systemd has it still"


def start_stored(directory: Path, address: Path, descriptor: int, notified: str) -> Running:
    """As systemd starts a service that has a descriptor in its store."""
    words = [*LAZYFS, "snapshotter", "--root", str(directory / "root"), "--address", str(address)]
    script = f'exec env LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=snapshotter "$@" 3<&{descriptor}'
    with (directory / "log").open("a") as log:
        process = subprocess.Popen(["bash", "-c", script, "start", *words], stdout=log, stderr=log, text=True,
                                   pass_fds=(descriptor,), env={**os.environ, "NOTIFY_SOCKET": notified})
    return Running(process, address)
