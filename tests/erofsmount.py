"""
Mount an EROFS image file-backed, for tests of the format only (the product's own code: lazyfs/fs/mountapi.py).

New mount API (fsopen(2) and on), so that hundreds of `device=` options fit. Numbers are the same on all
architectures since Linux 5.1.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_LIBC = ctypes.CDLL(None, use_errno=True)
_MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 429, 430, 431, 432
_CLOEXEC, _SET_FLAG, _SET_STRING, _CREATE = 1, 0, 1, 6
_ATTR_RDONLY = 1
_FROM_EMPTY_PATH = 4
_AT_FDCWD = -100
_DETACH = 2


def require_erofs() -> None:
    """Skip the calling test, saying why, where it cannot mount."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if "\terofs\n" not in Path("/proc/filesystems").read_text(encoding="ascii"):
        pytest.skip("this kernel has no EROFS")


@contextlib.contextmanager
def mounted_erofs(image: Path, devices: Sequence[Path], target: Path) -> Iterator[Path]:
    """Mount `image` on `target` for the length of the block. Raises OSError with the kernel's own words."""
    context = _call(_FSOPEN, b"erofs", _CLOEXEC)
    try:
        _configure(context, _SET_STRING, b"source", os.fsencode(image))
        for device in devices:
            _configure(context, _SET_STRING, b"device", os.fsencode(device))
        _configure(context, _SET_FLAG, b"ro", None)
        _configure(context, _CREATE, None, None)
        mount = _call(_FSMOUNT, context, _CLOEXEC, _ATTR_RDONLY)
    finally:
        os.close(context)
    try:
        _call(_MOVE_MOUNT, mount, b"", _AT_FDCWD, os.fsencode(target), _FROM_EMPTY_PATH)
    finally:
        os.close(mount)
    try:
        yield target
    finally:
        if _LIBC.umount2(os.fsencode(target), 0) != 0:
            code = ctypes.get_errno()
            _LIBC.umount2(os.fsencode(target), _DETACH)
            raise OSError(code, f"{target}: {os.strerror(code)} at umount")


def _configure(context: int, command: int, key: bytes | None, value: bytes | None) -> None:
    try:
        _call(_FSCONFIG, context, command, key, value, 0)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: {_messages(context)}") from None


def _messages(context: int) -> str:
    with contextlib.suppress(OSError):
        return os.read(context, 4096).decode("utf-8", "replace").strip()
    return "no message"


def _call(number: int, *arguments: int | bytes | None) -> int:
    wide = [ctypes.c_long(value) if isinstance(value, int) else ctypes.c_char_p(value) for value in arguments]
    result = int(_LIBC.syscall(ctypes.c_long(number), *wide))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
