"""
Id-mapped copies of what is below a container with user namespaces, where a lazy image is among it.

For ordinary images containerd maps the ids itself, told by options. Since 2.2 it does so by one copy of the mount that
all lower directories have in common, without the mounts in it: a lazy image would be an empty directory there. So for
lazy images we make the copies ourselves (open_tree, mount_setattr with MOUNT_ATTR_IDMAP), read-only:

    <root>/mapped/<snapshot id>/<n>      the n-th lower directory, mapped; as long as the snapshot is there

Layer: snapshotter, above model. Who calls: directories, core; never within a transaction. A copy of a file system that
is gone (reboot, daemon lost) is made anew. Facts: mount_setattr(2); EROFS maps since Linux 6.2, FUSE does not for us.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from lazyfs.errors import HostError, TargetError
from lazyfs.fs import mountapi

if TYPE_CHECKING:
    from collections.abc import Iterator

# linux/mount.h, linux/fcntl.h, asm-generic/unistd.h: the same numbers on every architecture
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_IDMAP = 0x1, 0x100000
_AT_FDCWD, _AT_EMPTY_PATH, _MOVE_MOUNT_F_EMPTY_PATH = -100, 0x1000, 4
_HELPER_S = 10.0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_making = threading.Lock()       # two calls for one snapshot must not both mount


class _MountAttr(ctypes.Structure):
    _fields_ = (("attr_set", ctypes.c_uint64), ("attr_clr", ctypes.c_uint64), ("propagation", ctypes.c_uint64),
                ("userns_fd", ctypes.c_uint64))


def mapped(lowers: list[Path], directory: Path, uid_map: str, gid_map: str) -> list[Path]:
    """
    Have a mapped, read-only copy of each directory; those that are there already stay.

    Args:
        lowers: mount points, or directories within one mount.
        directory: where the copies go.
        uid_map: containerID:hostID:size[,...]; an empty one maps each id to itself.
        gid_map: likewise.

    Raises:
        HostError: the kernel or the file system cannot.

    """
    targets = [directory / str(index) for index in range(len(lowers))]
    with _making:
        wanted = [(lower, target) for lower, target in zip(lowers, targets, strict=True) if not _is_copy(target, lower)]
        if wanted:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _user_namespace(uid_map, gid_map) as namespace:
                for lower, target in wanted:
                    _copy(lower, target, namespace)
    return targets


def release(directory: Path) -> None:
    """Unmount the copies and remove the directory; nothing there is as good. Raises OSError, LazyfsError."""
    with contextlib.suppress(FileNotFoundError):
        for target in sorted(directory.iterdir()):
            with contextlib.suppress(TargetError):
                while True:   # one on top of another, after a daemon was lost
                    mountapi.unmount(str(target), mountapi.MNT_DETACH)
            target.rmdir()
        directory.rmdir()


def _is_copy(target: Path, lower: Path) -> bool:
    """Whether that very file system is mounted there. Looks at no mount that may be dead."""
    entry = mountapi.mount_at(str(target))
    device = lower.stat().st_dev
    return entry is not None and entry.device == f"{os.major(device)}:{os.minor(device)}"


def _copy(lower: Path, target: Path, namespace: int) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(target, 0o700)   # noqa: PTH102 - Path.mkdir(exist_ok=True) looks at what is there: a dead mount
    tree = _call(_SYS_OPEN_TREE, lower, _AT_FDCWD, os.fsencode(lower), _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC)
    try:
        attributes = _MountAttr(_MOUNT_ATTR_IDMAP | _MOUNT_ATTR_RDONLY, 0, 0, namespace)
        _call(_SYS_MOUNT_SETATTR, lower, tree, b"", _AT_EMPTY_PATH, ctypes.byref(attributes),
              ctypes.c_size_t(ctypes.sizeof(attributes)))
        _call(_SYS_MOVE_MOUNT, lower, tree, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(tree)


def _call(number: int, lower: Path, *arguments: object) -> int:
    typed = [ctypes.c_long(item) if isinstance(item, int) else item for item in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *typed))
    if result < 0:
        code = ctypes.get_errno()
        hint = ("this file system cannot map ids: driver fuse, or a kernel before 6.2" if code == errno.EINVAL
                else "user namespaces on lazy images need root and Linux 6.2")
        raise HostError(f"mapping the ids of {lower}: {os.strerror(code)}", hint=hint)
    return result


@contextlib.contextmanager
def _user_namespace(uid_map: str, gid_map: str) -> Iterator[int]:
    """A descriptor of a user namespace with these maps. A helper lives in it until we have the descriptor."""
    words = ["unshare", "--user", "sh", "-c", "echo; read -r _"]   # says that it is there, waits for our end
    try:
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL) as helper:
            stop = threading.Timer(_HELPER_S, helper.kill)
            stop.start()
            try:
                assert helper.stdout is not None
                if helper.stdout.readline() != b"\n":
                    raise HostError("cannot make a user namespace", hint="see user.max_user_namespaces, and unshare(1)")
                place = Path(f"/proc/{helper.pid}")
                for name, text in (("uid_map", uid_map), ("gid_map", gid_map)):
                    lines = (text or "0:0:4294967295").replace(":", " ").replace(",", "\n")
                    (place / name).write_text(f"{lines}\n", encoding="ascii")
                namespace = os.open(place / "ns" / "user", os.O_RDONLY | os.O_CLOEXEC)
            finally:
                stop.cancel()
                helper.kill()
    except OSError as error:
        raise HostError(f"cannot map ids {uid_map} {gid_map}: {error.strerror}",
                        hint="ranges must not overlap, and lie within those of this machine") from error
    try:
        yield namespace
    finally:
        os.close(namespace)
