"""
oci-archive: as a destination: an image layout in one tar, there whole or not at all.

Layer: registry. Who calls: opening.py. The layout is staged beside FILE; commit() writes a deterministic tar (sorted
members, no owner, no time), syncs it and renames it over FILE; behind a symlink that is what it leads to. Only an OCI
archive is replaced, or an empty file: never a device or somebody else's file. Blobs of the archive that FILE was before
can be reused: those that has_blob() confirmed are copied into the new one.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from lazyfs.errors import LazyfsError, NotFoundError, TargetError
from lazyfs.registry.files import DirectoryFiles, TarFiles
from lazyfs.registry.layout import INDEX_FILE, LAYOUT_FILE, LayoutSource, blob_member, check_layout, read_index
from lazyfs.registry.layoutwrite import DOCUMENT_COUNT_MAX, LayoutDestination
from lazyfs.registry.staging import Staging, os_errors, sync_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazyfs.image.digest import Digest
    from lazyfs.registry.files import Extent
    from lazyfs.registry.place import Document, ImageSource
    from lazyfs.registry.reference import FileReference
    from lazyfs.registry.streams import FileStream

_COPY_BYTES = 1 << 20


class _Both:
    """Files of the new layout, else of the old archive."""

    def __init__(self, new: DirectoryFiles, old: TarFiles | None, name: str) -> None:
        self._new = new
        self.old = old
        self.name = name

    def locate(self, member: str) -> Extent:
        try:
            return self._new.locate(member)
        except NotFoundError:
            if self.old is None:
                raise
            return self.old.locate(member)

    def close(self) -> None:
        """What the reader calls: the destination still needs the files."""


class ArchiveDestination:
    """place.ImageDestination that makes a tar."""

    def __init__(self, reference: FileReference) -> None:
        self._reference = reference
        self._path = Path(os.path.realpath(reference.path))
        if self._path.is_dir():
            raise TargetError(f"{self._path}: a directory", hint=f"did you mean oci:{reference.path} ?")
        if not self._path.parent.is_dir():
            raise TargetError(f"{self._path.parent}: no such directory", hint="make it first")
        self._old = self._open_old()
        try:
            self._staging = Staging(self._path.parent)
        except BaseException:
            if self._old is not None:
                self._old.close()
            raise
        self._claimed: set[Digest] = set()
        self._lock = threading.Lock()
        self._layout = LayoutDestination(reference, directory=self._staging.path / "layout")
        self._both = _Both(DirectoryFiles(self._layout.directory), self._old, str(self._path))
        self._source = LayoutSource(self._both, reference)

    def _open_old(self) -> TarFiles | None:
        """What FILE is now; None: nothing, or an empty file. Raises TargetError: it must not be replaced."""
        if not os.path.lexists(self._path) or (self._path.is_file() and not self._path.stat().st_size):
            return None
        try:
            old = TarFiles(self._path)
            try:
                check_layout(old)
            except BaseException:
                old.close()
                raise
        except LazyfsError as error:
            raise TargetError(f"{self._path}: exists, and is no OCI archive",
                              hint="name another file, or remove this one first") from error
        return old

    @property
    def name(self) -> str:
        return self._reference.text

    @property
    def identity(self) -> str:
        return self._reference.identity

    @property
    def staging_dir(self) -> Path:
        return self._layout.staging_dir

    def documents(self) -> Iterator[Document]:
        if self._old is None:
            return
        try:
            entries = read_index(self._old)[:DOCUMENT_COUNT_MAX]
        except LazyfsError:
            return
        for entry in entries:
            try:
                document = self._source.entry_document(entry)
            except LazyfsError:
                continue
            yield document

    def reader(self) -> ImageSource:
        return self._source

    def has_blob(self, digest: Digest, size: int) -> bool:
        if self._layout.has_blob(digest, size):
            return True
        member = self._old.members.get(blob_member(digest)) if self._old is not None else None
        if self._old is None or member is None or member.target or member.size != size:
            return False
        with self._old.locate(blob_member(digest)).stream(self.name) as stream:
            if hashlib.file_digest(io.BufferedReader(_Raw(stream), _COPY_BYTES), "sha256").hexdigest() != digest.hex:
                return False   # a damaged blob must be written anew, not handed on
        with self._lock:
            self._claimed.add(digest)
        return True

    def put_blob(self, path: Path, digest: Digest, size: int) -> None:
        self._layout.put_blob(path, digest, size)

    def put_bytes(self, data: bytes, digest: Digest) -> None:
        self._layout.put_bytes(data, digest)

    def mount_blob(self, digest: Digest, size: int, other_identity: str) -> bool:
        return self.has_blob(digest, size) or self._layout.mount_blob(digest, size, other_identity)

    def put_document(self, document: Document) -> None:
        self._layout.put_document(document)

    def commit(self, document: Document) -> None:
        self._layout.commit(document)
        temporary = self._staging.path / "archive.tar"
        with os_errors(self.name):
            with temporary.open("xb") as file:
                self._write(file)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
            temporary.rename(self._path)
            sync_directory(self._path.parent)

    def _write(self, file: io.BufferedWriter) -> None:
        blobs = {path.name for path in (self._layout.directory / "blobs/sha256").iterdir()}
        blobs |= {digest.hex for digest in self._claimed}
        names = [LAYOUT_FILE, INDEX_FILE, *(f"blobs/sha256/{name}" for name in sorted(blobs))]
        with tarfile.TarFile(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, copybufsize=_COPY_BYTES) as tar:
            for directory in ("blobs", "blobs/sha256"):
                entry = tarfile.TarInfo(directory)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(entry)
            for name in names:
                extent = self._both.locate(name)
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = extent.size, 0o644
                with extent.stream(f"{self.name}: {name}") as stream:
                    tar.addfile(entry, io.BufferedReader(_Raw(stream), _COPY_BYTES))

    def close(self) -> None:
        self._layout.close()
        self._staging.close()
        if self._old is not None:
            self._old.close()


class _Raw(io.RawIOBase):
    """A FileStream for code that wants a file."""

    def __init__(self, stream: FileStream) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
