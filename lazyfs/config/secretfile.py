"""
Words that the configuration names by file: read when they are needed, so that they may be replaced.

Layer: config. Who calls: node.token, the tracker and its clients. Blocking. The word is in no message.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lazyfs.errors import ConfigError

_BYTES_MAX = 4096
_CHARS_MIN = 16                  # nobody guesses that over a network


def read_word(path: str, key: str, *, chars_min: int = _CHARS_MIN) -> str:
    """
    The first line of a file. `key`: of the configuration, for messages.

    Raises:
        ConfigError: it cannot be read, others may read it, or it is no word.

    """
    try:
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(_BYTES_MAX)
    except OSError as error:
        raise ConfigError(f"{key} {path}: {error.strerror}") from error
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(f"{key} {path} can be read by others than its owner", hint=f"chmod 600 {path}")
    line = data.partition(b"\n")[0].strip()
    if len(line) < chars_min or not line.isascii() or not line.decode("ascii").isprintable() or b" " in line:
        raise ConfigError(f"{key} {path}: expected a line of at least {chars_min} printable characters",
                          hint=f"for example: openssl rand -hex 32 > {path}")
    return line.decode("ascii")
