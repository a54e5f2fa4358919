"""
The mount system calls, with readable errors, and the parser of /proc/self/mountinfo.

Layer: fs; no I/O of its own beyond these calls. Who calls: fs.session, fs.drivers (in an isolated child), node.unmount.
EROFS is mounted by fsopen/fsconfig (Linux 5.2): an image may have 512 `device=` options, which do not fit into the
4 KiB option page of mount(2); and the kernel's complaint can be read from the context instead of from dmesg.
mount(8) is not used: util-linux 2.38 sets up a loop device for a file, which file-backed EROFS (6.12) does not need.
Sources: mount(2), umount(2), linux/mount.h, Documentation/filesystems/mount_api.rst, proc(5) for mountinfo.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
from dataclasses import dataclass

from lazyfs.errors import BusyError, FormatError, HostError, LazyfsError, TargetError

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC = 1, 2, 4, 4096, 16384
MNT_FORCE, MNT_DETACH, UMOUNT_NOFOLLOW = 1, 2, 8

# linux/mount.h, asm-generic/unistd.h: the same numbers on every architecture
_SYS_MOVE_MOUNT, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 429, 430, 431, 432
_FSOPEN_CLOEXEC = 1
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_FSMOUNT_CLOEXEC, _MOUNT_ATTR_RDONLY = 1, 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_AT_FDCWD = -100
FSCONFIG_STRING_BYTES_MAX = 255   # fs/fsopen.c: strndup_user(value, 256)
_CONTEXT_LOG_BYTES = 1024
_OCTAL = re.compile(rb"\\([0-7]{3})")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.syscall.restype = ctypes.c_long


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of mountinfo. `root`: the directory of the file system that is mounted; `device`: major:minor."""

    mount_id: int
    parent_id: int
    device: str
    root: str
    target: str
    fs_type: str
    source: str
    options: str


def mount(source: str, target: str, fs_type: str, flags: int, data: str = "") -> None:
    """Mount the old way (one page of options). Raises HostError: the kernel cannot; TargetError: not there."""
    result = _libc.mount(os.fsencode(source), os.fsencode(target), fs_type.encode(), flags, os.fsencode(data))
    if result:
        raise _mount_error(ctypes.get_errno(), f"mounting {fs_type or 'bind'} on {target}", "")


def unmount(target: str, flags: int = 0) -> None:
    """Unmount, never following a symlink. Raises BusyError; TargetError: not a mount point."""
    if not _libc.umount2(os.fsencode(target), flags | UMOUNT_NOFOLLOW):
        return
    code = ctypes.get_errno()
    if code == errno.EBUSY:
        raise BusyError(f"{target} is in use", hint="stop the programs that use it, or detach it with --lazy")
    if code in {errno.EINVAL, errno.ENOENT}:
        raise TargetError(f"{target} is not a mount point")
    raise _mount_error(code, f"unmounting {target}", "")


