"""
Row 6: bytes fetched again after the worker is killed, and after power is cut, in the middle of a full copy.

6a: a daemon copies an image from a registry behind a proxy that counts what it sends; its worker gets SIGKILL half
way, the next one goes on. What was sent more than for a copy that nobody killed is what was fetched again.
6b: the worker's own copy into a cache on ext4 in a file, that is shut down as by a power cut (tests/copykit.py): what
had landed and is not there at the next boot will be fetched again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.faultrows.images import random_image
from benchmarks.figures import Figure, plain
from benchmarks.kit.daemon import NodeDaemon
from benchmarks.kit.lazy import trust
from benchmarks.kit.proc import ToolError
from tests.copykit import lost_by_power_cut
from tests.faultproxy import FaultProxy

if TYPE_CHECKING:

    from benchmarks.session import Session

TITLE = "bytes fetched again after SIGKILL / a power cut in the middle of a full copy"
_IMAGE_BYTES = 400 << 20
_COPY_S = 300.0
_MB = 1e6
_KILLED_MB, _CUT_MB = 8 * (1 << 20) / _MB, 64 * (1 << 20) / _MB


def measure(session: Session) -> list[Figure]:
    killed, cut, landed = [], [], []
    for number in range(session.runs):
        undisturbed = _sent_bytes(session, kill=False)
        killed.append((_sent_bytes(session, kill=True) - undisturbed) / _MB)
        landed_bytes, lost_bytes = lost_by_power_cut(session.place.folder("power"))
        cut.append(lost_bytes / _MB)
        landed.append(landed_bytes / _MB)
        session.say(f"{number + 1}: again after SIGKILL {killed[-1]:.1f} MB, after a power cut {cut[-1]:.1f} MB "
                    f"of {landed[-1]:.0f}")
    return [plain("6a", "after SIGKILL of the worker", _KILLED_MB, "MB", killed),
            plain("6b", "after a power cut", _CUT_MB, "MB", cut, landed_mb=landed)]


def _sent_bytes(session: Session, *, kill: bool) -> int:
    """What the registry sent for a whole copy."""
    near = random_image(session, "recopied", _IMAGE_BYTES, session.near)
    with FaultProxy(session.near.host) as proxy:
        trust(session.place, proxy.host)
        daemon = NodeDaemon(session.place, env={"LAZYFS_CACHE_FULL_COPY_AFTER_S": "0",
                                                "LAZYFS_CACHE_FULL_COPY_RATE": "64MiB"})
        target = session.place.folder("node-mount")
        try:
            daemon.ask_mount(near.replace(session.near.host, proxy.host), target, full_copy="on")
            with (target / "data").open("rb") as file:
                file.read(4096)
            _wait(daemon, 0.5)
            if kill:
                daemon.kill_worker()
            _wait(daemon, 1.0)
            return proxy.body_bytes_sent
        finally:
            daemon.close()


def _wait(daemon: NodeDaemon, share: float) -> None:
    limit = time.monotonic() + _COPY_S
    while True:
        (one,) = daemon.copies()
        if one["present_bytes"] >= share * one["total_bytes"]:
            return
        if time.monotonic() > limit:
            raise ToolError(f"the copy does not get on: {one}")
        time.sleep(0.02)
