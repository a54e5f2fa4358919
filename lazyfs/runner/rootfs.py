"""
Read a file inside a container's root file system, where every link may point anywhere.

Layer: runner. Who calls: runner.session. openat2(2) with RESOLVE_IN_ROOT (Linux 5.6): the kernel resolves absolute
links and `..` as if the directory were /, so nothing outside of it is ever opened.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import time
from typing import TYPE_CHECKING

from lazyfs.errors import FormatError

if TYPE_CHECKING:
    from pathlib import Path

_SYS_OPENAT2 = 437               # on all architectures
_RESOLVE_NO_MAGICLINKS, _RESOLVE_IN_ROOT = 0x02, 0x10
# Something was mounted or renamed, anywhere on the machine, while the kernel walked over a `..`: it cannot tell whether
# the walk left the root, and wants to be asked again (openat2(2), EAGAIN). A busy node does that all the time.
_DISTURBED_S = 5.0
_AGAIN_S = 0.001
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def read_inside(root: Path, path: str, size_bytes_max: int) -> bytes | None:
    """
    A regular file's content; None: there is none by that name.

    Args:
        root: the directory that is / for `path`.
        path: absolute, as the container sees it.
        size_bytes_max: of a file that is read at all.

    Raises:
        FormatError: larger than that. OSError: it cannot be read.

    """
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        descriptor = _open_in_root(directory, path)
    finally:
        os.close(directory)
    if descriptor is None:
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(size_bytes_max + 1)
    finally:
        os.close(descriptor)
    if len(data) > size_bytes_max:
        raise FormatError(f"{path} in the image is larger than {size_bytes_max} bytes")
    return data


def _open_in_root(directory: int, path: str) -> int | None:
    how = struct.pack("QQQ", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, 0,
                      _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    deadline = time.monotonic() + _DISTURBED_S
    while (number := openat2(directory, os.fsencode(path), how)) < 0:
        code = ctypes.get_errno()
        if code != errno.EAGAIN or time.monotonic() >= deadline:
            break
        time.sleep(_AGAIN_S)
    else:
        return number
    if code in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EISDIR}:
        return None
    raise OSError(code, os.strerror(code), path)


def openat2(directory: int, path: bytes, how: bytes) -> int:
    """Make the system call: a descriptor, or -1 with `ctypes.get_errno()` set."""
    return int(_libc.syscall(ctypes.c_long(_SYS_OPENAT2), ctypes.c_long(directory), ctypes.c_char_p(path),
                             ctypes.c_char_p(how), ctypes.c_long(len(how))))
