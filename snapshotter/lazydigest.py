"""
The identity of a lazy image on this node: the digest of its uncompressed bootstrap layer, which is its diff-id.

Computed from the files into which containerd unpacked that layer, never believed from a label: an image's author
writes labels, and the daemon's cache answers to this digest. The archive is not rebuilt in memory: its bytes follow
from names, sizes and contents (docs/format.md, image.ustar), so they are hashed as they would stand in it.

Layer: snapshotter. Who calls: lazy, once an image. Light: no numpy.
"""

from __future__ import annotations

import hashlib
import os
import stat
from typing import TYPE_CHECKING

from lazyfs import limits
from lazyfs.errors import IntegrityError
from lazyfs.image.ustar import END, header_of, padding_of

if TYPE_CHECKING:
    from pathlib import Path

_DIRECTORY = "lazyfs/"
_OPTIONAL = "lazyfs/hot.bin"
_FILES = ("lazyfs/image.json", "lazyfs/tables.bin", _OPTIONAL, "lazyfs/image.erofs")
_READ_BYTES = limits.MIB


def bootstrap_digest(fs_dir: Path) -> str:
    """
    Digest of the bootstrap layer that was unpacked into `fs_dir`: "sha256:<hex>".

    Raises:
        IntegrityError: what lies there is not a bootstrap's files.

    """
    digest = hashlib.sha256(header_of(_DIRECTORY, 0))
    for name in _FILES:
        path = fs_dir / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if name == _OPTIONAL and isinstance(error, FileNotFoundError):
                continue
            raise _not_one(f"{path}: {error.strerror}") from error
        try:
            _hash_file(digest, name, path, descriptor)
        finally:
            os.close(descriptor)
    digest.update(END)
    return f"sha256:{digest.hexdigest()}"


def _hash_file(digest: hashlib._Hash, name: str, path: Path, descriptor: int) -> None:
    """The member `name` as it stands in the archive."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > limits.BOOTSTRAP_BYTES_MAX:
        raise _not_one(f"{path} is not a file of at most {limits.BOOTSTRAP_BYTES_MAX} bytes")
    digest.update(header_of(name, status.st_size))
    size = 0
    while part := os.read(descriptor, _READ_BYTES):
        digest.update(part)
        size += len(part)
    if size != status.st_size:
        raise _not_one(f"{path} is being written to")
    digest.update(padding_of(size))


def _not_one(reason: str) -> IntegrityError:
    text = f"no unpacked bootstrap of a lazy image: {reason}"
    return IntegrityError(text, hint="remove the image, and pull it again")
