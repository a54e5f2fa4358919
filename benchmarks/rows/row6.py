"""Row 6: whole tree read through the lazy mount, cache empty, over 1 Gbit/s, against pull and unpack."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.figures import Figure, ratio
from benchmarks.kit.containerd import Containerd
from benchmarks.kit.host import drop_page_cache
from benchmarks.kit.lazy import LazyMount
from benchmarks.rows.trees import read_tree
from benchmarks.session import TENSORFLOW

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "whole tree read with an empty cache over 1 Gbit/s against pull and unpack"


def measure(session: Session) -> list[Figure]:
    source = session.source(TENSORFLOW, session.far)
    image = session.lazy(TENSORFLOW, session.far)
    ours, theirs, link_mb = [], [], []
    for _ in range(session.runs):
        containerd = Containerd(session.place)
        drop_page_cache()
        theirs.append(containerd.pull(source))
        containerd.close()
        mount = LazyMount(session.place, image)
        drop_page_cache()
        before, begin = session.link.bytes_total(), time.perf_counter()
        mount.mount()
        read_tree(mount.path)
        ours.append(time.perf_counter() - begin)
        link_mb.append((session.link.bytes_total() - before) / 1e6)
        mount.close()
    return [ratio("6", "mount and tar of the tree / containerd pull", 1.1, ours, theirs, link_mb=link_mb)]
