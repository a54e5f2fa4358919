"""
Runs the checks, one after the other, each with a deadline.

Layer: doctor. A check that hangs (a dead NFS server, a containerd that does not answer) is left behind in its thread.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

from lazyfs.doctor import containerd, kernel, node, registry
from lazyfs.doctor.results import Result, Subject, failed
from lazyfs.errors import LazyfsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

CHECK_S = 30.0                   # the longest, credentials, has deadlines of its own below this

_CHECKS: tuple[Callable[[Subject], Iterable[Result]], ...] = (
    kernel.check_kernel, kernel.check_fuse, kernel.check_file_systems, kernel.check_namespaces,
    node.check_daemon, node.check_log, node.check_sockets, node.check_cache, node.check_snapshotter_root,
    containerd.check_snapshotter, containerd.check_containerd, containerd.check_configuration,
    registry.check_registry, registry.check_image,
)


def examine(subject: Subject, checks: tuple[Callable[[Subject], Iterable[Result]], ...] = _CHECKS,
            check_s: float = CHECK_S) -> Iterator[Result]:
    """Results as they come. Ends at the latest after `check_s` for each check."""
    for check in checks:
        yield from _within(check, subject, check_s)


def _within(check: Callable[[Subject], Iterable[Result]], subject: Subject, check_s: float) -> list[Result]:
    name = check.__name__.removeprefix("check_").replace("_", " ")
    answer: queue.SimpleQueue[list[Result]] = queue.SimpleQueue()
    threading.Thread(target=lambda: answer.put(_results(check, subject, name)), daemon=True).start()
    try:
        return answer.get(timeout=check_s)
    except queue.Empty:
        hint = "something it looks at hangs: see dmesg, mounts, disks"
        return [failed(name, f"no answer within {check_s:g} s", hint)]


def _results(check: Callable[[Subject], Iterable[Result]], subject: Subject, name: str) -> list[Result]:
    try:
        return list(check(subject))
    except LazyfsError as error:
        return [failed(name, str(error), error.hint or "read the message")]
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return [failed(name, f"{where}{error.strerror or error}", "look at that file; is this root?")]
    except Exception as error:  # noqa: BLE001 - the other checks still say something
        return [failed(name, f"unexpected {type(error).__name__}: {error}", "please report this")]
