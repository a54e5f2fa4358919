"""
Where images are: the contracts of a source and a destination, whatever the transport.

`docker://` (a registry), `oci:` (an OCI image-layout directory), `oci-archive:` and `docker-archive:` (a tar of one)
all look alike from here. Everything is blocking and thread-safe: the converter and the worker's fetch threads call
it; every call ends, at the latest at its deadline, with its result or with an error of the SourceError family.

Who calls: converter, fetch, cli. Formats: OCI image-spec v1.1, distribution-spec v1.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

from lazyfs.image.descriptor import Descriptor, Document

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from lazyfs.image.digest import Digest

__all__ = ["ByteStream", "Descriptor", "Document", "ImageDestination", "ImageSource"]


class ByteStream(Protocol):
    """Bytes in order. Use as a context manager; closing early is fine."""

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, as soon as some are there; b"" only at the end. Raises SourceError."""
        ...

    def readinto(self, view: memoryview) -> int:
        """The same, into `view`: how many bytes came; 0 only at the end."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ImageSource(Protocol):
    """One repository, directory or archive, opened at one reference."""

    @property
    def name(self) -> str:
        """For messages, as the user wrote it; no secrets."""
        ...

    def root(self) -> Document:
        """The manifest or index that the reference names; digest checked. Raises NotFoundError, AuthError."""
        ...

    def document(self, digest: Digest) -> Document:
        """Another manifest of the same place, by digest; checked."""
        ...

    def open_blob(self, digest: Digest, size: int) -> ByteStream:
        """
        A whole blob, from its start. Resumes by itself after a transient fault. The digest is NOT checked here:
        the caller hashes what it reads; but never more than `size` bytes come.
        """
        ...

    def read_blob(self, digest: Digest, size: int) -> bytes:
        """A whole small blob (config, bootstrap layer), size and digest checked."""
        ...

    def read_range(self, digest: Digest, offset: int, size: int, deadline: float) -> ByteStream:
        """
        Exactly bytes [offset, offset + size) of a blob, or an error; no retries inside.

        The deadline is absolute, in time.monotonic() seconds; it also bounds every later read() of the stream.
        """
        ...

    def close(self) -> None: ...


class ImageDestination(Protocol):
    """Where a converted image goes. Nothing is visible under the reference before commit()."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str:
        """
        The place without the tag, for example `docker://host:5000/repo` or `oci:/abs/dir`: key of the local
        journal of conversions.
        """
        ...

    @property
    def staging_dir(self) -> Path:
        """A private directory (mode 0700) to write blobs in before put_blob; removed by close()."""
        ...

    def documents(self) -> Iterator[Document]:
        """
        Manifests and indexes already here, the reference's own first, then others, newest known first, at most
        64: places to look for layers to reuse. Never raises for an absent or unreadable one: it is skipped.
        """
        ...

    def reader(self) -> ImageSource:
        """The same place for reading (blobs put before commit() are readable)."""
        ...

    def has_blob(self, digest: Digest, size: int) -> bool: ...

    def put_blob(self, path: Path, digest: Digest, size: int) -> None:
        """Take over a finished file of staging_dir (it is gone afterwards). Idempotent by digest."""
        ...

    def put_bytes(self, data: bytes, digest: Digest) -> None:
        """Store a small blob (config, bootstrap)."""
        ...

    def mount_blob(self, digest: Digest, size: int, other_identity: str) -> bool:
        """
        Try to get a blob from another place of the same registry without moving its bytes (cross-repository
        mount) or by hard link. False: not possible, put it.
        """
        ...

    def put_document(self, document: Document) -> None:
        """Store a manifest by digest only (a member of an index)."""
        ...

    def commit(self, document: Document) -> None:
        """Publish: store the manifest or index and make the reference name it, in one atomic step."""
        ...

    def close(self) -> None:
        """Remove staging; without commit() nothing is left under the reference."""
        ...
