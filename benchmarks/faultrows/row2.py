"""
Row 2: how long readers are in D state when the worker is stopped (SIGSTOP), above the watchdog's time.

Readers of each kind read small pieces past the page cache, without a pause, by both drivers. What they do is looked at
every 10 ms. The keeper replaces a worker that was silent for `daemon.hang_s`; what comes on top of that is ours.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.faultrows.images import random_image
from benchmarks.figures import plain
from benchmarks.kit.daemon import NodeDaemon
from benchmarks.kit.lazy import trust
from benchmarks.kit.proc import ToolError
from lazyfs.config import Daemon

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.figures import Figure
    from benchmarks.session import Session

TITLE = "longest D state of any reader, worker stopped, above the watchdog's time"
_IMAGE_BYTES = 32 << 20
_LOOK_S = 0.01
_BEFORE_S, _AFTER_S = 2.0, 3.0
_TIMEOUT_S = 60.0
_TARGET_S = 1.5
_KINDS = (("erofs", "buffered"), ("erofs", "mapped"), ("fuse", "buffered"), ("fuse", "direct"), ("fuse", "open"))
_READER = """
import mmap, os, random, sys
how, path = sys.argv[1:]
size = os.stat(path).st_size
room = mmap.mmap(-1, 4096)
file = os.open(path, os.O_RDONLY | (os.O_DIRECT if how == "direct" else 0))
while True:
    place = random.randrange(size // 4096) * 4096
    if how == "open":
        os.close(os.open(path, os.O_RDONLY))
    elif how == "mapped":
        with mmap.mmap(file, 4096, prot=mmap.PROT_READ, offset=place) as view:
            view[0]
    else:
        os.preadv(file, [room], place)
    if how != "direct":
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
"""


def measure(session: Session) -> list[Figure]:
    """Figure 2, with the longest D state of each kind of reader (seconds)."""
    image = random_image(session, "stopped", _IMAGE_BYTES, session.near)
    longest: dict[str, list[float]] = {" ".join(kind): [] for kind in _KINDS}
    hang_s = Daemon().hang_s
    for number in range(session.runs):
        for kind, seconds in zip(_KINDS, _once(session, image), strict=True):
            longest[" ".join(kind)].append(seconds)
        session.say(f"{number + 1}: " + ", ".join(f"{kind} {values[-1]:.2f} s" for kind, values in longest.items()))
    worst = [max(values) - hang_s for values in zip(*longest.values(), strict=True)]
    return [plain("2", TITLE, _TARGET_S, "s", worst, **longest)]


def _once(session: Session, image: str) -> list[float]:
    """Stop the worker once; the longest D state of each reader, seconds."""
    trust(session.place, session.near.host)
    daemon = NodeDaemon(session.place)
    readers: list[subprocess.Popen[bytes]] = []
    try:
        targets = {driver: session.place.folder(f"{driver}-mount") for driver in ("erofs", "fuse")}
        for driver, target in targets.items():
            daemon.mount(image, target, "--driver", driver)
            (target / "data").read_bytes()    # into the cache: the registry has no part in this
        readers += [
            subprocess.Popen([sys.executable, "-c", _READER, how, str(targets[driver] / "data")],
                             stdin=subprocess.DEVNULL)
            for driver, how in _KINDS
        ]
        time.sleep(_BEFORE_S)
        looks = _Looks([one.pid for one in readers])
        worker = daemon.worker
        os.kill(worker, signal.SIGSTOP)
        limit = time.monotonic() + _TIMEOUT_S
        while daemon.worker == worker:
            if time.monotonic() > limit:
                raise ToolError("the stopped worker was not replaced")
            time.sleep(0.1)
        time.sleep(_AFTER_S)
        found = looks.finish()
        if any(one.poll() is not None for one in readers):
            raise ToolError("a reader had an error")
        return found
    finally:
        for one in readers:
            one.kill()
            one.wait()
        daemon.close()


class _Looks(threading.Thread):
    """Looks at processes until told to finish."""

    def __init__(self, pids: Sequence[int]) -> None:
        super().__init__()
        self._pids = pids
        self._longest = [0.0] * len(pids)
        self._end = threading.Event()
        self.start()

    def run(self) -> None:
        since = [0.0] * len(self._pids)
        while not self._end.wait(_LOOK_S):
            for index, pid in enumerate(self._pids):
                now = time.monotonic()
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                if state != "D":
                    since[index] = 0.0
                    continue
                since[index] = since[index] or now
                self._longest[index] = max(self._longest[index], now - since[index])

    def finish(self) -> list[float]:
        """The longest time each was in D state without a look that found it elsewhere, seconds."""
        self._end.set()
        self.join()
        return self._longest
