"""
Row 10: 10,000 members heartbeating at one tracker with Redis: the tracker's share of a core.

`benchmarks.trackerload` is the members. The figure is CPU time of `lazyfs tracker` (all of its threads) by the clock,
after all have joined; it is kept on one core, Redis on the other. Redis' own share is told too.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.figures import Figure, plain
from benchmarks.kit.proc import ToolError

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "tracker: 10,000 members heartbeating, 1 core + Redis: share of the core"
MEMBERS = 10_000
_TARGET = 0.5
_SECONDS = 40.0                  # twice the interval of so many
_START_S = 30.0
_TIMEOUT_S = 400.0
_TICK_HZ = os.sysconf("SC_CLK_TCK")


def measure(session: Session) -> list[Figure]:
    """Figure 10."""
    found: dict[str, list[float]] = {}
    for number in range(session.runs):
        for name, value in once(session.place.folder("tracker"), MEMBERS, _SECONDS).items():
            found.setdefault(name, []).append(value)
        session.say(f"{number + 1}: " + ", ".join(f"{name} {values[-1]:.3g}" for name, values in found.items()))
    return [plain("10", TITLE, _TARGET, "", found.pop("tracker"), **found)]


def once(folder: Path, members: int, seconds: float) -> dict[str, float]:
    """Shares of a core (tracker, redis), beats a second, seconds to an answer; seconds and MB until all had joined."""
    with ExitStack() as stack:
        redis = stack.enter_context(_running(
            ["redis-server", "--port", "0", "--unixsocket", str(folder / "redis.sock"), "--save", "", "--dir",
             str(folder)]))
        _wait_for_socket(folder / "redis.sock")
        tracker = stack.enter_context(_running(
            ["taskset", "-c", "0", sys.executable, "-m", "lazyfs", "tracker", "--address", "127.0.0.1:0", "--redis",
             f"unix://{folder / 'redis.sock'}", "--json"]))
        assert tracker.stdout is not None
        address = json.loads(tracker.stdout.readline())["addresses"][0]
        load = stack.enter_context(_running(
            [sys.executable, "-m", "benchmarks.trackerload", address, str(members), str(seconds)]))
        assert load.stdout is not None
        if load.stdout.readline() != "steady\n":
            raise ToolError("trackerload did not come to rest")
        before = {name: _cpu_s(process.pid) for name, process in (("tracker", tracker), ("redis", redis))}
        began = time.monotonic()
        told = json.loads(load.stdout.readline())
        elapsed_s = time.monotonic() - began
        found = {name: (_cpu_s(process.pid) - before[name]) / elapsed_s
                 for name, process in (("tracker", tracker), ("redis", redis))}
    if told["refused"]:
        raise ToolError(f"{told['refused']} beats were refused: {told['refusal']}")
    return {**found, "beats_per_s": told["beats"] / elapsed_s, "p50_s": told["p50_s"], "p99_s": told["p99_s"],
            "joined_s": told["joined_s"], "joined_mb": told["joined_bytes"] / 1e6}


class _running(ExitStack):  # noqa: N801 - a context manager
    """A process of ours, with its output; it is killed at the end."""

    def __init__(self, words: list[str]) -> None:
        super().__init__()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LAZYFS_")}
        self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                                         env=environment)

    def __enter__(self) -> subprocess.Popen[str]:  # type: ignore[override]
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate(timeout=_TIMEOUT_S)


def _wait_for_socket(path: Path) -> None:
    limit = time.monotonic() + _START_S
    while True:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
            return
        if time.monotonic() > limit:
            raise ToolError("redis-server does not answer")
        time.sleep(0.05)


def _cpu_s(pid: int) -> float:
    """User and system time of a process, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK_HZ
