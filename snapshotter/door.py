"""
The door of the snapshotter: holds the socket that containerd asks, and sees to it that a server answers behind it.

It imports nothing heavy, does no work, and so has no reason to die. A server that dies is followed by another at once;
meanwhile connections are taken, greeted, and wait. containerd, which connects again at once, is not refused, and its
requests wait; after a refusal it would fail all of them for a second or three, until it tries anew.
systemd keeps the socket over our own death.

Layer: snapshotter. `python -m snapshotter.door SETTINGS`; cli.snapshotter becomes it. SETTINGS: JSON, see `Door`.
State: all in the one Door. The server: `words`, with `--behind NUMBER`; it listens at SERVER_SOCKET in the root, says
"ready" in a line on descriptor NUMBER, then "alive" every `beat_s`, and ends by SIGTERM, with its requests answered.
One that says nothing for _SILENT_BEATS of these is hung: it is killed, and followed by another.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import stat
import sys
import time
from typing import Any, Final, NoReturn

from lazyfs import stacks
from lazyfs.node import notify
from lazyfs.node.callers import foreigner
from snapshotter.relay import GREETING, PAIRS_MAX, Relay

SERVER_SOCKET: Final = "server.sock"
ADDRESS_BYTES_MAX: Final = 107   # sun_path of unix(7), without its NUL
_BACKLOG: Final = 128
_PROBE_S: Final = 1.0
_FAILED_COUNT_MAX: Final = 5     # servers in a row that die before they answer: then we end as the last of them did
_DELAY_S_MAX: Final = 5.0
_DEATHS_PERIOD_S, _DEATHS_COUNT_MAX = 60.0, 30   # of servers that did answer: more often, and starts are delayed too
_SILENT_BEATS: Final = 12        # two minutes: a disk may hold up the records for a while
_STOP_S: Final = 25.0            # for a server to end; then it is killed. systemd waits 30 s
_STORED: Final = "snapshotter"   # name of the socket in systemd's descriptor store
_PR_SET_PDEATHSIG: Final = 1     # linux/prctl.h
_ENDING: Final = (signal.SIGTERM, signal.SIGINT)
_EXIT_USAGE, _EXIT_HOST, _EXIT_BUSY = 2, 40, 42   # as in lazyfs.errors, which would have to be imported


class Door:
    """
    See the module.

    Settings: `address` (of the socket), `root` (the snapshotter's, absolute, made), `words` (of the server's command),
    `beat_s` (of its signs of life).
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._address: str = settings["address"]
        self._words: list[str] = settings["words"]
        self._beat_s: float = settings["beat_s"]
        self._root = os.open(settings["root"], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._epoll = select.epoll()
        self._relay = Relay(self._epoll, self._wait_with)
        self._listener, self._inode = open_door(self._address)
        self._stored = False
        self._accepting = False
        self._waiting: list[tuple[socket.socket, bytes]] = []   # clients, greeted, for whom there is no server yet
        self._pid = 0
        self._pidfd = self._said = -1
        self._ready = self._answered = False
        self._start_at = self._stop_by = self._look_at = 0.0
        self._silent: int | None = None   # looks in a row at which the server had said nothing; None: not ready yet
        self._failed = 0
        self._deaths: list[float] = []
        self._asked = self._stopping = False
        self._code = 0

    def run(self) -> int:
        """Until it is told to stop, or no server can be started. Returns the exit code."""
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        for number in _ENDING:
            signal.signal(number, self._on_signal)
        stacks.install(stacks.tell_stderr)
        self._epoll.register(self._wake_r, select.EPOLLIN)
        while not (self._stopping and not self._pid):
            self._turn()
        self._relay.close()
        for client, _ in self._waiting:
            client.close()
        self._close()
        return self._code

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._asked = True

    def _turn(self) -> None:
        if self._asked:
            self._stop()
        self._on_time()
        for number, events in self._epoll.poll(self._wait_s()):
            if self._relay.handle(number, events):
                continue
            if number == self._wake_r:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_r, 4096)
            elif number == self._pidfd:
                self._ended()
            elif number == self._said:
                self._hear()
            elif number == self._listener.fileno():
                self._accept()
        self._look_for_connections()

    def _wait_s(self) -> float | None:
        """Seconds until something is to be done by the clock."""
        until = self._stop_by if self._stopping else self._look_at if self._pid else self._start_at
        return max(0.0, until - time.monotonic()) if until else None

    def _on_time(self) -> None:
        now = time.monotonic()
        if self._stopping and self._pid and now >= self._stop_by:
            _say(f"the server {self._pid} does not end: killed")
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._stop_by = now + _STOP_S
        elif not self._stopping and not self._pid and now >= self._start_at:
            self._start()
        elif not self._stopping and self._pid and now >= self._look_at:
            self._look(now)

    def _look(self, now: float) -> None:
        """Whether the server lives, and tell systemd that we do. Looks are counted: a machine that slept looks once."""
        notify.watchdog(now)
        self._look_at = now + self._beat_s
        if self._silent is None:
            return
        self._silent += 1
        if self._silent > _SILENT_BEATS:
            self._silent = None
            _say(f"the server {self._pid} has shown no sign of life for {_SILENT_BEATS * self._beat_s:g} s: killed")
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    # --- connections -------------------------------------------------------------------------------------------------

    def _look_for_connections(self) -> None:
        """Only while there is room: else they wait in the socket's queue."""
        wanted = not self._stopping and self._relay.count + len(self._waiting) < PAIRS_MAX
        if wanted != self._accepting:
            if wanted:
                self._epoll.register(self._listener, select.EPOLLIN)
            else:
                self._epoll.unregister(self._listener)
            self._accepting = wanted

    def _accept(self) -> None:
        with contextlib.suppress(OSError):   # it has gone already
            client, _ = self._listener.accept()
            if who := foreigner(client):
                _say(f"connection refused: {who}")
                client.close()
                return
            client.setblocking(False)
            if not self._ready or not self._pass_on(client, b"", greeted=False):
                self._wait_with(client, b"", greeted=False)

    def _wait_with(self, client: socket.socket, early: bytes, greeted: bool) -> None:
        """For the next server. `early`: what the client has said already, to a server that did not answer."""
        self._waiting.append((client, early))
        if not greeted:
            with contextlib.suppress(OSError):   # found out when there is a server
                client.send(GREETING)

    def _pass_on(self, client: socket.socket, early: bytes, *, greeted: bool) -> bool:
        """Whether the server took it; if not, it is just dying, and the client is for the next one."""
        server = socket.socket(socket.AF_UNIX)
        try:
            server.setblocking(False)
            server.connect(f"/proc/self/fd/{self._root}/{SERVER_SOCKET}")
        except OSError:
            server.close()
            self._ready = False
            return False
        self._relay.add(client, server, greeted=greeted, early=early)
        return True

    # --- the server --------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._said, theirs = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()
        # What comes between fork and exec would be taken by our handler, in the child, and be lost: it waits.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        try:
            self._pid = os.fork()
        except OSError as error:     # no memory, too many processes: later
            _say(f"no server can be started now: {error.strerror}")
            self._start_at = time.monotonic() + _DELAY_S_MAX
            os.close(self._said)
            os.close(theirs)
            return
        else:
            if self._pid == 0:
                _become_server([*self._words, "--behind", str(theirs)], theirs, parent)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        os.close(theirs)
        self._pidfd = os.pidfd_open(self._pid)
        self._epoll.register(self._pidfd, select.EPOLLIN)
        self._epoll.register(self._said, select.EPOLLIN)

    def _hear(self) -> None:
        if not os.read(self._said, 64):
            self._epoll.unregister(self._said)   # closed: its end is next
            return
        self._ready, self._failed, self._silent = True, 0, 0
        while self._waiting and self._pass_on(*self._waiting[0], greeted=True):
            del self._waiting[0]
        if not self._answered:
            self._answered = True
            self._stored = notify.store(_STORED, self._listener.fileno())
            notify.notify("READY=1")

    def _ended(self) -> None:
        _, status = os.waitpid(self._pid, 0)
        code = os.waitstatus_to_exitcode(status)
        for descriptor in (self._pidfd, self._said):
            os.close(descriptor)     # which takes it out of epoll
        pid, was_ready, self._pid, self._pidfd, self._said, self._ready = self._pid, self._ready, 0, -1, -1, False
        self._silent = None
        if self._stopping:
            self._code = max(code, 0)
            return
        _say(f"the server {pid} died: {f'exit code {code}' if code >= 0 else f'signal {-code}'}")
        self._failed += not was_ready
        if self._failed and (not self._answered or self._failed >= _FAILED_COUNT_MAX):
            self._stopping, self._code = True, code if code > 0 else 70
            return
        now = time.monotonic()
        self._deaths = [one for one in self._deaths if now - one < _DEATHS_PERIOD_S] + [now]
        crowded = len(self._deaths) > _DEATHS_COUNT_MAX
        self._start_at = now + (_DELAY_S_MAX if crowded else min(_DELAY_S_MAX, 0.1 * 2 ** self._failed - 0.1))

    def _stop(self) -> None:
        self._asked, already, self._stopping = False, self._stopping, True
        if already:
            return
        notify.notify("STOPPING=1")
        self._stop_by = time.monotonic() + _STOP_S
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def _close(self) -> None:
        self._listener.close()
        if not self._stored:     # else systemd keeps it, and clients may connect to it until we are back
            with contextlib.suppress(OSError):
                if os.stat(self._address).st_ino == self._inode:   # noqa: PTH116 - not that of who came after us
                    os.unlink(self._address)   # noqa: PTH108 - light


