"""
A program that hands out credentials: one question on its stdin, one bounded answer on its stdout, in time, no orphans.

Layer: registry. Who calls: credentials.py (docker-credential-*), kubelet.py (credential-provider plugins).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from typing import IO, TYPE_CHECKING

from lazyfs.errors import AuthError
from lazyfs.limits import KIB

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ANSWER_BYTES_MAX = 64 * KIB   # the largest tokens (of clouds) are a few KiB
DEADLINE_S = 20.0             # a helper may ask a cloud's token service


def ask_program(
    words: Sequence[str], question: bytes, *, name: str, hint: str, environment: Mapping[str, str] | None = None,
) -> tuple[int, bytes]:
    """
    Exit code and output of a program, given `question` (at most a pipe's buffer, 64 KiB).

    Args:
        words: the program and its arguments.
        question: for its stdin.
        name: what messages call it.
        hint: what to do if it cannot be started.
        environment: None: ours.

    Raises:
        AuthError: it cannot be started, does not end, or says too much.

    """
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True, env=environment,
        )
    except OSError as error:
        raise AuthError(f"{name}: cannot be started: {error.strerror}", hint=hint) from error
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(question)
                process.stdin.close()
            output = _read_bounded(process.stdout, name, time.monotonic() + DEADLINE_S)
            return process.wait(DEADLINE_S), output
        except subprocess.TimeoutExpired:
            raise AuthError(f"{name}: did not end") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _read_bounded(stream: IO[bytes], name: str, deadline: float) -> bytes:
    """Everything up to end of file, at most ANSWER_BYTES_MAX, before the deadline."""
    pieces: list[bytes] = []
    size = 0
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if not selector.select(max(deadline - time.monotonic(), 0)):
                raise AuthError(f"{name}: no answer within {DEADLINE_S:.0f} s")
            piece = os.read(stream.fileno(), ANSWER_BYTES_MAX)
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)
            size += len(piece)
            if size > ANSWER_BYTES_MAX:
                raise AuthError(f"{name}: more than {ANSWER_BYTES_MAX} bytes of answer")
