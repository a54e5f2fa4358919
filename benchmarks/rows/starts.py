"""Cold starts, ours and containerd's: what rows 1 and 2 and the sweeps measure."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.kit.container import Container
from benchmarks.kit.containerd import Containerd
from benchmarks.kit.host import drop_page_cache
from benchmarks.kit.lazy import LazyMount

if TYPE_CHECKING:
    from benchmarks.session import Session, Subject


@dataclass(frozen=True, slots=True)
class Start:
    """
    One cold start over the link.

    Attributes:
        total_s: from nothing on the node to the program's end.
        ready_s: of this, until the image could be used (mounted, or pulled and unpacked).
        link_bytes: that crossed the link until the program's end, both ways.
        touched_bytes: stored (compressed) size of the chunks that were read; 0 where there are none.
        fetched_bytes: stored bytes that lazyfs received: touched, read ahead and prefetched ones.

    """

    total_s: float
    ready_s: float
    link_bytes: int
    touched_bytes: int = 0
    fetched_bytes: int = 0


def start_whole(session: Session, subject: Subject) -> Start:
    """Containerd with an empty store: pull, unpack, run."""
    reference = session.source(subject, session.far)
    containerd = Containerd(session.place)
    drop_page_cache()
    before, begin = session.link.bytes_total(), time.perf_counter()
    ready_s = containerd.pull(reference)
    containerd.run(reference, subject.command)
    result = Start(time.perf_counter() - begin, ready_s, session.link.bytes_total() - before)
    containerd.close()
    return result


def start_lazy(session: Session, subject: Subject, tag: str, *convert_options: str) -> Start:
    """Lazyfs with an empty cache: mount, then run on overlayfs."""
    mount = LazyMount(session.place, session.lazy(subject, session.far, tag, *convert_options))
    container = Container(session.place, mount.path)
    drop_page_cache()
    before, begin = session.link.bytes_total(), time.perf_counter()
    ready_s = mount.mount()
    container.run(subject.command)
    total_s = time.perf_counter() - begin
    link_bytes = session.link.bytes_total() - before
    fetch = mount.statistics()["fetch"]
    container.close()
    mount.close()
    return Start(total_s, ready_s, link_bytes, fetch["touched_stored_bytes"], fetch["fetched_stored_bytes"])
