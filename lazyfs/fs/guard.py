"""
The guard around every FUSE handler: whatever happens, one request ends with an errno, and the mount goes on.

pyfuse3 3.5 catches FUSEError only; any other exception ends its session, and with it every mount (faults.md section
2). Layer: fs. Who calls: fs.operations decorates each of its handlers. Cancellation (trio.Cancelled) passes: it comes
only when the session is being shut down.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import time
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import pyfuse3
import trio

from lazyfs.errors import BugError, LazyfsError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

P = ParamSpec("P")
T = TypeVar("T")
_log = logging.getLogger("lazyfs.fs")
_incident = itertools.count(1)
# An outage fails thousands of reads with few texts: each text is logged once in a while, with how often it came.
_REPEAT_S = 10.0
_TEXT_COUNT_MAX = 256
_said: dict[str, list[float]] = {}   # text -> [when it was logged, how often since]


def guarded(handler: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Make an async handler raise nothing but FUSEError (and cancellation)."""

    @functools.wraps(handler)
    async def guard(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(*args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:  # noqa: BLE001 - this is the place where everything ends
            raise pyfuse3.FUSEError(errno_of(error, handler.__name__)) from None

    return guard


def errno_of(error: Exception, what: str) -> int:
    """The errno to answer with. Expected errors are logged in one line, others with a traceback and a number."""
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
