"""
The pull mirror as the keeper's child: started where [mirror] address is set, again when it ends, and killed when it
gives no sign of life.

Light to import (the keeper stays small). Layer: node. Who calls: node.keeper, in its loop. Pulls go on without the
mirror, so it is never waited for but at its end, and dies with its keeper. With one that hangs they do not: a runtime's
connections to it stand, and containerd waits for the answer without a limit. So it is watched as systemd watches:
by sd_notify(3), over a socket of ours that takes the word of this child only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import struct
import sys
from typing import Any, Final

from lazyfs import stacks

_AGAIN_FIRST_S, _AGAIN_MAX_S = 1.0, 30.0
_WELL_S: Final = 60.0            # who has run for so long is started again at once
_START_S: Final = 60.0           # for its first sign: loading, on a busy machine
_SLEPT_S: Final = 2.0            # our own turn came so late: the mirror had none either
_SIGN_BYTES_MAX: Final = 4096
_SIGN_COUNT_MAX: Final = 64      # heard in one turn; the kernel keeps no more of them for us
_CREDENTIALS: Final = struct.Struct("3i")    # struct ucred: pid, uid, gid
_END_S: Final = 2.0              # for answers that are being sent; clients ask the registry for the rest
_PR_SET_PDEATHSIG: Final = 1     # linux/prctl.h


class MirrorChild:
    """See the module. State: its pid, its last sign of life, and when it may be started again."""

    def __init__(self) -> None:
        self._pid = self._pidfd = 0
        self._ears: socket.socket | None = None
        self._began = self._again_at = self._looked_at = self._sign_by = 0.0
        self._again_s = _AGAIN_FIRST_S

    def look(self, settings: dict[str, Any], hang_s: float, now: float) -> None:
        """
        Now and then, and when a child has ended. `settings`: the worker's; `hang_s`: without a sign for so long it is
        killed; `now`: monotonic.
        """
        slept_s, self._looked_at = now - self._looked_at, now
        if slept_s > _SLEPT_S:
            self._sign_by += slept_s
        if self._pid and self._has_ended():
            self._again_s = _AGAIN_FIRST_S if now - self._began > _WELL_S else min(2 * self._again_s, _AGAIN_MAX_S)
            self._again_at = now + self._again_s
        if self._pid:
            self._watch(hang_s, now)
        elif now >= self._again_at and _is_wanted(settings):
            self._start(hang_s, now)

    def end(self) -> None:
        """Have it end, and wait for that, for _END_S at most."""
        if not self._pid:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if not poll.poll(_END_S * 1000):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)
        self._forget()

    def _start(self, hang_s: float, now: float) -> None:
        self._ears = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._ears.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._ears.bind("")          # a name in the abstract namespace, which the kernel chooses
        keeper = os.getpid()
        pid = os.fork()
        if pid == 0:
            _become_mirror(keeper, "@" + self._ears.getsockname()[1:].decode(), hang_s)
        self._pid, self._pidfd, self._began = pid, os.pidfd_open(pid), now
        self._sign_by = now + max(hang_s, _START_S)

    def _watch(self, hang_s: float, now: float) -> None:
        assert self._ears is not None
        with contextlib.suppress(OSError):
            for _ in range(_SIGN_COUNT_MAX):
                _, found, _, _ = self._ears.recvmsg(_SIGN_BYTES_MAX, socket.CMSG_SPACE(_CREDENTIALS.size))
                if any(kind == socket.SCM_CREDENTIALS and _CREDENTIALS.unpack(data)[0] == self._pid
                       for _, kind, data in found):
                    self._sign_by = now + hang_s
        if now > self._sign_by:
            _say(f"gave no sign of life for {hang_s:g} s: killed")
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._sign_by = now + _START_S       # it may hang in the kernel for a while

    def _has_ended(self) -> bool:
        try:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
        except ChildProcessError:        # collected as an orphan: we are process 1
            pid, status = self._pid, 0
        if not pid:
            return False
        _say(f"ended (status {status}), and is started again")
        self._forget()
        return True

    def _forget(self) -> None:
        os.close(self._pidfd)
        self._pid = self._pidfd = 0
        if self._ears is not None:
            self._ears.close()


def _say(text: str) -> None:
    print(f"lazyfs keeper: the mirror {text}", file=sys.stderr, flush=True)


def _is_wanted(settings: dict[str, Any]) -> bool:
    """Whether a configuration says so; it came over a socket, and may be of another version."""
    found: Any = settings
    for name in ("config", "mirror", "address"):
        found = found.get(name) if isinstance(found, dict) else None
    return isinstance(found, str) and bool(found)


def _become_mirror(keeper: int, ears: str, hang_s: float) -> None:
    code = 70
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        stacks.ignore()
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:  # noqa: PTH123 - light
            file.write("0")              # no container waits for it: it need not be killed last, as the keeper is
        os.environ.update(NOTIFY_SOCKET=ears, WATCHDOG_USEC=str(int(hang_s * 1e6)), WATCHDOG_PID=str(os.getpid()))
        if os.getppid() == keeper:       # else it died before we asked to be told
            os.execv(sys.executable, [sys.executable, "-m", "lazyfs", "mirror"])   # noqa: S606
    finally:
        os._exit(code)
