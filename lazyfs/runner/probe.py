"""
Look into a container's network until a port is open or a URL answers.

Layer: runner. Who calls: runner.container. One thread a run: setns(2) is per thread, so that thread, and nobody else,
lives in the container's network namespace; it writes a byte to a pipe when it has seen what it looks for.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING, Self

from lazyfs.errors import BusyError

if TYPE_CHECKING:
    from pathlib import Path

    from lazyfs.runner.rules import HttpTarget, StopRules

_CLONE_NEWNET = 0x40000000
_POLL_S = 0.05
_CONNECT_S = 2.0                 # on loopback: at once, or never
# A first answer may take long: the program reads what it needs for it. Asking again sooner would only add load.
_ANSWER_S = 60.0
_JOIN_S = 2.0
_STATUS_MAX = 400
_HINT = "end that program, or use --net none"
_libc = ctypes.CDLL(None, use_errno=True)


class Probe:
    """
    `with Probe(rules, pid_file, own_network): ...`

    Attributes:
        reader: a descriptor that becomes readable when a rule is met, or cannot be.
        met: which one, in words. `problem`: why none ever will be.

    """

    def __init__(self, rules: StopRules, pid_file: Path, *, own_network: bool) -> None:
        """
        Begin to look.

        Args:
            rules: port or http, or both.
            pid_file: runc writes the container's first process there.
            own_network: the container has a namespace of its own.

        """
        self._rules = rules
        self._pid_file = pid_file
        self._own_network = own_network
        self._ended = threading.Event()
        self._connection: socket.socket | None = None
        self.met = self.problem = ""
        self.reader, self._writer = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="lazyfs-probe", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; whatever it waits for is cut off."""
        self._ended.set()
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(_JOIN_S)
        os.close(self.reader)
        if not self._thread.is_alive():   # else it hangs in a name server: it ends with us
            os.close(self._writer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        if not self._begin():
            return
        while not self._ended.is_set():
            if self._rules.port is not None and is_open(self._rules.port):
                self.met = f"port {self._rules.port} is open"
            elif self._rules.http is not None:
                status = self._ask(self._rules.http)
                if status is not None and status < _STATUS_MAX:
                    self.met = f"{self._rules.http.text} answers {status}"
            if self.met:
                os.write(self._writer, b"!")
                return
            self._ended.wait(_POLL_S)

    def _begin(self) -> bool:
        """Wait for the container, and enter its network if it has its own; False: we are not needed any more."""
        while not self._ended.wait(_POLL_S):
            with contextlib.suppress(OSError, ValueError):
                pid = int(self._pid_file.read_text(encoding="ascii"))
                if not self._own_network:
                    return True
                descriptor = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    if _libc.setns(descriptor, _CLONE_NEWNET) == 0:
                        return True
                    self.problem = f"cannot enter the container's network: {os.strerror(ctypes.get_errno())}"
                finally:
                    os.close(descriptor)
                os.write(self._writer, b"!")
                return False
        return False

    def _ask(self, target: HttpTarget) -> int | None:
        """The status; None: no answer, or none that is HTTP."""
        context = ssl._create_unverified_context() if target.tls else None  # noqa: S323, SLF001 - only its status counts
        try:
            deadline = time.monotonic() + _ANSWER_S
            with socket.create_connection((target.host, target.port), _CONNECT_S) as plain:
                self._connection = plain
                plain.settimeout(max(0.1, deadline - time.monotonic()))
                asked = plain if context is None else context.wrap_socket(plain, server_hostname=target.host)
                with asked:
                    self._connection = asked
                    client = http.client.HTTPConnection(target.host, target.port)
                    client.sock = asked
                    client.request("GET", target.path, headers={"User-Agent": "lazyfs-profile", "Connection": "close"})
                    with client.getresponse() as response:
                        return response.status
        except (OSError, http.client.HTTPException, ValueError):
            return None
        finally:
            self._connection = None


def is_open(port: int, hosts: tuple[str, ...] = ("127.0.0.1", "::1")) -> bool:
    """Whether somebody listens there; asked in the network namespace of the calling thread."""
    for host in hosts:
        with contextlib.suppress(OSError), socket.create_connection((host, port), _CONNECT_S):
            return True
    return False


def refuse_open(rules: StopRules) -> None:
    """Raises BusyError: in this network the rules are met before the program is there: somebody else listens."""
    if rules.port is not None and is_open(rules.port):
        raise BusyError(f"port {rules.port} is open already: somebody else listens there", hint=_HINT)
    if rules.http is not None and is_open(rules.http.port, (rules.http.host,)):
        raise BusyError(f"{rules.http.text}: somebody else listens there already", hint=_HINT)
