"""
oci: as a destination: an image layout directory that several processes may write at once.

Layer: registry. Who calls: opening.py, archive.py. OCI image-spec v1.1 image-layout.md. Order of things, so that a
reader never sees half an image, also after a power cut: blobs are written in a staging directory inside DIR, synced,
renamed to blobs/sha256/; at commit the blob directory is synced, then index.json replaced atomically under a lock.
Other tags' entries, and keys that we do not know, are kept as they are.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lazyfs.errors import FormatError, LazyfsError, NotFoundError, TargetError
from lazyfs.registry.files import DirectoryFiles
from lazyfs.registry.layout import (
    INDEX_BYTES_MAX,
    INDEX_FILE,
    LAYOUT_BYTES,
    LAYOUT_FILE,
    REF_NAME,
    LayoutSource,
    blob_member,
    check_layout,
    read_index,
)
from lazyfs.registry.staging import Staging, file_lock, os_errors, sync_directory, sync_file, write_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazyfs.image.digest import Digest
    from lazyfs.registry.place import Document, ImageSource
    from lazyfs.registry.reference import FileReference

DOCUMENT_COUNT_MAX = 64  # place.ImageDestination.documents
_LOCK_FILE = ".lazyfs.lock"
_ANOTHER_FILE_SYSTEM = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOENT, errno.EACCES, errno.ENOTDIR}


class LayoutDestination:
    """place.ImageDestination in a directory. Thread-safe but for close()."""

    def __init__(self, reference: FileReference, *, directory: Path | None = None) -> None:
        """`directory`: write there instead of reference.path (an archive's staging)."""
        self._reference = reference
        self._path = (directory or reference.path).absolute()
        self._files = DirectoryFiles(self._path)
        self._source = LayoutSource(self._files, reference)
        self._staging: Staging | None = None
        self._lock = threading.Lock()
        self._check_target()

    def _check_target(self) -> None:
        """An existing directory must be empty or a layout: nothing of somebody else's is mixed with ours."""
        try:
            names = [path.name for path in self._path.iterdir()]
        except FileNotFoundError:
            return
        except OSError as error:
            raise TargetError(f"{self._path}: {error.strerror}", hint="DIR is a directory, or not there yet") from error
        if any(not name.startswith(".lazyfs") for name in names):
            try:
                check_layout(self._files)
            except NotFoundError:
                raise TargetError(f"{self._path}: not empty, and no OCI image layout",
                                  hint="name another directory") from None

    @property
    def name(self) -> str:
        return self._reference.text

    @property
    def identity(self) -> str:
        return self._reference.identity

    @property
    def directory(self) -> Path:
        return self._path

    @property
    def staging_dir(self) -> Path:
        with self._lock:
            if self._staging is None:
                self._staging = self._make_staging()
            return self._staging.path

    def _make_staging(self) -> Staging:
        staging = Staging(self._path)
        try:
            with os_errors(self.name):
                # The layout file first: another process takes a directory without it for somebody else's.
                if not (self._path / LAYOUT_FILE).exists():
                    write_file(self._path / LAYOUT_FILE, LAYOUT_BYTES)
                self._blobs().mkdir(parents=True, exist_ok=True)
        except BaseException:
            staging.close()
            raise
        return staging

    def _blobs(self) -> Path:
        return self._path / "blobs" / "sha256"

    def documents(self) -> Iterator[Document]:
        try:
            entries = read_index(self._files)[::-1]  # the last one was added last
        except LazyfsError:
            return
        entries.sort(key=lambda entry: entry.tag != self._reference.tag)
        seen = set()
        for entry in entries[:DOCUMENT_COUNT_MAX]:
            if entry.digest not in seen:
                seen.add(entry.digest)
                with contextlib.suppress(LazyfsError):
                    yield self._source.entry_document(entry)

    def reader(self) -> ImageSource:
        return self._source

    def has_blob(self, digest: Digest, size: int) -> bool:
        return _holds(self._path / blob_member(digest), digest, size)

    def put_blob(self, path: Path, digest: Digest, size: int) -> None:
        with os_errors(self.name):
            found = path.stat().st_size
            if found != size:
                raise TargetError(f"{path}: {found} bytes, expected {size}")
            if self.has_blob(digest, size):
                path.unlink()
                return
            path.chmod(0o644)
            sync_file(path)
            path.rename(self._path / blob_member(digest))

    def put_bytes(self, data: bytes, digest: Digest) -> None:
        if not self.has_blob(digest, len(data)):
            path = self.staging_dir / digest.hex
            with os_errors(self.name):
                path.write_bytes(data)
            self.put_blob(path, digest, len(data))

    def mount_blob(self, digest: Digest, size: int, other_identity: str) -> bool:
        if self.has_blob(digest, size):
            return True
        if not other_identity.startswith("oci:"):
            return False
        other = Path(other_identity.removeprefix("oci:")) / blob_member(digest)
        self.staging_dir  # noqa: B018 - makes the directories
        try:
            if not _holds(other, digest, size):
                return False
            with contextlib.suppress(FileExistsError):
                (self._path / blob_member(digest)).hardlink_to(other.resolve())
        except OSError as error:
            if error.errno in _ANOTHER_FILE_SYSTEM:
                return False
            raise TargetError(f"{self.name}: {error.strerror}") from error
        return True

    def put_document(self, document: Document) -> None:
        self.put_bytes(document.data, document.digest)

    def commit(self, document: Document) -> None:
        self.put_document(document)
        self.staging_dir  # noqa: B018 - makes the directories, if put_document had nothing to do
        with os_errors(self.name), file_lock(self._path / _LOCK_FILE):
            sync_directory(self._blobs())
            index = self._read_raw_index()
            index["manifests"] = [*self._other_entries(index), self._entry(document)]
            write_file(self._path / INDEX_FILE, msgspec.json.encode(index))

    def _read_raw_index(self) -> dict[str, Any]:
        """index.json with all its keys; a new one if there is none."""
        try:
            data = (self._path / INDEX_FILE).read_bytes()
        except FileNotFoundError:
            return {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []}
        try:
            index = msgspec.json.decode(data[: INDEX_BYTES_MAX + 1])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(f"{self._path / INDEX_FILE}: not the JSON expected") from error
        if not isinstance(index, dict):
            raise FormatError(f"{self._path / INDEX_FILE}: not a JSON object")
        return index

    def _other_entries(self, index: dict[str, Any]) -> list[Any]:
        entries = index.get("manifests") or []
        if not isinstance(entries, list):
            raise FormatError(f"{self._path / INDEX_FILE}: its manifests are no list")
        return [entry for entry in entries if _tag_of(entry) != self._reference.tag]

    def _entry(self, document: Document) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "mediaType": document.media_type, "digest": str(document.digest), "size": len(document.data)}
        if self._reference.tag:
            entry["annotations"] = {REF_NAME: self._reference.tag}
        return entry

    def close(self) -> None:
        if self._staging is not None:
            self._staging.close()
            self._staging = None


def _holds(path: Path, digest: Digest, size: int) -> bool:
    """Whether the file is that blob. It is read whole: a damaged blob must be written anew, not handed on."""
    try:
        if path.stat().st_size != size:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest.hex
    except OSError:
        return False


def _tag_of(entry: object) -> str:
    annotations = entry.get("annotations") if isinstance(entry, dict) else None
    tag = annotations.get(REF_NAME, "") if isinstance(annotations, dict) else ""
    return tag if isinstance(tag, str) else ""
