"""
Where `lazyfs get` writes: a partial file that becomes FILE when it is whole, or a pipe or device that is written to.

Layer: mirror; blocking. Who calls: mirror.geturl. State: the partial file beside FILE, locked by who writes it.
Invariants: the directory may be everybody's (/tmp), and the partial file's name can be foreseen; so what lies there is
used only if it is an ordinary file of ours with one name, and no link is followed that somebody else has put there.
Two that get the same thing into the same FILE do not mix their bytes: the second one is refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from typing import TYPE_CHECKING, BinaryIO, Final

from lazyfs.errors import BusyError, DiskFullError, IntegrityError, TargetError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_OTHER: Final = "name another file with -o"


def real_output(output: Path) -> Path:
    """
    The file that is to be replaced: where links of our own lead to. Nothing is asked of the network before that.

    Raises:
        TargetError: it is a directory, in none, or a link that somebody else has put into a directory for all.

    """
    try:
        if output.is_symlink():
            link, directory = output.lstat(), output.parent.stat()
            if directory.st_mode & stat.S_IWOTH and link.st_uid not in {os.geteuid(), directory.st_uid}:
                raise TargetError(f"{output}: a link of somebody else's, in a directory for all", hint=_OTHER)
        found = output.resolve()
        if found.is_dir():
            raise TargetError(f"{output}: is a directory", hint="name a file in it with -o")
        if not found.parent.is_dir():
            raise TargetError(f"{output}: there is no such directory: {found.parent}", hint="make it, or " + _OTHER)
    except (OSError, RuntimeError) as error:     # RuntimeError: links in a ring
        raise _error(output, error) from error
    return found


def is_stream(output: Path) -> bool:
    """Whether it is there and no ordinary file: a pipe, /dev/null; it is written to, not replaced."""
    return output.exists() and not output.is_file()


@contextlib.contextmanager
def stream_into(output: Path) -> Iterator[BinaryIO]:
    """
    What `is_stream`, open for writing.

    Raises:
        TargetError, DiskFullError: it cannot be written.

    """
    try:
        with output.open("wb") as file:
            yield file
    except OSError as error:
        raise _error(output, error) from error


@contextlib.contextmanager
def part_of(output: Path, name: str) -> Iterator[BinaryIO]:
    """
    The partial file `name` beside `output`, with what an earlier run has left; after the block it is `output`.

    Where the block raises, it stays for a later run, but for an IntegrityError: those are wrong bytes.

    Raises:
        BusyError: another process writes it. TargetError, DiskFullError: it cannot be written, or is not ours.

    """
    part = output.with_name(name)
    try:
        with _locked(part) as file:
            try:
                yield file
            except IntegrityError:
                part.unlink(missing_ok=True)
                raise
            file.flush()
            os.fsync(file.fileno())
            part.replace(output)
    except OSError as error:
        raise _error(output, error) from error


def _locked(part: Path) -> BinaryIO:
    """Raises BusyError, TargetError, OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(part, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _not_ours(part) from None
        raise
    try:
        _check_ours(descriptor, part)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_finished = not os.path.samestat(os.fstat(descriptor), os.lstat(part))   # by who had the lock just now
    except (BlockingIOError, FileNotFoundError):
        is_finished = True
    except BaseException:
        os.close(descriptor)
        raise
    if is_finished:
        os.close(descriptor)
        raise BusyError(f"{part}: another lazyfs get is writing it",
                        hint="wait until that has ended, or name another file with -o")
    return os.fdopen(descriptor, "a+b")


def _check_ours(descriptor: int, part: Path) -> None:
    """Raises TargetError: somebody else may read, change or have what is written to it."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink > 1:
        raise _not_ours(part)


def _not_ours(part: Path) -> TargetError:
    return TargetError(f"{part}: is not a file of ours, and is where the part that has come would be kept",
                       hint="remove it, or name a file in a directory of your own with -o")


def _error(output: Path, error: OSError | RuntimeError) -> TargetError | DiskFullError:
    if isinstance(error, OSError) and error.errno in _FULL:
        return DiskFullError(f"{output}: {error.strerror}",
                             hint="free some space there, then run the same command again: it goes on")
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return TargetError(f"{output}: {text}", hint=_OTHER)
