"""
Row 4: a cold start while another image is copied in the background, against the same start without that.

The copied image is of 1 GB that cannot be compressed, at the rate that is the default; both images come over the same
link. The daemon has both mounted in both cases; only the copy makes the difference.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.faultrows.images import random_image
from benchmarks.figures import Figure, ratio
from benchmarks.kit.container import Container
from benchmarks.kit.daemon import NodeDaemon
from benchmarks.kit.host import drop_page_cache
from benchmarks.kit.lazy import trust
from benchmarks.kit.proc import ToolError
from benchmarks.profilerows.starts import PROGRAMS, hot_image

if TYPE_CHECKING:
    from benchmarks.session import Session, Subject

TITLE = "a cold start while another image is copied in the background, 1 Gbit/s, against the start without"
_COPIED_BYTES = 1_000_000_000
_UNDER_WAY_BYTES = 32 << 20
_BEGIN_S = 60.0
_TARGET = 1.1


def measure(session: Session) -> list[Figure]:
    """Figures 4 (numpy, the start that has least else to do), and 4-tensorflow."""
    figures = []
    for letter, subject in PROGRAMS:
        alone: list[float] = []
        beside: list[float] = []
        copied: list[float] = []
        for number in range(session.runs):
            for copying in (False, True) if number % 2 else (True, False):
                seconds, copied_bytes = _start(session, subject, copying=copying)
                (beside if copying else alone).append(seconds)
                if copying:
                    copied.append(copied_bytes / seconds / 1e6)
            session.say(f"{subject.program} {number + 1}: alone {alone[-1]:.2f} s, beside a copy {beside[-1]:.2f} s "
                        f"({copied[-1]:.1f} MB/s meanwhile)")
        key = "4" if letter == "a" else f"4-{subject.program}"
        figures.append(ratio(key, subject.program, _TARGET if letter == "a" else None, beside, alone,
                             copied_mb_s=copied))
    return figures


def _start(session: Session, subject: Subject, *, copying: bool) -> tuple[float, int]:
    """Seconds of the start, and what was copied meanwhile."""
    image = hot_image(session, subject, session.far)
    bulk = random_image(session, "copied", _COPIED_BYTES, session.far)
    trust(session.place, session.far.host)
    daemon = NodeDaemon(session.place, env={"LAZYFS_CACHE_FULL_COPY_AFTER_S": "0"})
    targets = [session.place.folder(name) for name in ("copied-mount", "node-mount")]
    container = Container(session.place, targets[1])
    try:
        daemon.ask_mount(bulk, targets[0], full_copy="on" if copying else "off")
        if copying:
            with (targets[0] / "data").open("rb") as file:
                file.read(4096)
            _wait_copying(daemon)
        drop_page_cache()
        before = _present_bytes(daemon)
        begin = time.perf_counter()
        daemon.ask_mount(image, targets[1])
        container.run(subject.command)
        seconds = time.perf_counter() - begin
        present = _present_bytes(daemon)
        if copying and present >= _COPIED_BYTES:
            raise ToolError("the copy was over before the start: nothing is measured")
        return seconds, present - before
    finally:
        container.close()
        daemon.close()


def _wait_copying(daemon: NodeDaemon) -> None:
    limit = time.monotonic() + _BEGIN_S
    while _present_bytes(daemon) < _UNDER_WAY_BYTES:
        if time.monotonic() > limit:
            raise ToolError("the copy did not begin")
        time.sleep(0.1)


def _present_bytes(daemon: NodeDaemon) -> int:
    """Of the image that is copied."""
    return max(int(one["present_bytes"]) for one in daemon.copies() if one["total_bytes"] >= _COPIED_BYTES)
