"""
Where an image layout's files lie: in a directory, or inside a tar that is not unpacked.

Layer: registry; used by layout.py, archive.py, dockerarchive.py. An Extent is an open descriptor, an offset and a size.
Names are relative, with forward slashes, and made by us out of digests and fixed words: nothing outside is reached.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lazyfs.errors import FormatError, NotFoundError, SourceError
from lazyfs.registry.streams import FileStream, read_exactly
from lazyfs.registry.tarindex import Member, index_tar

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Extent:
    """`size` bytes of an open file. `is_owner`: whoever takes it closes the descriptor."""

    descriptor: int
    offset: int
    size: int
    is_owner: bool

    def stream(self, name: str, offset: int = 0, size: int | None = None) -> FileStream:
        """Bytes [offset, offset + size) of it (in bounds); the stream owns the descriptor if the extent did."""
        size = self.size - offset if size is None else size
        assert 0 <= offset <= offset + size <= self.size
        return FileStream(self.descriptor, self.offset + offset, size, name, is_owner=self.is_owner)


class Files(Protocol):
    """A directory, or what looks like one. Thread-safe."""

    @property
    def name(self) -> str: ...

    def locate(self, member: str) -> Extent:
        """Raises NotFoundError, SourceError."""
        ...

    def close(self) -> None: ...


def read_small(files: Files, member: str, size_max: int) -> bytes:
    """A whole member. Raises NotFoundError; FormatError if it is larger than `size_max` bytes."""
    extent = files.locate(member)
    with extent.stream(f"{files.name}: {member}") as stream:
        if extent.size > size_max:
            raise FormatError(f"{files.name}: {member}: {extent.size} bytes, at most {size_max} are accepted")
        return read_exactly(stream, extent.size)


def open_regular(path: Path) -> tuple[int, int]:
    """A descriptor and the size of a regular file. Raises NotFoundError, SourceError."""
    try:
        # Non-blocking: opening a FIFO must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{path}: no such file", hint="check the path") from None
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}", transient=False) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise SourceError(f"{path}: not a regular file", transient=False)
    return descriptor, status.st_size


class DirectoryFiles:
    """The files below `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return str(self.path)

    def locate(self, member: str) -> Extent:
        descriptor, size = open_regular(self.path / member)
        return Extent(descriptor, 0, size, is_owner=True)

    def close(self) -> None:
        pass


class TarFiles:
    """The members of an uncompressed tar; indexed once. Raises NotFoundError, UsageError, FormatError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor, size = open_regular(path)
        try:
            self.members: dict[str, Member] = index_tar(self._descriptor, size, str(path))
        except BaseException:
            os.close(self._descriptor)
            raise
        self._is_open = True

    @property
    def name(self) -> str:
        return str(self.path)

    def locate(self, member: str) -> Extent:
        assert self._is_open, "read from a closed archive"
        found = self.members.get(member)
        if found is None or found.target:
            raise NotFoundError(f"{self.path}: holds no {member}")
        return Extent(self._descriptor, found.offset, found.size, is_owner=False)

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            os.close(self._descriptor)
