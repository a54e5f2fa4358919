"""`lazyfs daemon` in the workspace: started, asked, killed; and what all its processes take of memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.kit.lazy import COMMAND, environment
from benchmarks.kit.memory import descendants
from benchmarks.kit.proc import Daemon, ToolError, attempt, run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benchmarks.kit.workspace import Workspace

_READY_TIMEOUT_S = 60.0
_TOOL_TIMEOUT_S = 60.0
_POLL_S = 0.005
_END_TIMEOUT_S = 10.0


class NodeDaemon:
    """A running daemon with a cache directory of its own, empty unless `cache` names one used before."""

    def __init__(self, place: Workspace, cache: Path | None = None, env: Mapping[str, str] | None = None,
                 inside: Sequence[str] = (), *, ready: bool = True) -> None:
        """
        Start it.

        `env`: added to its environment. `inside`: words before its command, of another network. `ready`: when it
        serves; else `wait_ready` says when, so that several start at once.
        """
        self._place = place
        self._inside = inside
        self._env = {**environment(place), **(env or {})}
        self.cache = cache or place.folder("node-cache")
        self._run = place.top / "run"
        self._run.mkdir(exist_ok=True)
        self._closed = True
        self._launch()
        place.stack.callback(self.close)
        if ready:
            self.wait_ready()

    def start(self) -> float:
        """Start the keeper (again); returns the seconds until it serves."""
        begin = time.perf_counter()
        self._launch()
        self.wait_ready()
        return time.perf_counter() - begin

    def _launch(self) -> None:
        words: list[str | Path] = [*self._inside, COMMAND, "daemon", "--cache-dir", self.cache]
        self._daemon = Daemon(words, log=self._place.top / "node.log", env=self._env)
        self._closed = False

    def wait_ready(self) -> None:
        """Until it serves. Raises ToolError."""
        self._wait(lambda: self._ready(self._daemon.pid))

    def mount(self, image: str, target: Path, *options: str) -> None:
        """Mount an image by the daemon. Raises ToolError."""
        target.mkdir(parents=True, exist_ok=True)
        words: list[str | Path] = [COMMAND, "mount", "--insecure", *options, image, target]
        run(words, timeout_s=_TOOL_TIMEOUT_S, env=environment(self._place))

    def ask_mount(self, image: str, target: Path, full_copy: str = "") -> None:
        """
        Mount by asking the worker, as the snapshotter does: without a process of its own.

        The registry must be known to the node's configuration (kit.lazy.trust) since before the daemon was started.
        """
        from lazyfs.node.order import MountOrder  # noqa: PLC0415 - only some rows ask
        from lazyfs.node.protocol import MOUNT, ControlClient  # noqa: PLC0415

        target.mkdir(parents=True, exist_ok=True)
        order = MountOrder(image, str(target), by_node=True, full_copy=full_copy).to_json()
        with ControlClient.connect(self._run / "daemon" / "control.sock") as client:
            client.request(MOUNT, _TOOL_TIMEOUT_S, order=order, attached=False)

    def kill_worker(self) -> None:
        """SIGKILL it; returns when another one serves."""
        worker = self.worker
        os.kill(worker, signal.SIGKILL)
        self._wait(lambda: self._ready(self._daemon.pid) and self.worker != worker)

    def kill_keeper(self) -> None:
        """SIGKILL the keeper; its worker goes on."""
        os.kill(self._daemon.pid, signal.SIGKILL)
        self._daemon.close()

    def upgrade(self) -> None:
        """Hand over to a new worker, as after an upgrade; returns when it serves."""
        run([COMMAND, "daemon", "upgrade"], timeout_s=_TOOL_TIMEOUT_S, env=environment(self._place))

    def timed(self, action: Callable[[], None]) -> float:
        """Its seconds."""
        begin = time.perf_counter()
        action()
        return time.perf_counter() - begin

    @property
    def keeper(self) -> int:
        """The keeper's pid."""
        return self._daemon.pid

    @property
    def worker(self) -> int:
        """The worker's pid."""
        return int(json.loads((self._run / "daemon" / "worker.json").read_bytes())["pid"])

    def statistics(self) -> dict[str, Any]:
        """The worker's counters."""
        from lazyfs.node.protocol import STATS, ControlClient  # noqa: PLC0415 - only some rows ask

        with ControlClient.connect(self._run / "daemon" / "control.sock") as client:
            answer: dict[str, Any] = client.request(STATS, 10.0)
            return answer

    def status(self) -> dict[str, Any]:
        """All that the worker says of itself."""
        from lazyfs.node.protocol import STATUS, ControlClient  # noqa: PLC0415 - only some rows ask

        with ControlClient.connect(self._run / "daemon" / "control.sock") as client:
            answer: dict[str, Any] = client.request(STATUS, 10.0)
            return answer

    def copies(self) -> list[dict[str, Any]]:
        """Of each mounted image: how much of it is there (node.copying)."""
        from lazyfs.node.protocol import COPIES, ControlClient  # noqa: PLC0415 - only some rows ask

        with ControlClient.connect(self._run / "daemon" / "control.sock") as client:
            answer: list[dict[str, Any]] = client.request(COPIES, 10.0)["copies"]
            return answer

    def cpu_s(self) -> float:
        """CPU seconds that keeper, worker and mounter have used, those that ended included."""
        return sum(cpu_s(pid) for pid in [self._daemon.pid, *descendants(self._daemon.pid)])

    def memory_mb(self) -> float:
        """The sum of the proportional set sizes of keeper, worker and mounter."""
        return sum(pss_mb(pid) for pid in [self._daemon.pid, *descendants(self._daemon.pid)])

    def _ready(self, keeper: int) -> bool:
        found = ask_keeper(self._run / "daemon" / "keeper.sock")
        return found is not None and found["keeper"] == keeper and found["ready"]

    def _wait(self, condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + _READY_TIMEOUT_S
        while not condition():
            self._daemon.check()
            if time.monotonic() > limit:
                raise ToolError("lazyfs daemon is not ready")
            time.sleep(_POLL_S)

    def kill(self) -> None:
        """SIGKILL all of its processes; its mounts stay behind, dead. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for pid in [self._daemon.pid, *descendants(self._daemon.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._daemon.close()

    def close(self) -> None:
        """Unmount everything and end it, its worker too; idempotent."""
        if self._closed:
            return
        self._closed = True
        members = [self._daemon.pid, *descendants(self._daemon.pid)]
        settings = [f"{key}={value}" for key, value in environment(self._place).items()]
        attempt(["env", *settings, str(COMMAND), "umount", "--all", "--lazy"])   # the snapshotter's too
        attempt(["env", *settings, str(COMMAND), "daemon", "stop"])
        self._daemon.close()
        limit = time.monotonic() + _END_TIMEOUT_S
        while any(map(_lives, members)) and time.monotonic() < limit:
            time.sleep(_POLL_S)
        for pid in filter(_lives, members):    # its mounts are in use: the next daemon would take it over
            os.kill(pid, signal.SIGKILL)


def ask_keeper(path: Path) -> dict[str, Any] | None:
    """What the keeper says of itself; None: nobody answers."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        try:
            client.connect(str(path))
            client.sendall(b'{"op":"status"}')
            with client.makefile("rb") as stream:
                found: dict[str, Any] = json.loads(stream.readline() or b"null")["result"]
                return found
        except (OSError, ValueError, LookupError, TypeError):
            return None


def _lives(pid: int) -> bool:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and of its children that it has waited for (proc(5): stat)."""
    try:
        fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def pss_mb(pid: int) -> float:
    """The proportional set size of a process: what it shares counts by its part."""
    try:
        for line in Path("/proc", str(pid), "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return 0.0
