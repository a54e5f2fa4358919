"""
A worker, as its keeper sees it: a process, a channel of lines, when it last gave a sign of life.

Light to import (the keeper stays small). Layer: node. Who calls: node.keeper. The words: node.daemonworker.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time

from lazyfs import stacks

_PIDFD_GETFD = 438               # asm-generic/unistd.h; the same number on every architecture
_LINE_BYTES_MAX = 4096


class Child:
    """
    One worker.

    `channel` is None for one that another keeper had started. `silent`: its end of it is closed. `killed`: by us.
    """

    def __init__(self, pid: int, channel: socket.socket | None) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.channel = channel
        self.imported = False
        self.ready = False
        self.silent = False
        self.killed = False
        self.began = self.last_sign = time.monotonic()
        self._buffer = b""

    @classmethod
    def start(cls, settings: dict[str, object], fuse: int, listener: int) -> Child:
        """Fork and exec one. `settings`: the fields of daemonworker.Place but for the descriptors."""
        ours, theirs = socket.socketpair()
        place = {**settings, "channel": theirs.fileno(), "fuse": fuse, "listener": listener}
        pid = os.fork()
        if pid == 0:
            _become_worker(json.dumps(place), (theirs.fileno(), fuse, listener))
        theirs.close()
        ours.setblocking(False)
        return cls(pid, ours)

    def say(self, line: bytes) -> None:
        """Tell it something. One that is gone or does not listen is noticed elsewhere."""
        if self.channel is not None:
            with contextlib.suppress(OSError):
                self.channel.send(line)
        elif line == b"retire\n":
            self.kill(signal.SIGTERM)

    def hear(self) -> list[bytes]:
        """The lines that have arrived."""
        assert self.channel is not None
        try:
            data = self.channel.recv(4096)
        except OSError:
            return []
        if not data:
            self.silent = True   # it is ending: its pidfd says when; an end of file would be told again and again
            return []
        self.last_sign = time.monotonic()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        self._buffer = self._buffer[-_LINE_BYTES_MAX:]
        return lines

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.killed |= number == signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def collect(self) -> str:
        """After its end: how it ended, in words."""
        text = "ended"
        with contextlib.suppress(ChildProcessError):
            _, status = os.waitpid(self.pid, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status)
            text = f"exit code {code}" if code >= 0 else f"signal {-code}"
        os.close(self.pidfd)
        if self.channel is not None:
            self.channel.close()
        return text


def reap_orphans(known: set[int]) -> None:
    """As process 1 of a container, we are who collects a dead worker's children. `known`: ours, collected elsewhere."""
    if os.getpid() == 1:
        with contextlib.suppress(ChildProcessError):
            info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if info is not None and info.si_pid not in known:
                os.waitpid(info.si_pid, os.WNOHANG)


def fetch_descriptor(pid: int, number: int) -> int:
    """
    A duplicate of another process's descriptor (pidfd_getfd(2)).

    Raises:
        OSError: no such process or descriptor, or not allowed.

    """
    pidfd = os.pidfd_open(pid)
    try:
        found = int(ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, number, 0))
        if found < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return found
    finally:
        os.close(pidfd)


def _become_worker(place: str, descriptors: tuple[int, ...]) -> None:
    code = 70
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        stacks.ignore()
        for descriptor in descriptors:
            os.set_inheritable(descriptor, True)
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
            os.environ.pop(name, None)
        os.execv(sys.executable, [sys.executable, "-m", "lazyfs.node.daemonworker", place])   # noqa: S606
    finally:
        os._exit(code)
