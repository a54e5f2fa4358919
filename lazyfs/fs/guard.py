"""
What a request that cannot be answered with data ends with: an errno, and a line in the log where that helps somebody.

Whatever happens in a handler, its request ends and the mount goes on (faults.md section 2: one exception must not take
every mount with it). Layer: fs. Who calls: fs.server for every exception of a handler; fs.operations raises ErrnoError.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import time

import trio

from lazyfs.errors import BugError, IntegrityError, LazyfsError, SourceError

_log = logging.getLogger("lazyfs.fs")
_incident = itertools.count(1)
# An outage fails thousands of reads with few texts: each text is logged once in a while, with how often it came.
_REPEAT_S = 10.0
_TEXT_COUNT_MAX = 256
_said: dict[str, list[float]] = {}   # text -> [when it was logged, how often since]


class ErrnoError(Exception):
    """An errno that is the answer to a request: nothing went wrong."""

    def __init__(self, errno: int) -> None:
        super().__init__(os.strerror(errno))
        self.errno = errno


def errno_of(error: Exception, what: str) -> int:
    """The errno to answer with. Expected errors are logged in one line, others with a traceback and a number."""
    if isinstance(error, ErrnoError):
        return error.errno
    if isinstance(error, trio.TooSlowError):
        _log_rarely(f"{what}: deadline passed")
        return errno.ETIMEDOUT
    if isinstance(error, LazyfsError) and not isinstance(error, BugError):
        _log_rarely(f"{what}: {error}{f' ({error.hint})' if error.hint else ''}")
        return error.errno
    number = next(_incident)
    if isinstance(error, MemoryError):
        _log.error("incident %d: out of memory in %s", number, what)
        return errno.ENOMEM
    _log.error("incident %d: unexpected %s in %s", number, type(error).__name__, what, exc_info=error)
    return errno.EIO


def kind_of(error: Exception) -> str:
    """What kind of error it is, for counting: the name of its class (`not_found`); "": it is an answer."""
    if isinstance(error, ErrnoError):
        return ""
    if isinstance(error, trio.TooSlowError):
        return "deadline"
    name = type(error).__name__.removesuffix("Error") if isinstance(error, LazyfsError | MemoryError) else "Bug"
    return "".join(f"_{char.lower()}" if char.isupper() else char for char in name).strip("_")


def is_of_source(error: Exception) -> bool:
    """Whether it is where the bytes come from that failed or was late, so that trying again may help."""
    return isinstance(error, SourceError | IntegrityError | trio.TooSlowError)


def _log_rarely(text: str) -> None:
    now = time.monotonic()
    said = _said.get(text)
    if said is not None and now - said[0] < _REPEAT_S:
        said[1] += 1
        return
    if len(_said) >= _TEXT_COUNT_MAX:
        _said.clear()
    _said[text] = [now, 0]
    _log.warning("%s%s", text, f" ({said[1]:.0f} more since)" if said and said[1] else "")
