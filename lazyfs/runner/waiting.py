"""
When following a running container is over: its processes have ended, or one of them listens.

Layer: runner. Who calls: cli.profile_record, now and then. Looks into /proc only; a process is told by its start time,
never by its number alone.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lazyfs.node.recorder import container_of
from lazyfs.node.rundir import ProcessIdentity
from lazyfs.runner.following import is_container

if TYPE_CHECKING:
    from collections.abc import Iterator

_LISTEN = "0A"                   # of a line of proc(5) net/tcp: TCP_LISTEN


class Processes:
    """Those of the containers that a name means. State: one that is known to live, so that /proc is rarely searched."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._known: ProcessIdentity | None = None

    def one(self) -> int | None:
        """The pid of one that lives; None: there is none."""
        if self._known is None or not self._known.alive:
            self._known = next(self._search(), None)
        return None if self._known is None else self._known.pid

    def _search(self) -> Iterator[ProcessIdentity]:
        for entry in os.scandir("/proc"):
            if entry.name.isdigit() and is_container(container_of(int(entry.name)), self._name):
                found = ProcessIdentity.of(int(entry.name))
                if found is not None:
                    yield found


def listens(pid: int | None, port: int) -> bool:
    """Whether somebody listens on a TCP port in the network of a process (None: our own)."""
    place = Path("/proc") / ("self" if pid is None else str(pid)) / "net"
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (place / name).read_text(encoding="ascii", errors="replace").splitlines()[1:]:
                words = line.split()
                if len(words) > 3 and words[3] == _LISTEN and words[1].endswith(f":{port:04X}"):
                    return True
    return False
