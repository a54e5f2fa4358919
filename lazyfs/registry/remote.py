"""
docker:// as a source: an image in a registry.

Layer: registry. Who calls: opening.py, push.py. Distribution-spec v1.1 "Pull". Small requests are retried within the
options' deadline; open_blob resumes by itself; read_range does neither (lazyfs.fetch schedules its own attempts).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lazyfs.errors import FormatError, IntegrityError
from lazyfs.limits import BOOTSTRAP_BYTES_MAX
from lazyfs.registry.documents import check_blob
from lazyfs.registry.referrersapi import list_referrers
from lazyfs.registry.retry import with_retries
from lazyfs.registry.streams import BlobStream, FileStream, RangeStream, distrust, read_exactly

if TYPE_CHECKING:
    from lazyfs.image.digest import Digest
    from lazyfs.registry.client import RegistryClient
    from lazyfs.registry.place import ByteStream, Document
    from lazyfs.registry.reference import RegistryReference
    from lazyfs.registry.transport import HttpResponse

EMPTY = FileStream(-1, 0, 0, "empty", is_owner=False)


class RegistrySource:
    """place.ImageSource over a RegistryClient. `is_owner`: close() closes the client as well."""

    def __init__(self, client: RegistryClient, reference: RegistryReference, *, is_owner: bool = True) -> None:
        self._client = client
        self._reference = reference
        self._is_owner = is_owner

    @property
    def name(self) -> str:
        return self._reference.text

    @property
    def server(self) -> str:
        """Who is asked, whatever the image: for fetch.sources."""
        return self._reference.host

    @property
    def origin(self) -> str:
        """For RegistryOptions.origin."""
        return self._client.endpoint.known

    def _deadline(self) -> float:
        return time.monotonic() + self._client.options.request_deadline_s

    def root(self) -> Document:
        reference, deadline = self._reference, self._deadline()
        wanted = str(reference.digest) if reference.digest else reference.tag
        return with_retries(lambda: self._client.manifest(wanted, reference.digest, deadline), deadline,
                            self._client.options.retry_count)

    def document(self, digest: Digest) -> Document:
        deadline = self._deadline()
        return with_retries(lambda: self._client.manifest(str(digest), digest, deadline), deadline,
                            self._client.options.retry_count)

    def referrers(self, subject: Digest, artifact_type: str, deadline: float) -> list[bytes] | None:
        """Of referrers.ReferrersPlace."""
        return with_retries(lambda: list_referrers(self._client, subject, artifact_type, deadline), deadline,
                            self._client.options.retry_count)

    def named(self, name: str | Digest, deadline: float) -> Document:
        """Of referrers.ReferrersPlace."""
        expected = None if isinstance(name, str) else name
        return with_retries(lambda: self._client.manifest(str(name), expected, deadline), deadline,
                            self._client.options.retry_count)

    def open_blob(self, digest: Digest, size: int) -> BlobStream:
        options, client = self._client.options, self._client

        def reopen(offset: int) -> HttpResponse:
            deadline = self._deadline()
            return client.blob(digest, offset, size - offset, deadline, is_whole=True)

        def first() -> BlobStream:
            return BlobStream(reopen, size, io_timeout_s=options.io_timeout_s, patience_s=options.request_deadline_s,
                              retry_count=options.retry_count)

        return with_retries(first, self._deadline(), options.retry_count)

    def read_blob(self, digest: Digest, size: int) -> bytes:
        if size > BOOTSTRAP_BYTES_MAX:
            raise FormatError(f"{self.name}: blob {digest.short} of {size} bytes is too large to be read at once")

        def attempt() -> bytes:
            while True:
                with self.open_blob(digest, size) as stream:
                    data = read_exactly(stream, size)
                try:
                    return check_blob(data, digest, size, self.name)
                except IntegrityError as error:
                    if not distrust(stream, error):   # true once a mirror, for it is not asked again
                        raise

        return with_retries(attempt, self._deadline(), 0)

    def read_range(self, digest: Digest, offset: int, size: int, deadline: float) -> ByteStream:
        assert offset >= 0
        assert size >= 0
        if size == 0:
            return EMPTY
        return RangeStream(self._client.blob(digest, offset, size, deadline), size)

    def close(self) -> None:
        if self._is_owner:
            self._client.close()
