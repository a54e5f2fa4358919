"""A whole node: the daemon, the snapshotter, and a containerd of our own that uses it (and overlayfs, to compare)."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING, Self

from benchmarks.kit.containerd import Containerd
from benchmarks.kit.daemon import NodeDaemon, pss_mb
from benchmarks.kit.lazy import COMMAND, environment
from benchmarks.kit.memory import descendants
from benchmarks.kit.proc import Daemon, ToolError, attempt, run

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.kit.workspace import Workspace

_READY_TIMEOUT_S = 30.0
_RUN_TIMEOUT_S = 300.0
SNAPSHOTTER = "lazyfs"


class Node:
    """Everything empty at first. `close()` takes all of it away."""

    def __init__(self, place: Workspace) -> None:
        self._place = place
        top = place.folder("node")
        self.socket = top / "snapshotter.sock"
        self.daemon = NodeDaemon(place)
        words: list[str | Path] = [
            COMMAND, "snapshotter", "--root", top / "root", "--address", self.socket,
            "--containerd-address", place.top / "containerd" / "containerd.sock",
        ]  # fmt: skip
        self._snapshotter = Daemon(words, log=place.top / "snapshotter.log", env=self._environment)
        limit = time.monotonic() + _READY_TIMEOUT_S
        while not self.socket.exists():   # before containerd looks for it: its next look would be a second later
            self._snapshotter.check()
            if time.monotonic() > limit:
                raise ToolError("the snapshotter does not listen")
            time.sleep(0.02)
        self.containerd = Containerd(place, proxy=self.socket)
        place.stack.callback(self.close)
        limit = time.monotonic() + _READY_TIMEOUT_S
        while not attempt(self.containerd.command("snapshots", "--snapshotter", SNAPSHOTTER, "list")):
            self._snapshotter.check()
            if time.monotonic() > limit:
                raise ToolError("the snapshotter does not answer containerd")
            time.sleep(0.05)

    @property
    def _environment(self) -> dict[str, str]:
        return environment(self._place)

    def pull(self, reference: str) -> float:
        """`lazyfs pull`; returns seconds."""
        words: list[str | Path] = [
            COMMAND, "pull", "--insecure", "--quiet", "--containerd-address", self.containerd.socket,
            "--namespace", self.containerd.namespace, reference,
        ]  # fmt: skip
        return run(words, timeout_s=_RUN_TIMEOUT_S, env=self._environment).wall_s

    def memory_mb(self) -> float:
        """Proportional set sizes of all our processes."""
        pid = self._snapshotter.pid
        return self.daemon.memory_mb() + sum(pss_mb(one) for one in [pid, *descendants(pid)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.containerd.close()
        self._snapshotter.close()
        self.daemon.close()


def first_output_s(words: list[str | Path]) -> float:
    """Seconds until a command writes its first byte; then it is waited for. Raises ToolError: it wrote nothing."""
    begin = time.perf_counter()
    process = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.read(1)
    elapsed = time.perf_counter() - begin
    try:
        _, errors = process.communicate(timeout=_RUN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise ToolError(f"{words[0]}: does not end") from None
    if not first or process.returncode != 0:
        said = errors.decode(errors="replace")
        raise ToolError(f"{' '.join(map(str, words))}: exit code {process.returncode}\n{said}")
    return elapsed
