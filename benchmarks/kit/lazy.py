"""
lazyfs, driven as a user drives it: the `lazyfs` command of this checkout's environment.

Its caches, sockets and journals are in the workspace, so that a run neither sees nor leaves anything elsewhere.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.kit.proc import Result, attempt, run

if TYPE_CHECKING:
    from benchmarks.kit.workspace import Workspace

COMMAND = Path(sys.executable).with_name("lazyfs")
CONVERT_TIMEOUT_S = 1200.0
MOUNT_TIMEOUT_S = 60.0


def trust(place: Workspace, host: str) -> None:
    """Let the node's daemon speak plain HTTP to a registry: by its configuration file."""
    file = place.top / "lazyfs.toml"
    section = f'[registry.host."{host}"]\ninsecure = true\n'
    known = file.read_text() if file.exists() else ""
    if section not in known:
        file.write_text(known + section)


def environment(place: Workspace) -> dict[str, str]:
    """Everything lazyfs would otherwise keep in the user's or the system's places."""
    (place.top / "lazyfs.toml").touch()
    return {
        "LAZYFS_CONFIG": str(place.top / "lazyfs.toml"),
        "LAZYFS_RUN_DIR": str(place.top / "run"),
        "XDG_CACHE_HOME": str(place.top / "xdg"),
        "DOCKER_CONFIG": str(place.top / "docker"),
        "LAZYFS_CACHE_FULL_COPY": "off",    # rows measure what they are about; those of the full copy order it
    }


def convert(place: Workspace, source: str, target: str, *options: str | Path) -> Result:
    """Run `lazyfs convert`. Raises ToolError."""
    words = [COMMAND, "convert", "--insecure", *options, source, target]
    return run(words, timeout_s=CONVERT_TIMEOUT_S, env=environment(place))


class LazyMount:
    """A lazy image to mount, with a cache of its own: empty unless `cache` names one used before."""

    def __init__(self, place: Workspace, image: str, *options: str, cache: Path | None = None) -> None:
        self._place, self._image, self._options = place, image, options
        self._mounted = False
        self.path = place.folder("lazy")
        self.cache = cache or place.folder("cache")
        place.stack.callback(self.close)

    def mount(self) -> float:
        """Mount; returns the command's seconds (it returns when the tree is readable). Raises ToolError."""
        self._mounted = True
        words: list[str | Path] = [
            COMMAND,
            "mount",
            "--insecure",
            "--cache-dir",
            self.cache,
            *self._options,
            self._image,
            self.path,
        ]
        return run(words, timeout_s=MOUNT_TIMEOUT_S, env=environment(self._place)).wall_s

    def statistics(self) -> dict[str, Any]:
        """The worker's counters."""
        return self._ask("stats")

    def worker_pid(self) -> int:
        pid: int = self._worker_dir().worker().pid
        return pid

    def _worker_dir(self) -> Any:
        from lazyfs.node.rundir import WorkerDir  # noqa: PLC0415 - reads LAZYFS_RUN_DIR when it is asked

        name = WorkerDir.of_cache(str(self.cache.resolve())).root.name
        return WorkerDir(self._place.top / "run" / name)

    def _ask(self, operation: str, **arguments: str) -> dict[str, Any]:
        from lazyfs.node.protocol import ControlClient  # noqa: PLC0415

        with ControlClient.connect(self._worker_dir().socket) as client:
            answer: dict[str, Any] = client.request(operation, 10.0, **arguments)
            return answer

    def close(self) -> None:
        """Unmount; idempotent. What will not go is left to the workspace's clean-up."""
        if self._mounted:
            self._mounted = False
            words = [str(COMMAND), "umount", "--lazy", str(self.path)]
            attempt(["env", *(f"{key}={value}" for key, value in environment(self._place).items()), *words])
