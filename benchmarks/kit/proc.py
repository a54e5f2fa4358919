"""
Run tools: always with a time limit, always ended with everything they started.

Every child gets a session of its own, so that ^C in the terminal reaches only us and we end the children in order.
Daemons also get `setpriv --pdeathsig KILL`: they die with us even when we are killed by SIGKILL. (PDEATHSIG follows
the *thread* that forked, so daemons are started from the main thread.)
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

STOP_GRACE_S = 5.0  # between SIGTERM and SIGKILL
TAIL_LINE_COUNT = 12  # of a failed tool's output, in the message


class ToolError(RuntimeError):
    """A tool failed or took too long; the message says which one, with the end of what it said."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a finished tool left."""

    stdout: str
    stderr: str
    wall_s: float


def _stop_group(process: subprocess.Popen[str] | subprocess.Popen[bytes], grace_s: float = STOP_GRACE_S) -> None:
    """End a process and its session; returns when the process is reaped."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also what the leader left behind in its session
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait(grace_s)


def run(
    argv: Sequence[str | Path],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = None,
    discard: bool = False,
) -> Result:
    """
    Run to the end; output captured (`discard`: what goes to stdout is thrown away).

    Raises:
        ToolError: exit code other than 0, or `timeout_s` passed (the tool's whole session is ended then).

    """
    begin = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in argv],
        stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if discard else subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, **env} if env else None,
        cwd=cwd,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(stdin, timeout_s)
    except BaseException as error:
        _stop_group(process)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        if isinstance(error, subprocess.TimeoutExpired):
            raise ToolError(f"{_shown(argv)}: not finished after {timeout_s:.0f} s") from None
        raise
    stdout, stderr = out or "", err or ""
    if process.returncode != 0:
        tail = "\n".join((stdout + stderr).strip().splitlines()[-TAIL_LINE_COUNT:])
        raise ToolError(f"{_shown(argv)}: exit code {process.returncode}\n{tail}")
    return Result(stdout, stderr, time.perf_counter() - begin)


def attempt(argv: Sequence[str | Path], *, timeout_s: float = 30.0) -> bool:
    """Run where failing is fine (clean-up of what may not be there)."""
    try:
        run(argv, timeout_s=timeout_s)
    except (ToolError, OSError):
        return False
    return True


def _shown(argv: Sequence[str | Path]) -> str:
    text = " ".join(str(word) for word in argv)
    return text if len(text) <= 200 else text[:197] + "..."


class Daemon:
    """A server of ours: started at once, ended at the latest by close() (idempotent) or by our own death."""

    def __init__(self, argv: Sequence[str | Path], *, log: Path, env: Mapping[str, str] | None = None) -> None:
        self.name = str(argv[0])
        self._log = log
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *(str(word) for word in argv)],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env={**os.environ, **env} if env else None,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        """Raises ToolError when the server has ended."""
        code = self._process.poll()
        if code is not None:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-TAIL_LINE_COUNT:])
            raise ToolError(f"{self.name}: ended at once with code {code}\n{tail}")

    def close(self) -> None:
        _stop_group(self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