def mount_by_context(fs_type: str, source: str, target: str, options: list[tuple[str, str | None]]) -> None:
    """
    Mount read-only through a file system context; `options` are (key, value), or (key, None) for a flag.

    Raises:
        HostError: the kernel refuses; the message carries what it wrote into the context.
        TargetError: `target` cannot be mounted on.

    """
    context = _call(_SYS_FSOPEN, fs_type.encode(), _FSOPEN_CLOEXEC, what=f"opening file system {fs_type}")
    try:
        what = f"mounting {fs_type} on {target}"
        for key, value in [("source", source), ("ro", None), *options]:
            if value is None:
                _configure(context, _FSCONFIG_SET_FLAG, key, None, what)
            else:
                _configure(context, _FSCONFIG_SET_STRING, key, value, what)
        _configure(context, _FSCONFIG_CMD_CREATE, None, None, what)
        detached = _call(
            _SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, _MOUNT_ATTR_RDONLY, what=what, context=context
        )
        try:
            arguments = (detached, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
            _call(_SYS_MOVE_MOUNT, *arguments, what=what)
        finally:
            os.close(detached)
    finally:
        os.close(context)


def mounts() -> list[MountEntry]:
    """All mounts of this namespace, in mount order (of two on one target the later one is on top)."""
    with open("/proc/self/mountinfo", "rb") as file:   # noqa: PTH123 - bytes, one read
        return parse_mountinfo(file.read())


def parse_mountinfo(data: bytes) -> list[MountEntry]:
    """
    Parse the bytes of a mountinfo file (proc(5)).

    Raises:
        FormatError: a line is not of the documented form.

    """
    entries = []
    for line in data.splitlines():
        fields = line.split(b" ")
        try:
            dash = fields.index(b"-", 6)
            numbers = int(fields[0]), int(fields[1])
            texts = [_unescape(field) for field in (*fields[2:5], *fields[dash + 1 : dash + 4])]
            device, root, target, fs_type, source, options = texts   # too few fields: ValueError
        except ValueError as error:
            raise FormatError(f"unexpected line in mountinfo: {line[:100]!r}") from error
        entries.append(MountEntry(*numbers, device, root, target, fs_type, source, options))
    return entries


def mount_at(target: str, entries: list[MountEntry] | None = None) -> MountEntry | None:
    """The topmost mount on exactly `target` (absolute, resolved), or None. Touches no file system but proc."""
    found = None
    for entry in mounts() if entries is None else entries:
        if entry.target == target:
            found = entry
    return found


def kernel_knows(fs_type: str) -> bool:
    """Whether the running kernel has the file system, loaded or as a module that mounting will load."""
    with open("/proc/filesystems", encoding="ascii") as file:   # noqa: PTH123
        if any(line.split()[-1:] == [fs_type] for line in file):
            return True
    modules = f"/lib/modules/{os.uname().release}/modules.dep"
    with contextlib.suppress(OSError), open(modules, encoding="utf-8") as file:   # noqa: PTH123
        return any(f"/{fs_type}.ko" in line for line in file)
    return False


def kernel_version() -> tuple[int, int]:
    """(major, minor) of the running kernel; (0, 0) if it does not say."""
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _configure(context: int, command: int, key: str | None, value: str | None, what: str) -> None:
    if value is not None and len(os.fsencode(value)) > FSCONFIG_STRING_BYTES_MAX:
        raise HostError(f"{what}: path too long for a mount option: {value}", hint="use a shorter --cache-dir")
    raw_key = None if key is None else key.encode()
    raw_value = None if value is None else os.fsencode(value)
    shown = what if key is None else f"{what}, option {key}"
    _call(_SYS_FSCONFIG, context, command, raw_key, raw_value, 0, what=shown, context=context)


def _call(number: int, *arguments: bytes | int | None, what: str, context: int | None = None) -> int:
    typed = [ctypes.c_char_p(item) if isinstance(item, bytes) or item is None else ctypes.c_long(item)
             for item in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *typed))
    if result < 0:
        code = ctypes.get_errno()
        raise _mount_error(code, what, "" if context is None else _context_log(context))
    return result


def _context_log(context: int) -> str:
    """What the kernel wrote about the context: lines such as `e erofs: cannot find valid superblock`."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        while len(lines) < 16:   # the ring holds 8
            lines.append(os.read(context, _CONTEXT_LOG_BYTES).decode("utf-8", "replace").strip()[2:])
    return "; ".join(lines)


def _mount_error(code: int, what: str, log: str) -> LazyfsError:
    text = f"{what}: {os.strerror(code)}" + (f" ({log})" if log else "")
    if code == errno.EPERM:
        return HostError(text, hint="mounting needs root (CAP_SYS_ADMIN)")
    if code in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EBUSY}:
        return TargetError(text)
    if code == errno.ENOTBLK:   # fs/erofs/super.c: no read_folio there, or a kernel that wants block devices
        return HostError(f"{what}: the image cannot be mounted from the file system that its file is on",
                         hint="tmpfs and overlayfs cannot do it: use --driver fuse, or a --cache-dir on ext4 or xfs")
    if code in {errno.ENODEV, errno.ENOSYS}:
        return HostError(text, hint="this kernel lacks it; try --driver fuse")
    return HostError(text)


def _unescape(field: bytes) -> str:
    if b"\\" in field:   # hardly ever; a node has hundreds of lines
        field = _OCTAL.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field)
    return os.fsdecode(field)
