"""
Which read a line of the log belongs to: one id a FUSE request, from log line to log line, and on to the registry.

Layer: beside logs, light to import. Who calls: fs.server gives a request its id, fetch.transfer takes it along into its
thread, logs shows it, registry.transport sends it as X-Request-Id. State: a context variable. The id is made of the
kernel's own number of the request, which a worker that takes over is told again, and of random bits of this process; it
says nothing about the node, the image or who reads.
"""

from __future__ import annotations

import contextlib
import os
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_RESENT_BIT = 1 << 63            # set by the kernel in what it sends again (fuse.h, FUSE_UNIQUE_RESEND)
_current: ContextVar[str] = ContextVar("lazyfs_request", default="")
_process: list[str] = []         # the random bits, made when they are first wanted: never those of a parent


def of_fuse(unique: int) -> str:
    """The id of the kernel's request `unique`: 1f3a9c02-4711."""
    if not _process:
        _process.append(os.urandom(4).hex())
        os.register_at_fork(after_in_child=_process.clear)
    return f"{_process[0]}-{(unique & ~_RESENT_BIT) >> 1}"   # the lowest bit says something else


def current() -> str:
    """Of the request that is worked on in this task or thread; empty: of none."""
    return _current.get()


def begin(request: str) -> None:
    """From now on this task, or thread, works on that request; empty: on none."""
    _current.set(request)


@contextlib.contextmanager
def during(request: str) -> Iterator[None]:
    """The same, as long as the block runs."""
    token = _current.set(request)
    try:
        yield
    finally:
        _current.reset(token)
