"""One container, run by runc on overlayfs: any directory as its lower layer, a fresh upper layer each time."""

from __future__ import annotations

import json
import shutil
import time
from typing import TYPE_CHECKING

from benchmarks.kit.proc import attempt, run

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.kit.workspace import Workspace

RUN_TIMEOUT_S = 300.0
_TIMEOUT_S = 30.0
_UMOUNT_TIMEOUT_S = 20.0
_POLL_S = 0.05
_CAPABILITIES = [  # as containerd gives them: services change owners and users
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
    "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
]  # fmt: skip
_ENV = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"]


class Container:
    """A bundle made ahead, so that `run` does only what containerd's `run` also does: mount the overlay, call runc."""

    def __init__(self, place: Workspace, lower: Path | str) -> None:
        """`lower`: as overlayfs wants it, several with colons between, the highest first."""
        self._top = place.folder("container")
        self._lower = lower
        self._name = f"{place.net_name}c"  # also the name of its cgroups, so that leftovers are found
        for name in ("upper", "work", "rootfs"):
            (self._top / name).mkdir()
        run(["runc", "spec"], timeout_s=_TIMEOUT_S, cwd=self._top)
        place.stack.callback(self.close)

    def run(self, command: list[str]) -> str:
        """Returns what the program printed. Raises ToolError."""
        return run(self.words(command), timeout_s=RUN_TIMEOUT_S).stdout

    def words(self, command: list[str], netns: str | None = None) -> list[str]:
        """Mount the overlay; returns the words that run the program. `netns`: the named network that it shares."""
        config = self._top / "config.json"
        spec = json.loads(config.read_text())
        spec["process"].update(terminal=False, args=command, env=_ENV)
        spec["process"]["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES)
        spec["root"].update(path=str(self._top / "rootfs"), readonly=False)
        if netns is not None:
            network = next(one for one in spec["linux"]["namespaces"] if one["type"] == "network")
            network["path"] = f"/run/netns/{netns}"
        config.write_text(json.dumps(spec))
        top = self._top
        options = f"lowerdir={self._lower},upperdir={top / 'upper'},workdir={top / 'work'}"
        run(["mount", "-t", "overlay", "overlay", "-o", options, top / "rootfs"], timeout_s=_TIMEOUT_S)
        return [*self._runc(), "run", "--bundle", str(top), self._name]

    def kill_words(self) -> list[str]:
        """The words that end the program."""
        return [*self._runc(), "kill", self._name, "KILL"]

    def _runc(self) -> list[str]:
        return ["runc", "--root", str(self._top / "runc")]

    def close(self) -> None:
        """Idempotent."""
        if not self._top.exists():
            return
        if (self._top / "runc" / self._name).exists():
            attempt([*self._runc(), "delete", "--force", self._name])
        limit = time.monotonic() + _UMOUNT_TIMEOUT_S
        while (self._top / "rootfs").is_mount() and time.monotonic() < limit:
            if not attempt(["umount", self._top / "rootfs"]):    # its last process is still being taken apart
                time.sleep(_POLL_S)
        if not (self._top / "rootfs").is_mount():
            shutil.rmtree(self._top)
