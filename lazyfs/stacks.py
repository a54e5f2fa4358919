"""
Where a process is: a line a thread, to look into one that goes on working, or hangs. On SIGUSR1.

Light to import (the keeper uses it). Layer: beside logs. Who calls: install() from each of the node's processes,
node.dumping for the worker's tasks. Nothing stops, nothing is changed; a dump is bounded in lines and their length.
The signals' default would be death, so ignore() is for the time before there is anything to tell.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType

SIGNAL = signal.SIGUSR1
HARD_SIGNAL = signal.SIGUSR2     # likewise, but raw, and also if the interpreter itself does not get on
THREAD_COUNT_MAX = 100
_FRAME_COUNT_MAX = 24            # innermost; a handler that waits for a chunk is 8 deep
_OWN = os.path.dirname(os.path.dirname(__file__)) + "/"   # noqa: PTH120 - light


def ignore() -> None:
    """From now on the signals do nothing; what is started inherits that."""
    for number in (SIGNAL, HARD_SIGNAL):
        signal.signal(number, signal.SIG_IGN)


def enable_hard() -> None:
    """On HARD_SIGNAL, and on SIGSEGV and the like, where each thread is goes to standard error as it is, at once."""
    import faulthandler  # noqa: PLC0415 - not for the keeper

    faulthandler.enable()
    faulthandler.register(HARD_SIGNAL)


def install(tell: Callable[[Iterable[str]], None]) -> None:
    """
    From now on the signal has tell() called with the lines, in the main thread, between any two of its steps.

    So tell() must not take a lock that the main thread may hold, and not write to a stream of Python's.
    """
    def handle(_number: int, frame: FrameType | None) -> None:
        tell(list(threads(frame)))

    signal.signal(SIGNAL, handle)


def tell_stderr(lines: Iterable[str]) -> None:
    """For install(), of a process whose log is standard error: one write(2), past all buffers."""
    with contextlib.suppress(OSError):   # nobody reads it
        os.write(2, "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))


def threads(main: FrameType | None = None) -> Iterator[str]:
    """A line a thread. `main`: where the main thread was when the signal came."""
    names = {}
    if "threading" in sys.modules:
        names = {one.ident: one.name for one in sys.modules["threading"].enumerate()}
    frames = sys._current_frames()  # noqa: SLF001 - documented, for debuggers
    own = _ident()
    for count, (ident, frame) in enumerate(frames.items()):
        if count == THREAD_COUNT_MAX:
            yield f"and {len(frames) - count} threads more"
            return
        yield f"thread {names.get(ident, ident)}: {where(main if main is not None and ident == own else frame)}"


def where(frame: FrameType | None) -> str:
    """The stack below a frame: innermost first, on one line."""
    found: list[str] = []
    while frame is not None and len(found) < _FRAME_COUNT_MAX:
        found.append(place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return " < ".join(found) + (" < ..." if frame is not None else "")


def place(file: str, line: int, function: str) -> str:
    """`lazyfs/fs/server.py:98 serve`; of others' packages: from site-packages on."""
    for start in (_OWN, "/site-packages/", "/lib/"):
        _, found, rest = file.partition(start)
        if found:
            file = rest
            break
    return f"{file}:{line} {function}"


def _ident() -> int:
    import _thread  # noqa: PLC0415 - built in; threading itself is not wanted here

    return _thread.get_ident()