def open_door(address: str) -> tuple[socket.socket, int]:
    """
    The listening socket, for root only, and its inode: that which systemd kept, or a new one.

    Exits with a clear line if the path cannot be used, or somebody answers there.

    """
    if len(os.fsencode(address)) > ADDRESS_BYTES_MAX:
        _refuse(f"socket path of {len(os.fsencode(address))} bytes, a unix socket has {ADDRESS_BYTES_MAX}: {address}",
                "choose a shorter --address", _EXIT_USAGE)
    kept = notify.take_stored().get(_STORED)
    try:
        if kept is not None:
            listener = socket.socket(fileno=kept)
            if listener.getsockname() == address and stat.S_ISSOCK(os.stat(address).st_mode):   # noqa: PTH116
                listener.setblocking(False)
                return listener, os.stat(address).st_ino   # noqa: PTH116
            listener.close()     # of another configuration
            notify.forget(_STORED)
        os.makedirs(os.path.dirname(address), mode=0o700, exist_ok=True)   # noqa: PTH103, PTH120
        _make_room(address)
        listener = socket.socket(socket.AF_UNIX)
        mask = os.umask(0o177)   # the socket is never open to others, not for a moment
        try:
            listener.bind(address)
        finally:
            os.umask(mask)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        return listener, os.stat(address).st_ino   # noqa: PTH116
    except OSError as error:
        _refuse(f"cannot listen on {address}: {error.strerror or error}", "it needs root", _EXIT_HOST)


def _make_room(address: str) -> None:
    """Remove a socket that nobody listens on. Raises OSError."""
    try:
        mode = os.stat(address).st_mode   # noqa: PTH116 - light
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        _refuse(f"{address} exists and is no socket", "choose another --address", _EXIT_USAGE)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            os.unlink(address)   # noqa: PTH108 - its owner was killed
        else:
            _refuse(f"somebody answers on {address} already", "stop it, or choose another --address", _EXIT_BUSY)


def _become_server(words: list[str], said: int, parent: int) -> NoReturn:
    code = 70
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)   # the next door's server wants the root
        signal.set_wakeup_fd(-1)
        for number in _ENDING:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
        stacks.ignore()   # until it has something to tell
        os.set_inheritable(said, True)
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
            os.environ.pop(name, None)
        if os.getppid() == parent:
            os.execv(words[0], words)   # noqa: S606
    finally:
        os._exit(code)


def _say(text: str) -> None:
    print(f"lazyfs snapshotter: {text}", file=sys.stderr, flush=True)


def _refuse(text: str, hint: str, code: int) -> NoReturn:
    print(f"lazyfs: error: {text}\nhint: {hint}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    sys.exit(Door(json.loads(sys.argv[1])).run())
