"""Cold starts of an image with a hot part on a node whose daemon runs: what most rows of this table measure."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from benchmarks.kit.container import Container
from benchmarks.kit.daemon import NodeDaemon
from benchmarks.kit.host import drop_page_cache
from benchmarks.kit.lazy import trust
from benchmarks.kit.link import RATE_BIT_S
from benchmarks.rows.recording import record_list
from benchmarks.session import NUMPY, TENSORFLOW

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from benchmarks.kit.registry import Registry
    from benchmarks.session import Session, Subject

PROGRAMS = (("a", NUMPY), ("b", TENSORFLOW))     # the letters of the rows
FAST_BIT_S = RATE_BIT_S
SLOW_BIT_S = 100_000_000


@dataclass(frozen=True, slots=True)
class HotStart:
    """
    One start.

    Attributes:
        total_s: from nothing on the node but its daemon to the program's end.
        ready_s: of this, until the image was mounted.
        fetched_bytes: stored bytes that the worker received of blobs until then.
        link_bytes: that crossed the link until then, both ways, headers included.
        request_count: that the registry answered until then.
        daemon_cpu_s: CPU seconds of the daemon's processes.

    """

    total_s: float
    ready_s: float
    fetched_bytes: int
    link_bytes: int
    request_count: int
    daemon_cpu_s: float


def hot_image(session: Session, subject: Subject, registry: Registry) -> str:
    """The image with a hot part, recorded and converted when it is first asked for."""
    listed = str(record_list(session, subject))
    return session.lazy(subject, registry, f"hot-{subject.program}", "--prefetch", listed)


@cache
def fast_starts(session: Session, letter: str) -> tuple[HotStart, ...]:
    """Starts of a program over 1 Gbit/s, for rows that need no turns with another system: they share them."""
    subject = dict(PROGRAMS)[letter]
    return tuple(start_hot(session, subject) for _ in range(session.runs))


def start_hot(
    session: Session, subject: Subject, *, cache: Path | None = None, env: Mapping[str, str] | None = None
) -> HotStart:
    """
    Mount by a daemon just started, asked as the snapshotter asks it, then run by runc on overlayfs; page cache cold.

    Args:
        session: which run.
        subject: which program.
        cache: a cache directory used before; None: an empty one.
        env: added to the daemon's environment.

    """
    image = session.at_distance(hot_image(session, subject, session.far))
    trust(session.place, session.far_host)
    daemon = NodeDaemon(session.place, cache, env)
    target = session.place.folder("node-mount")
    container = Container(session.place, target)
    try:
        drop_page_cache()
        cpu_s, link, requests = daemon.cpu_s(), session.link.bytes_total(), session.far.request_count()
        begin = time.perf_counter()
        daemon.ask_mount(image, target)
        ready_s = time.perf_counter() - begin
        container.run(subject.command)
        total_s = time.perf_counter() - begin
        fetched = daemon.statistics()["fetch"]["fetched_stored_bytes"]
        return HotStart(
            total_s, ready_s, fetched, session.link.bytes_total() - link, session.far.request_count() - requests,
            daemon.cpu_s() - cpu_s,
        )  # fmt: skip
    finally:
        container.close()
        daemon.close()
