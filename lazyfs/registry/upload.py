"""
Bringing a blob into a registry: one upload, its fallbacks, and mounts from a sister repository.

Layer: registry; used by push.py. Distribution-spec v1.1 "Pushing blobs": POST opens an upload, PUT to its Location with
the digest ends it, the whole blob in that PUT's body (monolithic). Where something on the way refuses large bodies
(413), the blob is sent in pieces (PATCH). A try that fails is forgotten and begun anew: the registry expires it.
"""

from __future__ import annotations

import contextlib
import io
import time
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, NoReturn
from urllib.parse import quote

from lazyfs.errors import AuthError, LazyfsError, NotFoundError, SourceError
from lazyfs.limits import KIB, MIB, REQUEST_DEADLINE_S
from lazyfs.registry.retry import with_retries
from lazyfs.registry.status import raise_for_status

if TYPE_CHECKING:
    from lazyfs.image.digest import Digest
    from lazyfs.registry.client import RegistryClient
    from lazyfs.registry.transport import HttpResponse

_LEAST_RATE_BYTES_S = 64 * KIB   # an upload gets as long as it needs at this rate
_COMMIT_TIMEOUT_S = REQUEST_DEADLINE_S  # a registry on S3 copies the blob before it answers
_PIECE_BYTES = 16 * MIB          # what nginx' and cloud front ends' limits let through, mostly
_SMALLER_PLEASE = {405, 411, 413}


@dataclass(frozen=True, slots=True)
class _Blob:
    """`size` bytes of a seekable file."""

    file: IO[bytes]
    digest: Digest
    size: int


def upload_blob(client: RegistryClient, file: IO[bytes], digest: Digest, size: int) -> None:
    """
    Send `size` bytes of a seekable file as the blob `digest`; idempotent.

    Raises:
        SourceError: it did not get there. AuthError: no right to push.

    """
    deadline = time.monotonic() + client.options.request_deadline_s + size / _LEAST_RATE_BYTES_S
    blob = _Blob(file, digest, size)

    def attempt() -> None:
        url = begin(client, deadline)
        if not _put_whole(client, url, blob, deadline):
            _put_pieces(client, begin(client, deadline), blob, deadline)

    with_retries(attempt, deadline, client.options.retry_count)


def begin(client: RegistryClient, deadline: float) -> str:
    """Open an upload; the URL to send to."""
    scope = client.scope(push=True)
    with client.send("POST", client.url("blobs/uploads/", deadline), deadline, scope=scope, body=b"") as answer:
        if answer.status != 202:
            _raise_push(answer, client)
        answer.finish()
        return client.place(answer, deadline)


def _put_whole(client: RegistryClient, url: str, blob: _Blob, deadline: float) -> bool:
    """False: the registry wants smaller bodies."""
    with client.send(
        "PUT", _with_digest(url, blob.digest), deadline, scope=client.scope(push=True),
        body=blob.file, body_size=blob.size,
        headers={"Content-Type": "application/octet-stream"}, io_timeout_s=_commit_timeout_s(client),
    ) as answer:
        if answer.status in _SMALLER_PLEASE:
            return False
        if answer.status not in {201, 202, 204}:
            _raise_push(answer, client)
        answer.finish()
        return True


def _put_pieces(client: RegistryClient, url: str, blob: _Blob, deadline: float) -> None:
    """Distribution-spec "Pushing a blob in chunks"."""
    scope = client.scope(push=True)
    for offset in range(0, blob.size, _PIECE_BYTES):
        blob.file.seek(offset)
        piece = blob.file.read(min(_PIECE_BYTES, blob.size - offset))
        headers = {"Content-Type": "application/octet-stream", "Content-Range": f"{offset}-{offset + len(piece) - 1}"}
        with client.send("PATCH", url, deadline, scope=scope, headers=headers, body=io.BytesIO(piece),
                         body_size=len(piece), io_timeout_s=_commit_timeout_s(client)) as answer:
            if answer.status != 202:
                _raise_push(answer, client)
            answer.finish()
            url = client.place(answer, deadline)
    with client.send("PUT", _with_digest(url, blob.digest), deadline, scope=scope, body=b"",
                     io_timeout_s=_commit_timeout_s(client)) as answer:
        if answer.status not in {201, 204}:
            _raise_push(answer, client)
        answer.finish()


def mount_blob(client: RegistryClient, digest: Digest, other_repository: str) -> bool:
    """
    Ask for a blob of another repository of the same registry; False: it was not given.

    Raises:
        SourceError: the registry cannot be reached (it is worth trying again).

    """
    deadline = time.monotonic() + client.options.request_deadline_s
    url = client.url(f"blobs/uploads/?mount={quote(str(digest))}&from={quote(other_repository)}", deadline)
    try:
        answer = client.send("POST", url, deadline, scope=client.scope(push=True, other=other_repository), body=b"")
    except (AuthError, NotFoundError):
        return False
    with answer:
        answer.finish()
        if answer.status == 202:
            _abandon(client, answer.headers.get("Location", ""), client.place(answer, deadline), deadline)
        return answer.status == 201


def _abandon(client: RegistryClient, location: str, url: str, deadline: float) -> None:
    """Close an upload that the registry opened instead of mounting; if this fails it will expire."""
    with contextlib.suppress(LazyfsError):
        if location:
            with client.send("DELETE", url, deadline, scope=client.scope(push=True)) as answer:
                answer.finish()


def _commit_timeout_s(client: RegistryClient) -> float:
    return max(client.options.io_timeout_s, min(_COMMIT_TIMEOUT_S, client.options.request_deadline_s))


def _with_digest(url: str, digest: Digest) -> str:
    return f"{url}{'&' if '?' in url else '?'}digest={quote(str(digest), safe='')}"


def _raise_push(answer: HttpResponse, client: RegistryClient) -> NoReturn:
    if answer.status == 404:
        answer.finish()
        # An upload that the registry has forgotten (restart, expiry): begin anew.
        raise SourceError(f"{client.host}/{client.repository}: the registry does not know the upload", transient=True)
    raise_for_status(answer, f"push to {client.host}/{client.repository}")
