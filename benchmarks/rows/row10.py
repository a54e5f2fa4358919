"""Row 10: from `lazyfs mount` to the first byte of a small file; 30,000 entries, registry on loopback."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.figures import Figure, plain
from benchmarks.kit.host import drop_page_cache
from benchmarks.kit.lazy import LazyMount
from benchmarks.session import TENSORFLOW

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "from lazyfs mount to readable, image of 30,000 entries, registry on loopback"
_SMALL_FILE = "etc/debian_version"


def measure(session: Session) -> list[Figure]:
    image = session.lazy(TENSORFLOW, session.near)
    _readable_s(session, image)  # the first one also reads Python's own files from the disk
    warm = [_readable_s(session, image) for _ in range(session.runs)]
    cold = []
    for _ in range(session.runs):
        drop_page_cache()
        cold.append(_readable_s(session, image))
    return [
        plain("10", "no worker running, cache empty", 0.5, "s", warm),
        plain("10-cold", "the same, page cache cold (Python itself comes from the disk)", None, "s", cold),
    ]


def _readable_s(session: Session, image: str) -> float:
    mount = LazyMount(session.place, image)
    begin = time.perf_counter()
    mount.mount()
    with (mount.path / _SMALL_FILE).open("rb") as file:
        assert file.read(1)
    elapsed = time.perf_counter() - begin
    mount.close()
    return elapsed
