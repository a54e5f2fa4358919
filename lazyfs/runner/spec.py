"""
The OCI runtime bundle's config.json: what runc is told. Pure.

Layer: runner. Who calls: runner.container. A program must start as it will in production, or it reads other files: so
capabilities, mounts and masked paths are those that Docker and containerd's CRI give a container by default. What is
not: no seccomp profile (as with ctr), the limits of whoever calls, and no network but loopback unless asked for.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyfs.errors import UsageError

if TYPE_CHECKING:
    from lazyfs.runner.users import User

HOSTNAME = "lazyfs-profile"
_CAPABILITIES = [f"CAP_{name}" for name in (
    "CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP",
    "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE")]
_MASKED = ["/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
           "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap"]
_READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
_TTY_GROUP = 5                   # of devpts, in all distributions


class Network(enum.StrEnum):
    """What the container sees: a network namespace of its own with loopback only, or the host's."""

    NONE = "none"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class ExtraMount:
    """A user's mount. `source`: absolute, for a bind mount; None: a tmpfs."""

    target: str
    source: str | None = None
    read_only: bool = False

    @classmethod
    def parse(cls, text: str) -> ExtraMount:
        """
        Read type=bind,src=DIR,dst=DIR[,ro] or type=tmpfs,dst=DIR.

        Raises:
            UsageError: something else.

        """
        hint = "for example: --mount type=bind,src=/srv/data,dst=/data,ro or --mount type=tmpfs,dst=/cache"
        fields = {key: value for key, _, value in (part.partition("=") for part in text.split(","))}
        kind = fields.pop("type", "bind")
        source = fields.pop("source", fields.pop("src", ""))
        target = fields.pop("target", fields.pop("destination", fields.pop("dst", "")))
        read_only = fields.pop("readonly", fields.pop("ro", None)) in {"", "true", "1"}
        if fields or kind not in {"bind", "tmpfs"} or not target.startswith("/") or "\0" in text:
            raise UsageError(f"mount {text!r:.200} is not understood", hint=hint)
        if (kind == "bind") != source.startswith("/"):
            raise UsageError(f"mount {text!r:.200}: type=bind wants an absolute src, tmpfs none", hint=hint)
        if source and not Path(source).exists():
            raise UsageError(f"mount {text!r:.200}: {source} does not exist")
        return cls(target, source or None, read_only)


@dataclass(frozen=True, slots=True)
class Program:
    """What is run, all of it resolved."""

    arguments: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str
    user: User
    stop_signal: int


def runtime_spec(
    program: Program, network: Network, mounts: tuple[ExtraMount, ...], files: dict[str, str], *, cgroup: str,
    cgroup_namespace: bool,
) -> dict[str, Any]:
    """
    The config.json, as JSON.

    Args:
        program: what to run.
        network: which one it sees.
        mounts: the user's.
        files: of the host, bound read-only: target: source (/etc/hosts and such).
        cgroup: its name, below the root of each hierarchy.
        cgroup_namespace: whether it gets one (cgroup v2: as all engines do).

    """
    namespaces = ["pid", "ipc", "uts", "mount"]
    namespaces += ["network"] if network is Network.NONE else []
    namespaces += ["cgroup"] if cgroup_namespace else []
    bound = [_bind(source, target, read_only=True) for target, source in files.items()]
    return {
        "ociVersion": "1.0.2",
        "process": _process(program),
        "root": {"path": "rootfs", "readonly": False},
        "hostname": HOSTNAME,
        "mounts": [*_system_mounts(), *bound, *map(_extra_mount, mounts)],
        "linux": {
            "cgroupsPath": f"/{cgroup}",
            "namespaces": [{"type": kind} for kind in namespaces],
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},   # runc allows its default devices by itself
            "maskedPaths": _MASKED,
            "readonlyPaths": _READ_ONLY,
        },
    }


def _process(program: Program) -> dict[str, Any]:
    user = program.user
    # of a user that is not root execve(2) takes these away anyhow
    given = _CAPABILITIES if user.uid == 0 else []
    return {
        "terminal": False,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
        "args": list(program.arguments),
        "env": list(program.env),
        "cwd": program.cwd,
        "capabilities": {"bounding": _CAPABILITIES, "effective": given, "permitted": given},
    }


def _system_mounts() -> list[dict[str, Any]]:
    quiet = ["nosuid", "noexec", "nodev"]
    return [
        _mount("proc", "proc", "/proc", quiet),
        _mount("tmpfs", "tmpfs", "/dev", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        _mount("devpts", "devpts", "/dev/pts",
               ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", f"gid={_TTY_GROUP}"]),
        _mount("tmpfs", "shm", "/dev/shm", [*quiet, "mode=1777", "size=65536k"]),   # noqa: S108 - the container's
        _mount("mqueue", "mqueue", "/dev/mqueue", quiet),
        _mount("sysfs", "sysfs", "/sys", [*quiet, "ro"]),
        _mount("cgroup", "cgroup", "/sys/fs/cgroup", [*quiet, "relatime", "ro"]),
    ]


def _extra_mount(mount: ExtraMount) -> dict[str, Any]:
    if mount.source is None:
        return _mount("tmpfs", "tmpfs", mount.target, ["nosuid", "nodev", "mode=1777"])
    return _bind(mount.source, mount.target, read_only=mount.read_only)


def _bind(source: str, target: str, *, read_only: bool) -> dict[str, Any]:
    return _mount("bind", source, target, ["rbind", "rprivate", "ro" if read_only else "rw"])


def _mount(kind: str, source: str, target: str, options: list[str]) -> dict[str, Any]:
    return {"type": kind, "source": source, "destination": target, "options": options}
