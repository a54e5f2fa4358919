"""
The pull mirror as the keeper's child: started where [mirror] address is set, and again when it ends.

Light to import (the keeper stays small). Layer: node. Who calls: node.keeper, in its loop. Pulls go on without the
mirror, so it is never waited for but at its end, and dies with its keeper.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
from typing import Any, Final

from lazyfs import stacks

_AGAIN_FIRST_S, _AGAIN_MAX_S = 1.0, 30.0
_WELL_S: Final = 60.0            # who has run for so long is started again at once
_END_S: Final = 2.0              # for answers that are being sent; clients ask the registry for the rest
_PR_SET_PDEATHSIG: Final = 1     # linux/prctl.h


class MirrorChild:
    """See the module. State: its pid, and when it may be started again."""

    def __init__(self) -> None:
        self._pid = self._pidfd = 0
        self._began = self._again_at = 0.0
        self._again_s = _AGAIN_FIRST_S

    def look(self, settings: dict[str, Any], now: float) -> None:
        """Now and then, and when a child has ended. `settings`: the worker's; `now`: monotonic."""
        if self._pid and self._has_ended():
            self._again_s = _AGAIN_FIRST_S if now - self._began > _WELL_S else min(2 * self._again_s, _AGAIN_MAX_S)
            self._again_at = now + self._again_s
        if not self._pid and now >= self._again_at and _is_wanted(settings):
            self._start(now)

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

    def _start(self, now: float) -> None:
        keeper = os.getpid()
        pid = os.fork()
        if pid == 0:
            _become_mirror(keeper)
        self._pid, self._pidfd, self._began = pid, os.pidfd_open(pid), now

    def _has_ended(self) -> bool:
        try:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
        except ChildProcessError:        # collected as an orphan: we are process 1
            pid, status = self._pid, 0
        if not pid:
            return False
        print(f"lazyfs keeper: the mirror ended (status {status}), and is started again", file=sys.stderr, flush=True)
        self._forget()
        return True

    def _forget(self) -> None:
        os.close(self._pidfd)
        self._pid = self._pidfd = 0


def _is_wanted(settings: dict[str, Any]) -> bool:
    """Whether a configuration says so; it came over a socket, and may be of another version."""
    found: Any = settings
    for name in ("config", "mirror", "address"):
        found = found.get(name) if isinstance(found, dict) else None
    return isinstance(found, str) and bool(found)


def _become_mirror(keeper: int) -> None:
    code = 70
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        stacks.ignore()
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:  # noqa: PTH123 - light
            file.write("0")              # no container waits for it: it need not be killed last, as the keeper is
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
            os.environ.pop(name, None)
        if os.getppid() == keeper:       # else it died before we asked to be told
            os.execv(sys.executable, [sys.executable, "-m", "lazyfs", "mirror"])   # noqa: S606
    finally:
        os._exit(code)
