"""
oci: and oci-archive: as sources: an image layout, in a directory or in a tar.

Layer: registry. Who calls: opening.py, layoutwrite.py, archive.py. OCI image-spec v1.1 image-layout.md. A tag is the
annotation org.opencontainers.image.ref.name of an entry of index.json.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from lazyfs import shapes
from lazyfs.errors import DeadlineError, FormatError, NotFoundError, UnsupportedError, UsageError
from lazyfs.image.artifact import is_referrers_tag
from lazyfs.image.digest import Digest
from lazyfs.limits import KIB, MANIFEST_BYTES_MAX
from lazyfs.registry.documents import make_document
from lazyfs.registry.fileblobs import FileBlobs
from lazyfs.registry.files import Files, TarFiles, read_small

if TYPE_CHECKING:
    from lazyfs.registry.files import Extent
    from lazyfs.registry.place import Document
    from lazyfs.registry.reference import FileReference

REF_NAME = "org.opencontainers.image.ref.name"  # annotations.md
LAYOUT_FILE = "oci-layout"
INDEX_FILE = "index.json"
LAYOUT_BYTES = b'{"imageLayoutVersion":"1.0.0"}'
INDEX_BYTES_MAX = MANIFEST_BYTES_MAX
_SHOWN_TAGS = 10


class IndexEntry(msgspec.Struct):
    """A descriptor of index.json."""

    digest: str
    size: int
    mediaType: str = ""  # noqa: N815 - the document's key
    annotations: dict[str, str] | None = None

    @property
    def tag(self) -> str:
        return (self.annotations or {}).get(REF_NAME, "")


class _Index(msgspec.Struct):
    manifests: list[IndexEntry] | None = None


class _Layout(msgspec.Struct):
    imageLayoutVersion: str  # noqa: N815 - the document's key


def blob_member(digest: Digest) -> str:
    return f"blobs/sha256/{digest.hex}"


def check_layout(files: Files) -> None:
    """Raises NotFoundError if there is no layout, UnsupportedError if it is a later kind."""
    try:
        data = read_small(files, LAYOUT_FILE, 64 * KIB)
    except NotFoundError:
        is_saved = isinstance(files, TarFiles) and "manifest.json" in files.members
        raise NotFoundError(f"{files.name}: no OCI image layout there (no {LAYOUT_FILE})",
                            hint="try docker-archive:" if is_saved else "check the path") from None
    try:
        version = shapes.from_json(data, _Layout).imageLayoutVersion
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{files.name}: {LAYOUT_FILE} is not the JSON expected") from error
    if not version.startswith("1."):
        raise UnsupportedError(f"{files.name}: image layout version {version[:30]!r}, lazyfs knows 1")


def read_index(files: Files) -> list[IndexEntry]:
    """The entries of index.json. Raises NotFoundError, FormatError."""
    data = read_small(files, INDEX_FILE, INDEX_BYTES_MAX)
    try:
        return shapes.from_json(data, _Index).manifests or []
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{files.name}: {INDEX_FILE} is not the JSON expected") from error


class LayoutSource(FileBlobs):
    """place.ImageSource over the files of an image layout; owns `files`."""

    def __init__(self, files: Files, reference: FileReference) -> None:
        self._files = files
        self._reference = reference

    @property
    def name(self) -> str:
        return self._reference.text

    def root(self) -> Document:
        check_layout(self._files)
        if self._reference.digest is not None:
            return self.document(self._reference.digest)
        return self.entry_document(self._choose(read_index(self._files)))

    def entry_document(self, entry: IndexEntry) -> Document:
        """The document that an entry of index.json names."""
        return self._document(Digest(entry.digest), entry.mediaType)

    def _choose(self, entries: list[IndexEntry]) -> IndexEntry:
        wanted = self._reference.tag
        chosen = [entry for entry in entries if (entry.tag == wanted if wanted else not is_referrers_tag(entry.tag))]
        if len({entry.digest for entry in chosen}) == 1:
            return chosen[0]
        tags = ", ".join(sorted({entry.tag for entry in entries if entry.tag})[:_SHOWN_TAGS]) or "none"
        if not chosen:
            what = f"no image tagged {wanted!r}" if wanted else "no image"
            raise NotFoundError(f"{self.name}: {what}; tags there: {tags}", hint="check the tag")
        raise UsageError(f"{self.name}: several images; tags there: {tags}",
                         hint=f"add one: {self._reference.transport.value}:{self._reference.path}:TAG")

    def document(self, digest: Digest) -> Document:
        return self._document(digest, "")

    def referrers(self, subject: Digest, artifact_type: str, deadline: float) -> None:
        """Of referrers.ReferrersPlace: files have no API."""

    def named(self, name: str | Digest, deadline: float) -> Document:
        """Of referrers.ReferrersPlace."""
        if time.monotonic() >= deadline:
            raise DeadlineError(f"{self.name}: no time left")
        if isinstance(name, Digest):
            return self.document(name)
        for entry in read_index(self._files):
            if entry.tag == name:
                return self.entry_document(entry)
        raise NotFoundError(f"{self.name}: no image tagged {name!r}")

    def _document(self, digest: Digest, media_type: str) -> Document:
        data = read_small(self._files, blob_member(digest), MANIFEST_BYTES_MAX)
        return make_document(data, media_type, digest, self.name)

    def _locate(self, digest: Digest) -> Extent:
        return self._files.locate(blob_member(digest))

    def close(self) -> None:
        self._files.close()
