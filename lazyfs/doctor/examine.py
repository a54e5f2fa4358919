"""
Runs the checks, all at once: what waits for something dead must not add up. Their results come in their order.

Layer: doctor. A check that hangs (a dead NFS server) is left behind in its thread, when the deadline of all has passed.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING

from lazyfs.doctor import containerd, kernel, mirror, node, peers, registry
from lazyfs.doctor.results import Result, Subject, failed
from lazyfs.errors import LazyfsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

CHECK_S = 30.0                   # of all; each waits at most 10 s for one thing, but an image is asked for by several

_CHECKS: tuple[Callable[[Subject], Iterable[Result]], ...] = (
    kernel.check_kernel, kernel.check_fuse, kernel.check_file_systems, kernel.check_namespaces,
    node.check_daemon, node.check_log, node.check_sockets, node.check_cache, node.check_snapshotter_root,
    containerd.check_snapshotter, containerd.check_containerd, containerd.check_configuration,
    registry.check_registry, registry.check_image,
    peers.check_trackers, peers.check_peers, mirror.check_mirror,
)


def examine(subject: Subject, checks: tuple[Callable[[Subject], Iterable[Result]], ...] = _CHECKS,
            check_s: float = CHECK_S) -> Iterator[Result]:
    """Results in the order of the checks. Ends at the latest after `check_s`."""
    deadline = time.monotonic() + check_s
    running = [_begin(check, subject) for check in checks]
    for check, answer in zip(checks, running, strict=True):
        try:
            yield from answer.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            hint = "something it looks at hangs: see dmesg, mounts, disks"
            yield failed(_name(check), f"no answer within {check_s:g} s", hint)


def _begin(check: Callable[[Subject], Iterable[Result]], subject: Subject) -> queue.SimpleQueue[list[Result]]:
    answer: queue.SimpleQueue[list[Result]] = queue.SimpleQueue()
    threading.Thread(target=lambda: answer.put(_results(check, subject)), daemon=True).start()
    return answer


def _name(check: Callable[[Subject], Iterable[Result]]) -> str:
    return check.__name__.removeprefix("check_").replace("_", " ")


def _results(check: Callable[[Subject], Iterable[Result]], subject: Subject) -> list[Result]:
    name = _name(check)
    try:
        return list(check(subject))
    except LazyfsError as error:
        return [failed(name, str(error), error.hint or "read the message")]
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return [failed(name, f"{where}{error.strerror or error}", "look at that file; is this root?")]
    except Exception as error:  # noqa: BLE001 - the other checks still say something
        return [failed(name, f"unexpected {type(error).__name__}: {error}", "please report this")]
