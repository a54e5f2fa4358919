"""
systemd's units: what they say, and why. packaging/systemd holds the same text for packagers (a test keeps them alike).

Layer: snapshotter.install. Written files begin with MARK: only such files are replaced or removed.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from lazyfs.config.atomic import write_atomically
from lazyfs.errors import TargetError

MARK = "# Written by `lazyfs snapshotter install`; changes belong into a drop-in: systemctl edit"
SYSTEMD_DIR = "/etc/systemd/system"
PROGRAM = "/usr/bin/lazyfs"

_COMMON = """\
# Its children serve running containers: they outlive it, and the next one goes on with them.
KillMode=process
# cgroups of our processes are ours: systemd must not move or remove them.
Delegate=yes
Type=notify
NotifyAccess=main
Restart=always
RestartSec=1s
# Wrong options or a wrong configuration do not become right by trying again.
RestartPreventExitStatus=2 3
TimeoutStartSec=120s
TimeoutStopSec=30s
LimitNOFILE=1048576
LimitNPROC=infinity
TasksMax=infinity
# Killed last: every container that reads from a lazy image waits for us.
OOMScoreAdjust=-999
# No sandbox: mounts made here must be seen by containerd and by containers.
PrivateMounts=no
PrivateTmp=no
ProtectSystem=no
"""

_DAEMON = """\
[Unit]
Description=lazyfs daemon: serves lazy container images
# Mounts are there before containers, and until after the last of them. No network: starting needs none.
After=local-fs.target
Before=containerd.service docker.service kubelet.service lazyfs-snapshotter.service
StartLimitIntervalSec=0

[Service]
ExecStartPre=-/sbin/modprobe -a fuse erofs overlay
ExecStart={program} daemon
# Another version, or another configuration, takes the mounts over; no reader notices.
ExecReload={program} daemon upgrade
# The FUSE connection and the control socket are kept here while no process of ours is alive.
FileDescriptorStoreMax=16
WatchdogSec=120s
WatchdogSignal=SIGKILL
{common}
[Install]
WantedBy=multi-user.target
"""

_SNAPSHOTTER = """\
[Unit]
Description=lazyfs snapshotter: lazy images for containerd
After=local-fs.target lazyfs.service
Wants=lazyfs.service
Before=containerd.service docker.service
StartLimitIntervalSec=0

[Service]
ExecStart={program} snapshotter
# The socket is kept here while no process of ours is alive: containerd is not refused, its requests wait.
FileDescriptorStoreMax=4
# Of the door; it looks after the server behind it by itself.
WatchdogSec=120s
WatchdogSignal=SIGKILL
{common}
[Install]
WantedBy=multi-user.target
"""

_DROP_IN = """\
[Unit]
Wants=lazyfs-snapshotter.service
After=lazyfs-snapshotter.service
"""


def texts(program: str = PROGRAM) -> dict[str, str]:
    """Every file by its name below systemd's directory."""
    found = {"lazyfs.service": _DAEMON, "lazyfs-snapshotter.service": _SNAPSHOTTER,
             "containerd.service.d/10-lazyfs.conf": _DROP_IN}
    return {name: f"{MARK}\n{text.format(program=program, common=_COMMON)}" for name, text in found.items()}


def write_units(directory: Path, program: str) -> list[str]:
    """
    Write them all. Returns their paths.

    Raises:
        TargetError: one is there that is not ours.

    """
    check_units(directory)
    found = {directory / name: text for name, text in texts(program).items()}
    for path, text in found.items():
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_atomically(path, text.encode(), 0o644)
    return [str(path) for path in found]


def check_units(directory: Path) -> None:
    """Raises TargetError: one is there that is not ours."""
    for path in (directory / name for name in texts()):
        if path.exists() and not _is_ours(path):
            raise TargetError(f"{path} is there, and was not written by lazyfs",
                              hint="move it away, or use --no-units")


def remove_units(paths: list[str]) -> None:
    """Those that are still ours, also where they are enabled; and the drop-in's directory, if nothing else is in it."""
    for path in map(Path, paths):
        if path.exists() and _is_ours(path):
            for link in path.parent.glob(f"*.wants/{path.name}"):
                if link.is_symlink():
                    link.unlink()
            path.unlink()
            if path.suffix == ".conf":
                with contextlib.suppress(OSError):
                    path.parent.rmdir()


def _is_ours(path: Path) -> bool:
    return path.read_text(encoding="utf-8", errors="replace").startswith(MARK)
