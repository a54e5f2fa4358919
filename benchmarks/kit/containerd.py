"""
The baseline: Debian's containerd, our own instance of it, pulling the whole image and running it with runc.

Its root, state and socket are in the workspace; CRI and the snapshotters that this machine has no use for are off.
"""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING

from benchmarks.kit.proc import Daemon, ToolError, attempt, run

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.kit.workspace import Workspace

_START_TIMEOUT_S = 30.0
PULL_TIMEOUT_S = 300.0
RUN_TIMEOUT_S = 300.0
_CONFIG = """
version = 2
root = "{top}/root"
state = "{top}/state"
disabled_plugins = [
    "io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper",
]
[grpc]
  address = "{top}/containerd.sock"
[ttrpc]
  address = "{top}/containerd.ttrpc.sock"
"""
_PROXY = """
[proxy_plugins.lazyfs]
  type = "snapshot"
  address = "{socket}"
"""


class Containerd:
    """A running containerd with an empty store. `close()` ends it; the store goes with the workspace."""

    def __init__(self, place: Workspace, *, proxy: Path | None = None) -> None:
        """`proxy`: the socket of our snapshotter."""
        self._top = place.folder("containerd")
        config = self._top / "config.toml"
        config.write_text(_CONFIG.format(top=self._top) + (_PROXY.format(socket=proxy) if proxy else ""))
        self.socket = self._top / "containerd.sock"
        self._daemon = Daemon(["containerd", "--config", config], log=self._top / "log")
        self._count = 0
        self.namespace = place.net_name  # also names the cgroups, so that leftovers are found
        place.stack.callback(self.close)
        limit = time.monotonic() + _START_TIMEOUT_S
        while not (self.socket.exists() and attempt(self.command("version"))):
            self._daemon.check()
            if time.monotonic() > limit:
                raise ToolError("containerd does not answer")
            time.sleep(0.1)

    def command(self, *words: str) -> list[str | Path]:
        """The words of a `ctr` that speaks to it."""
        return ["ctr", "--address", self.socket, "--namespace", self.namespace, *words]

    def pull(self, reference: str) -> float:
        """Fetch and unpack; returns seconds."""
        bare = reference.removeprefix("docker://")
        words = self.command("images", "pull", "--plain-http", "--snapshotter", "overlayfs", bare)
        return run(words, timeout_s=PULL_TIMEOUT_S).wall_s

    def run(self, reference: str, command: list[str], snapshotter: str = "overlayfs") -> float:
        """Run a command in a fresh container of a pulled image; returns seconds to the program's end."""
        return run(self.run_words(reference, command, snapshotter), timeout_s=RUN_TIMEOUT_S).wall_s

    def run_words(
        self, reference: str, command: list[str], snapshotter: str, netns: str | None = None
    ) -> list[str | Path]:
        """The words of the `ctr run` for a fresh container. `netns`: the named network that it shares."""
        self._count += 1
        bare = reference.removeprefix("docker://")
        shared = ["--with-ns", f"network:/run/netns/{netns}"] if netns else []
        options = ["--rm", "--snapshotter", snapshotter, *shared]
        return self.command("run", *options, bare, f"run-{self._count}", *command)

    def kill_words(self) -> list[str | Path]:
        """The words that end the container of the last `run_words`."""
        return self.command("task", "kill", "--signal", "SIGKILL", f"run-{self._count}")

    def view(self, reference: str, target: Path) -> None:
        """Mount a pulled image's tree read-only at `target` (overlayfs over its layers, on this disk's file system)."""
        target.mkdir(parents=True, exist_ok=True)
        bare = reference.removeprefix("docker://")
        run(self.command("images", "mount", "--snapshotter", "overlayfs", bare, str(target)), timeout_s=60)

    def close(self) -> None:
        """End it and forget what it had pulled, so that the next one pulls everything again."""
        self._daemon.close()
        shutil.rmtree(self._top / "root", ignore_errors=True)
