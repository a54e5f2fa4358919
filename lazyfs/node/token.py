"""
The token that senders and the collector of profiles share: read when it is needed, so that it may be replaced. And the
secrets that each makes for itself, so that what is derived of them says nothing to others.

Layer: node. Who calls: node.collector, node.uploads. Blocking. Neither is ever in a message.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lazyfs.config.secretfile import read_word
from lazyfs.registry.options import Secret

if TYPE_CHECKING:
    from pathlib import Path

_SECRET_BYTES = 32


def read_token(path: str) -> Secret:
    """
    The first line of a file.

    Raises:
        ConfigError: it cannot be read, others may read it, or it is no token.

    """
    return Secret(read_word(path, "profile.token_file"))


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
