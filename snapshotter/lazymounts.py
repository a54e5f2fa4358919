"""
Mount points without the daemon's help: what is mounted, and taking it away.

Layer: snapshotter. Who calls: lazy, lazyreconcile. Nothing here looks at a mounted file system. A detach may wait in
the kernel for reads under way, so it is done by a thread that nobody waits for longer than its deadline: not by a
forked child, because a process with gRPC's threads must not fork.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from lazyfs.errors import DeadlineError, LazyfsError, TargetError
from lazyfs.fs import mountapi

if TYPE_CHECKING:
    from pathlib import Path

DETACH_TIMEOUT_S = 10.0


def is_mounted(target: Path) -> bool:
    """Whether something is mounted on exactly `target` (absolute, resolved), alive or dead."""
    return mountapi.mount_at(str(target)) is not None


def mount_id(target: Path) -> int:
    """Which mount is on it (proc(5) mountinfo), alive or dead; 0: none."""
    entry = mountapi.mount_at(str(target))
    return entry.mount_id if entry is not None else 0


def detach(target: Path) -> None:
    """
    Take all that is mounted on `target` away; who still uses it goes on with it.

    Raises:
        LazyfsError: the kernel refuses, or did not answer.

    """
    problems: list[LazyfsError] = []

    def work() -> None:
        try:
            while is_mounted(target):
                mountapi.unmount(str(target), mountapi.MNT_DETACH)
        except TargetError:
            pass   # somebody else was faster
        except LazyfsError as error:
            problems.append(error)

    thread = threading.Thread(target=work, name="detach", daemon=True)
    thread.start()
    thread.join(DETACH_TIMEOUT_S)
    if thread.is_alive():
        raise DeadlineError(f"detaching {target}: the kernel did not answer within {DETACH_TIMEOUT_S:g} s")
    if problems:
        raise problems[0]
