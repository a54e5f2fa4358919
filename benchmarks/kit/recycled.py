"""
Pages that this machine has already, for what is measured.

    with recycled(place, 4 << 30) as fill:
        ...                  # start servers
        fill()               # just before measuring

A virtual machine gives memory that is free back to its host, and the first write to such a page waits for the host:
3.7 ms a MiB instead of 0.3 on the machine where this was found, 12 of 25 CPU seconds of eight nodes that fetch and read
200 MiB each. That says nothing about who writes. Inside, this process and what it starts are in a memory group of
bounded size; `fill` fills the rest of it with pages of an empty file, so that a new page is one of these, dropped.
Where there is no memory controller of cgroup version 1 nothing is done. Who calls: rows with real clusters.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.kit.workspace import Workspace

_MOUNT = Path("/sys/fs/cgroup/memory")
_PART_BYTES = 1 << 20
_END_S = 5.0                         # for what is about to end: the group cannot be removed before


@contextlib.contextmanager
def recycled(place: Workspace, size: int) -> Iterator[Callable[[], None]]:
    """`size`: bytes that all that runs inside may use, page cache included; more than it will, by some 500 MiB."""
    home = _own_group()
    if home is None:
        yield lambda: None
        return
    group = home / f"lazyfs-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(size))
        _enter(group, os.getpid())
        with tempfile.TemporaryFile(dir=place.top) as file:
            file.truncate(size)
            yield lambda: _read(file.fileno(), size)
    finally:
        limit = time.monotonic() + _END_S
        while not _removed(group, home) and time.monotonic() < limit:
            time.sleep(0.05)


def _own_group() -> Path | None:
    """This process's, if one can be made in it."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        home = _MOUNT / path.lstrip("/")
        if controllers == "memory" and os.access(home, os.W_OK):
            return home
    return None


def _enter(group: Path, pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        (group / "cgroup.procs").write_text(str(pid))


def _read(file: int, size: int) -> None:
    room = bytearray(_PART_BYTES)
    for start in range(0, size, _PART_BYTES):
        os.preadv(file, [room], start)


def _removed(group: Path, home: Path) -> bool:
    """What goes on (we, the session's registry) goes back to where it was."""
    for pid in (group / "cgroup.procs").read_text().split():
        _enter(home, int(pid))
    try:
        group.rmdir()
    except OSError:
        return False
    return True
