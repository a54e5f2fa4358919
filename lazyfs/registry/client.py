"""
One repository of a registry: requests with credentials, redirects and errors understood.

Layer: registry; used by remote.py and upload.py. Distribution-spec v1.1. Invariants: Authorization is sent to the
registry's own origin only (scheme, host and port), never to where a redirect leads; https never falls to http; at
most REDIRECT_COUNT_MAX redirects; at most one new token a request. Nothing is retried here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import urlencode, urlsplit

import msgspec

from lazyfs.errors import AuthError, FormatError, SourceError
from lazyfs.image.digest import Digest
from lazyfs.limits import MANIFEST_BYTES_MAX, REDIRECT_COUNT_MAX
from lazyfs.registry.addresses import Origin, origin_of, printable, resolve
from lazyfs.registry.auth import Authenticator
from lazyfs.registry.documents import ACCEPT, make_document
from lazyfs.registry.endpoint import Endpoint
from lazyfs.registry.status import raise_for_status
from lazyfs.registry.transport import Call, HttpResponse, Transport

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import IO

    from lazyfs.registry.options import RegistryOptions
    from lazyfs.registry.place import Document

_REDIRECTS: Final = {301, 302, 303, 307, 308}
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\Z")
_TAGS_BYTES_MAX = 4 * 1024 * 1024
TAG_PAGE_COUNT = 100


class _TagList(msgspec.Struct):
    tags: list[str] | None = None


class RegistryClient:
    """Requests about one repository. Thread-safe."""

    def __init__(self, host: str, repository: str, options: RegistryOptions) -> None:
        self.host = host
        self.repository = repository
        self.options = options
        self.transport = Transport(options)
        self.endpoint = Endpoint(host, options, self.transport)
        self._auth = Authenticator(self.endpoint, repository, options, self.transport)

    def close(self) -> None:
        self.transport.close()

    def scope(self, *, push: bool = False, other: str = "") -> str:
        """The token scope for this repository, and for pulling from another one."""
        own = f"repository:{self.repository}:pull{',push' if push else ''}"
        return f"{own} repository:{other}:pull" if other else own

    def url(self, path: str, deadline: float) -> str:
        return f"{self.endpoint.base(deadline)}/v2/{self.repository}/{path}"

    # --- sending --------------------------------------------------------------------------------------------------

    def send(
        self, method: str, url: str, deadline: float, *, scope: str = "", headers: Mapping[str, str] | None = None,
        body: bytes | IO[bytes] | None = None, body_size: int = 0, io_timeout_s: float | None = None,
    ) -> HttpResponse:
        """
        One request, with credentials where they belong, and redirects of GET and HEAD followed.

        A file as `body` is read from its start. The answer may have any status but a redirect's or 401.

        Raises:
            AuthError: credentials are missing or refused. SourceError: no (sensible) answer.

        """
        scope = scope or self.scope()
        own = self.endpoint.origin(deadline)
        follows = method in {"GET", "HEAD"}
        renewal_count = redirect_count = 0
        while True:
            origin = origin_of(url)
            authorization = self._auth.authorization(scope, deadline) if origin == own else None
            all_headers = dict(headers or {})
            if authorization is not None:
                all_headers["Authorization"] = authorization.reveal()
            if body is not None and not isinstance(body, bytes):
                body.seek(0)
            guarded = origin.host != own.host and not self.endpoint.is_local
            call = Call(method, url, all_headers, body, body_size, io_timeout_s, guarded)
            answer = self.transport.send(call, deadline)
            if answer.status == 401 and origin == own:
                challenges = answer.headers.getlist("WWW-Authenticate")
                answer.finish()
                is_basic = authorization is not None and authorization.reveal().startswith("Basic ")
                if renewal_count > is_basic:  # a password's refusal is explained, or a new one found, by renew()
                    raise AuthError(f"{self.host}/{self.repository}: the registry refuses its own token",
                                    hint="the credentials may lack the right to this image, or the clocks differ")
                renewal_count += 1
                self._auth.renew(challenges, scope, authorization, deadline)
            elif answer.status in _REDIRECTS and follows:
                redirect_count += 1
                url = self._follow(answer, origin, redirect_count)
            else:
                return answer

    def _follow(self, answer: HttpResponse, origin: Origin, redirect_count: int) -> str:
        """Where a redirect leads, if that is acceptable."""
        location = answer.headers.get("Location", "")
        answer.finish()
        if redirect_count > REDIRECT_COUNT_MAX:
            raise SourceError(f"{answer.where}: more than {REDIRECT_COUNT_MAX} redirects", transient=False)
        if not location:
            raise SourceError(f"{answer.where}: a redirect that leads nowhere", transient=False)
        target = resolve(answer.url, location)
        if origin.scheme == "https" and origin_of(target).scheme != "https":
            raise SourceError(f"{answer.where}: redirected from https to {printable(target)}: refused", transient=False)
        return target

    def place(self, answer: HttpResponse, deadline: float) -> str:
        """The absolute URL of an upload, out of Location; a registry behind a TLS proxy may call itself http."""
        location = answer.headers.get("Location", "")
        if not location:
            raise SourceError(f"{answer.where}: no Location for the upload", transient=False)
        target = resolve(answer.url, location)
        own = self.endpoint.origin(deadline)
        found = origin_of(target)
        if own.scheme == "https" and found.scheme == "http":
            if found.host != own.host:
                raise SourceError(f"{answer.where}: upload to {printable(target)}, without TLS: refused",
                                  transient=False)
            parts = urlsplit(target)
            target = f"https://{own.netloc}{parts.path}" + (f"?{parts.query}" if parts.query else "")
        return target

    # --- reading --------------------------------------------------------------------------------------------------

    def manifest(self, reference: str, expected: Digest | None, deadline: float) -> Document:
        """A manifest or index by tag or digest. Raises NotFoundError, AuthError, FormatError, IntegrityError."""
        where = f"{self.host}/{self.repository}{'@' if expected else ':'}{reference}"
        url = self.url(f"manifests/{reference}", deadline)
        with self.send("GET", url, deadline, headers={"Accept": ACCEPT}) as answer:
            if answer.status != 200:
                raise_for_status(answer, where)
            content_type = answer.headers.get("Content-Type", "")
            promised = answer.headers.get("Docker-Content-Digest", "")
            data = answer.read_all(MANIFEST_BYTES_MAX)
        if expected is None and promised.startswith("sha256:"):
            expected = Digest(promised)  # nothing to trust, but it finds bytes that were changed on the way
        return make_document(data, content_type, expected, where)

    def blob(self, digest: Digest, offset: int, size: int, deadline: float, *, is_whole: bool = False) -> HttpResponse:
        """
        An answer whose body is exactly bytes [offset, offset + size) of a blob, as far as its header can tell.

        `is_whole`: [offset, offset + size) reaches to the blob's end; then no range is asked for from offset 0.

        """
        what = f"blob {digest.short} of {self.host}/{self.repository}"
        wants_all = is_whole and offset == 0
        headers = {} if wants_all else {"Range": f"bytes={offset}-{offset + size - 1}"}
        answer = self.send("GET", self.url(f"blobs/{digest}", deadline), deadline, headers=headers)
        try:
            if answer.status == 206 and not wants_all:
                _check_range(answer, what, offset, size)
            elif answer.status == 200:
                _check_whole(answer, what, offset, size, wants_all=wants_all)
            else:
                raise_for_status(answer, what)
        except BaseException:
            answer.close()
            raise
        return answer

    def has_blob(self, digest: Digest, size: int, deadline: float, scope: str) -> bool:
        url = self.url(f"blobs/{digest}", deadline)
        with self.send("HEAD", url, deadline, scope=scope) as answer:
            answer.finish()
            if answer.status == 200:
                return answer.length is None or answer.length == size
            if answer.status != 404:
                raise_for_status(answer, f"blob {digest.short} of {self.host}/{self.repository}")
            return False

    def tags(self, count_max: int, deadline: float) -> list[str]:
        """At most `count_max` tags, in the registry's order (pages are followed)."""
        url = self.url("tags/list?" + urlencode({"n": TAG_PAGE_COUNT}), deadline)
        found: list[str] = []
        for _ in range(count_max // TAG_PAGE_COUNT + 2):
            with self.send("GET", url, deadline) as answer:
                if answer.status != 200:
                    raise_for_status(answer, f"tags of {self.host}/{self.repository}")
                link = answer.headers.get("Link", "")
                found += _decode_tags(answer.read_all(_TAGS_BYTES_MAX), answer.where)
            following = re.match(r'\s*<([^<>]{1,4096})>\s*;[^,]*\brel="?next"?', link)
            if following is None or len(found) >= count_max:
                break
            url = resolve(url, following[1])
            if origin_of(url) != self.endpoint.origin(deadline):
                break
        return found[:count_max]


def _check_range(answer: HttpResponse, what: str, offset: int, size: int) -> None:
    """A 206 must be exactly what was asked for: anything else would put wrong bytes in their place."""
    text = answer.headers.get("Content-Range", "")
    met = _CONTENT_RANGE.match(text.strip())
    who = origin_of(answer.url).netloc
    if met is None or int(met[1]) != offset or int(met[2]) != offset + size - 1:
        raise SourceError(f"{what}: {who} sent range {text[:60]!r}, expected bytes {offset}-{offset + size - 1}")
    if answer.length is not None and answer.length != size:
        raise SourceError(f"{what}: {who} promises {answer.length} bytes for a range of {size}")


def _check_whole(answer: HttpResponse, what: str, offset: int, size: int, *, wants_all: bool) -> None:
    """A 200 will do where everything was wanted: of the right length, or chunked (the stream counts)."""
    if offset == 0 and (answer.length == size or (wants_all and answer.length is None)):
        return
    raise SourceError(f"{what}: {origin_of(answer.url).netloc} sent a whole blob of {answer.length} bytes, "
                      f"expected bytes {offset}..{offset + size}", hint="does it answer range requests?")


def _decode_tags(data: bytes, where: str) -> list[str]:
    try:
        return msgspec.json.decode(data, type=_TagList).tags or []
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{where}: not a list of tags") from error
