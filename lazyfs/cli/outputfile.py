"""
Files that commands write because the user named them: there whole, or not at all.

Layer: cli. Who calls: lazyfs.cli.profile_show, profile_merge, profile_run, profile_push, convert_profiled.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import click

from lazyfs.errors import DiskFullError, TargetError


def write_output(name: str, text: str) -> None:
    """
    Write text to a file, as UTF-8; "-": standard output. What is no ordinary file (a pipe, /dev/stdout) is written to.

    Raises:
        TargetError: it cannot be written.
        DiskFullError: there is no room for it.

    """
    data = text.encode("utf-8")
    if name == "-":
        click.echo(data, nl=False)
        return
    path = Path(name)
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
        else:
            _replace(path.resolve(), data)     # a symlink stays, and leads to the new file
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"{name}: {error.strerror}", hint="free some space there, or name another place"
                                ) from error
        raise TargetError(f"{name}: {error.strerror}", hint="name a file in a directory that can be written") from error


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name[:200]}.{os.urandom(4).hex()}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
