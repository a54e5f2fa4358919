"""
Run a system call that may hang in a child process, with a deadline.

Layer: fs. Who calls: fs.mounter, node.unmount. Mounting and unmounting walk paths on our own FUSE mount. Done by a
thread of the worker, a SIGKILL in that moment would leave the thread waiting for an answer that its own process
owes, while it keeps /dev/fuse open: a hang that only an abort through fusectl ends (faults.md section 2). A child
without that descriptor gets ENOTCONN instead. The caller must have one thread only (fork), or a child that hangs
would be the least of its problems; the worker therefore asks its mounter process (fs.mounter).
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from typing import TYPE_CHECKING, Any

import lazyfs.errors
from lazyfs.errors import BugError, DeadlineError, LazyfsError

if TYPE_CHECKING:
    from collections.abc import Callable

_REPLY_BYTES_MAX = 1 << 20


def call_isolated(function: Callable[..., Any], *arguments: Any, timeout_s: float) -> Any:
    """
    Return `function(*arguments)`, computed in a forked child. Arguments may be anything, the result must be JSON.

    Raises:
        LazyfsError: what the function raised (same class, message and hint).
        DeadlineError: no result after `timeout_s`; the child has been killed, or ends when the kernel lets it.
        BugError: it raised something else, or died.

    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(function, arguments, writer)
    os.close(writer)
    try:
        data = _read_until(reader, time.monotonic() + timeout_s)
    finally:
        os.close(reader)
        _reap(child)
    if data is None:
        raise DeadlineError(f"{function.__name__}: the kernel did not answer within {timeout_s:g} s")
    if not data:
        raise BugError(f"{function.__name__}: the helper process died")
    reply = json.loads(data)
    if "error" in reply:
        raise error_from(reply["error"])
    return reply["result"]


def error_to(error: BaseException) -> dict[str, str]:
    """An error as JSON for another process. Others than LazyfsError become BugError."""
    if isinstance(error, LazyfsError):
        return {"kind": type(error).__name__, "message": str(error), "hint": error.hint}
    return {"kind": "BugError", "message": f"{type(error).__name__}: {error}", "hint": ""}


def error_from(data: dict[str, str]) -> LazyfsError:
    """The error that error_to() wrote; an unknown class becomes BugError."""
    kind = getattr(lazyfs.errors, data.get("kind", ""), BugError)
    if not (isinstance(kind, type) and issubclass(kind, LazyfsError)):
        kind = BugError
    return kind(data.get("message", "?"), hint=data.get("hint", ""))


def _child(function: Callable[..., Any], arguments: tuple[Any, ...], writer: int) -> None:
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        try:
            reply = {"result": function(*arguments)}
        except Exception as error:  # noqa: BLE001 - handed to the parent whole
            reply = {"error": error_to(error)}
        data = json.dumps(reply).encode()
        while data:
            data = data[os.write(writer, data) :]
        code = 0
    finally:
        os._exit(code)   # nothing of the parent's (buffers, atexit, finally) may run twice


def _read_until(reader: int, deadline: float) -> bytes | None:
    """All bytes up to the end of file, or None at the deadline."""
    parts: list[bytes] = []
    size = 0
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    while size <= _REPLY_BYTES_MAX:
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            return None
        part = os.read(reader, 65536)
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
    raise BugError("a helper process answered too much")


def _reap(child: int) -> None:
    """Collect the child. One that hangs in the kernel is killed and left: waiting for it would hang too."""
    for _ in range(50):
        if os.waitpid(child, os.WNOHANG)[0]:
            return
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    for _ in range(200):
        if os.waitpid(child, os.WNOHANG)[0]:
            return
        time.sleep(0.001)
