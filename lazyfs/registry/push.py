"""
docker:// as a destination: an image pushed into a registry.

Layer: registry. Who calls: opening.py. Distribution-spec v1.1 "Push". Blobs and members of an index go up by digest,
where nobody sees them; commit() puts the manifest under its tag, and only that makes the image appear.
"""

from __future__ import annotations

import io
import threading
import time
from typing import TYPE_CHECKING

from lazyfs.errors import LazyfsError, NotFoundError, TargetError
from lazyfs.image.artifact import is_referrers_tag
from lazyfs.registry.reference import RegistryReference, parse_reference
from lazyfs.registry.remote import RegistrySource
from lazyfs.registry.retry import with_retries
from lazyfs.registry.staging import Staging, default_parent
from lazyfs.registry.status import raise_for_status
from lazyfs.registry.upload import mount_blob, upload_blob

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lazyfs.image.digest import Digest
    from lazyfs.registry.client import RegistryClient
    from lazyfs.registry.place import Document, ImageSource

DOCUMENT_COUNT_MAX = 64  # place.ImageDestination.documents


class RegistryDestination:
    """place.ImageDestination over a RegistryClient."""

    def __init__(self, client: RegistryClient, reference: RegistryReference) -> None:
        self._client = client
        self._reference = reference
        self._source = RegistrySource(client, reference, is_owner=False)
        self._staging: Staging | None = None
        self._lock = threading.Lock()
        self._scope = client.scope(push=True)

    @property
    def name(self) -> str:
        return self._reference.text

    @property
    def identity(self) -> str:
        return self._reference.identity

    @property
    def staging_dir(self) -> Path:
        with self._lock:
            if self._staging is None:
                self._staging = Staging(default_parent())
            return self._staging.path

    def _deadline(self) -> float:
        return time.monotonic() + self._client.options.request_deadline_s

    def documents(self) -> Iterator[Document]:
        seen = set()
        for tag in self._tags():
            try:
                document = self._client.manifest(tag, None, self._deadline())
            except NotFoundError:
                continue
            except LazyfsError:
                if tag == self._reference.tag:
                    return  # the registry does not answer us: it will not do so 63 times more
                continue
            if document.digest not in seen:
                seen.add(document.digest)
                yield document

    def _tags(self) -> Iterator[str]:
        """Our own tag, then the others; a registry's list has no order, but tags often grow with time."""
        yield self._reference.tag
        try:
            tags = self._client.tags(10 * DOCUMENT_COUNT_MAX, self._deadline())
        except LazyfsError:
            return
        others = sorted({tag for tag in tags if tag != self._reference.tag and not is_referrers_tag(tag)}, reverse=True)
        yield from others[: DOCUMENT_COUNT_MAX - 1]

    def reader(self) -> ImageSource:
        return self._source

    def has_blob(self, digest: Digest, size: int) -> bool:
        deadline = self._deadline()
        return with_retries(lambda: self._client.has_blob(digest, size, deadline, self._scope), deadline,
                            self._client.options.retry_count)

    def put_blob(self, path: Path, digest: Digest, size: int) -> None:
        found = path.stat().st_size
        if found != size:
            raise TargetError(f"{path}: {found} bytes, expected {size}")
        if not self.has_blob(digest, size):
            with path.open("rb") as file:
                upload_blob(self._client, file, digest, size)
        path.unlink()

    def put_bytes(self, data: bytes, digest: Digest) -> None:
        if not self.has_blob(digest, len(data)):
            upload_blob(self._client, io.BytesIO(data), digest, len(data))

    def mount_blob(self, digest: Digest, size: int, other_identity: str) -> bool:
        if not other_identity.startswith("docker://"):
            return False
        other = parse_reference(other_identity)
        if not isinstance(other, RegistryReference) or other.host != self._reference.host:
            return False
        if other.repository == self._reference.repository:
            return self.has_blob(digest, size)
        return with_retries(lambda: mount_blob(self._client, digest, other.repository), self._deadline(),
                            self._client.options.retry_count)

    def put_document(self, document: Document) -> None:
        self._put(document, str(document.digest))

    def commit(self, document: Document) -> None:
        self._put(document, self._reference.tag)

    def _put(self, document: Document, reference: str) -> None:
        deadline = self._deadline()
        client = self._client

        def attempt() -> None:
            url = client.url(f"manifests/{reference}", deadline)
            headers = {"Content-Type": document.media_type}
            with client.send("PUT", url, deadline, scope=self._scope, headers=headers, body=document.data,
                             body_size=len(document.data)) as answer:
                if answer.status not in {200, 201, 202, 204}:
                    raise_for_status(answer, f"push of {self.name}")
                answer.finish()

        with_retries(attempt, deadline, client.options.retry_count)

    def close(self) -> None:
        if self._staging is not None:
            self._staging.close()
            self._staging = None
        self._client.close()
