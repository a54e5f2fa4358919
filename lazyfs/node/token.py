"""
The token that senders and the collector of profiles share: read when it is needed, so that it may be replaced. And the
secrets that each makes for itself, so that what is derived of them says nothing to others.

Layer: node. Who calls: node.collector, node.uploads. Blocking. Neither is ever in a message.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lazyfs.errors import ConfigError
from lazyfs.registry.options import Secret

_BYTES_MAX = 4096
_SECRET_BYTES = 32
_CHARS_MIN = 16                  # a guess a connection, eight connections at a time


def read_token(path: str) -> Secret:
    """
    The first line of a file.

    Raises:
        ConfigError: it cannot be read, others may read it, or it is no token.

    """
    try:
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(_BYTES_MAX)
    except OSError as error:
        raise ConfigError(f"profile.token_file {path}: {error.strerror}") from error
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(f"profile.token_file {path} can be read by others than its owner", hint=f"chmod 600 {path}")
    line = data.partition(b"\n")[0].strip()
    if len(line) < _CHARS_MIN or not line.isascii() or not line.decode("ascii").isprintable() or b" " in line:
        raise ConfigError(f"profile.token_file {path}: expected a line of at least {_CHARS_MIN} printable characters",
                          hint=f"for example: openssl rand -hex 32 > {path}")
    return Secret(line.decode("ascii"))


def node_secret(path: Path) -> bytes:
    """
    Random bytes of a file, which is made where there is none, whole and for its owner only.

    Raises:
        OSError: it can neither be read nor written.

    """
    for _ in range(2):
        try:
            data = path.read_bytes()[:_SECRET_BYTES]
        except FileNotFoundError:
            data = b""
        if len(data) == _SECRET_BYTES:
            break
        data = os.urandom(_SECRET_BYTES)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        temporary.replace(path)    # of two at the same time the later one's is read by both
    return data
