"""
What is behind a URL: its size, validator and digest, and ranges of it. Blocking, thread-safe.

Layer: mirror. Who calls: mirror.files (the proxy, and `lazyfs get` by it), mirror.geturl. State: connections. Where
a request may go is decided by addresses (registry.addresses): the first address by who asked (`reach`), a redirect no
further inwards than where it came from, never from https to http. Credentials of the asker (any header that is not on
the short list) stay with the first origin.
"""

from __future__ import annotations

import base64
import binascii
import re
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from lazyfs.errors import FormatError, SourceError, UsageError
from lazyfs.image.digest import Digest
from lazyfs.limits import REDIRECT_COUNT_MAX
from lazyfs.registry.addresses import Reach, origin_of, printable, resolve
from lazyfs.registry.status import raise_for_status
from lazyfs.registry.streams import RangeStream
from lazyfs.registry.transport import Call, Transport

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lazyfs.registry.options import RegistryOptions
    from lazyfs.registry.place import ByteStream
    from lazyfs.registry.transport import HttpResponse

URL_CHARS_MAX: Final = 8192
_TRANSPORT_COUNT_MAX: Final = 64          # hosts with settings of their own
_LOOK_S: Final = 30.0
_REDIRECTS: Final = {301, 302, 303, 307, 308}
_NO_HEAD: Final = {400, 403, 405, 501}    # servers that answer GET only; presigned URLs are good for one method
# Sent on to where a redirect leads as well: they say nothing about who asks.
_HARMLESS: Final = {"range", "if-range", "accept", "accept-language", "if-none-match", "if-modified-since"}
CREDENTIALS: Final = frozenset({"authorization", "cookie", "proxy-authorization"})
# Parts of a query that sign a URL, each time anew; without them it names the same thing (S3, GCS, CloudFront, Azure).
_SIGNING: Final = re.compile(
    r"x-(amz|goog|oss|obs|cos)-|(awsaccesskeyid|googleaccessid|ossaccesskeyid|signature|expires|policy|key-pair-id|"
    r"security-token|se|sig|sv|sr|sp|st|spr|skoid|sktid|skt|ske|sks|skv|ns)\Z", re.IGNORECASE)
# Of a header that is passed on; others would be refused by who writes it, or read as two by who gets it.
_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}\Z")
_VALUE: Final = re.compile(r"(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]{0,8190}[!-~\x80-\xff])?)?\Z")
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\Z")


@dataclass(frozen=True)
class Target:
    """A URL that somebody asks for. `headers`: the asker's; their names in lower case. `reach`: where it may lead."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    reach: Reach = Reach.PRIVATE

    @property
    def where(self) -> str:
        return printable(self.url)

    @property
    def has_credentials(self) -> bool:
        return not CREDENTIALS.isdisjoint(self.headers) or "@" in urlsplit(self.url).netloc

    @property
    def identity(self) -> str:
        """What it names, without what signs it."""
        parts = urlsplit(self.url)
        kept = [(key, value) for key, value in parse_qsl(parts.query, keep_blank_values=True)
                if not _SIGNING.match(key)]
        return urlunsplit((parts.scheme, parts.netloc.lower(), parts.path, urlencode(kept), ""))


@dataclass(frozen=True, slots=True)
class Looked:
    """
    What a server says of it.

    Attributes:
        size: bytes; None: it does not say.
        ranges: it can be asked for parts.
        validator: ETag (strong), or Last-Modified; empty: it can change unseen.
        digest: of the bytes, as the server says; None: it does not.
        headers: of the answer that describe the content, for whoever it is passed on to.

    """

    size: int | None
    ranges: bool
    validator: str
    digest: Digest | None
    headers: Mapping[str, str]

    @property
    def etag(self) -> str:
        return self.validator if self.validator.startswith('"') else ""


def check_url(text: str) -> str:
    """
    An absolute http(s) URL.

    Raises:
        UsageError: it is none.

    """
    try:
        origin_of(text)
        urlsplit(text).geturl().encode("ascii")
    except (SourceError, UnicodeEncodeError):
        raise UsageError(f"not an http or https URL: {printable(text)!r}",
                         hint="https://host/path, anything unusual in it percent-encoded") from None
    if len(text) > URL_CHARS_MAX:
        raise UsageError(f"a URL of {len(text)} characters, expected at most {URL_CHARS_MAX}")
    return text


class Urls:
    """See the module. `options`: authorities and certificates, by host; no credentials are taken from it."""

    def __init__(self, options: RegistryOptions) -> None:
        self._options = options
        self._mutex = threading.Lock()
        self._transports: dict[str, Transport] = {}

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()

    def look(self, target: Target) -> Looked:
        """
        Ask what it is, without its bytes.

        Raises:
            NotFoundError, AuthError, SourceError: it is not to be had.

        """
        deadline = time.monotonic() + _LOOK_S
        answer = self.send(target, "HEAD", {}, deadline)
        if answer.status in _NO_HEAD:
            answer.finish()
            answer = self.send(target, "GET", {"range": "bytes=0-0"}, deadline)
        with answer:
            if answer.status not in {200, 206}:
                raise_for_status(answer, target.where)
            return _looked(answer)

    def send(self, target: Target, method: str, headers: Mapping[str, str], deadline: float,
             body: bytes | None = None) -> HttpResponse:
        """
        One request, redirects of GET and HEAD followed; the answer has any status but a redirect's.

        Raises:
            SourceError: no answer, one that leads where it may not, or whose length nobody can tell.

        """
        url, reach, sent = target.url, target.reach, {**target.headers, **headers}
        first = origin_of(url)
        for _ in range(REDIRECT_COUNT_MAX + 1):
            origin = origin_of(url)
            if origin != first:
                sent = {name: value for name, value in sent.items() if name in _HARMLESS}
            call = Call(method, url, sent, body, len(body or b""), reach=reach)
            answer = self._transport(origin.netloc).send(call, deadline)
            if answer.status not in _REDIRECTS or method not in {"GET", "HEAD"}:
                return _checked(answer)
            location = answer.headers.get("Location", "")
            answer.finish()
            if not location:
                raise SourceError(f"{answer.where}: a redirect that leads nowhere", transient=False)
            url, reach = resolve(url, location), min(reach, answer.reach)
            if origin.scheme == "https" and origin_of(url).scheme != "https":
                raise SourceError(f"{answer.where}: redirected from https to {printable(url)}: refused",
                                  transient=False)
        raise SourceError(f"{target.where}: more than {REDIRECT_COUNT_MAX} redirects", transient=False)

    def _transport(self, netloc: str) -> Transport:
        own = netloc if netloc in self._options.hosts else ""
        with self._mutex:
            found = self._transports.get(own)
            if found is None:
                if len(self._transports) >= _TRANSPORT_COUNT_MAX:
                    own = next(iter(self._transports))
                    self._transports.pop(own).close()
                found = self._transports[netloc if own else ""] = Transport(
                    self._options.for_host(netloc) if own else self._options)
            return found


class UrlOrigin:
    """mirror.fromorigin.Origin: the bytes that `looked` describes, and no others."""

    def __init__(self, urls: Urls, target: Target, looked: Looked) -> None:
        self._urls, self._target, self._looked = urls, target, looked
        self.ranges = looked.ranges

    @property
    def name(self) -> str:
        return self._target.where

    def read_range(self, offset: int, size: int, deadline: float) -> ByteStream:
        headers = {}
        if self.ranges:
            headers["range"] = f"bytes={offset}-{offset + size - 1}"
            if self._looked.validator:
                headers["if-range"] = self._looked.validator
        answer = self._urls.send(self._target, "GET", headers, deadline)
        try:
            if answer.status not in {200, 206}:
                raise_for_status(answer, self.name)
            self._check(answer, offset, size)
            skip = offset if answer.status == 200 else 0
            stream = RangeStream(answer, skip + size)
            while skip:
                skip -= len(stream.read(min(skip, 1 << 20)))
        except BaseException:
            answer.close()
            raise
        return stream

    def _check(self, answer: HttpResponse, offset: int, size: int) -> None:
        found = _looked(answer)
        if (found.size, found.validator) != (self._looked.size, self._looked.validator):
            raise SourceError(f"{self.name}: it has changed meanwhile", transient=False,
                              hint="run the same command again")
        if answer.status == 206:
            met = _CONTENT_RANGE.match(answer.headers.get("Content-Range", ""))
            if met is None or (int(met[1]), int(met[2])) != (offset, offset + size - 1):
                raise SourceError(f"{self.name}: answered with another range than was asked for", transient=False)


def passable(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of an answer that can be said again as they are."""
    return {name: value.strip() for name, value in headers.items()
            if _NAME.match(name) and _VALUE.match(value.strip())}


def _checked(answer: HttpResponse) -> HttpResponse:
    """Raises SourceError: it is none that has an end, or says a length that is none."""
    says_length = "Content-Length" in answer.headers and "Transfer-Encoding" not in answer.headers
    if answer.status >= 200 and (answer.length is not None or not says_length):
        return answer
    answer.close()
    raise SourceError(f"{answer.where}: status {answer.status}, which ends nothing" if answer.status < 200 else
                      f"{answer.where}: a Content-Length that is none", transient=False,
                      hint="look at that server, or at what stands between")


def _looked(answer: HttpResponse) -> Looked:
    headers = answer.headers
    size = answer.length
    ranges = headers.get("Accept-Ranges", "").strip().lower() == "bytes"
    if answer.status == 206:
        met = _CONTENT_RANGE.match(headers.get("Content-Range", ""))
        size, ranges = (int(met[3]) if met and met[3] != "*" else None), True
    if headers.get("Content-Encoding", "identity").strip().lower() not in {"", "identity"}:
        size = None      # of what is behind the encoding nobody knows the size
    etag = headers.get("ETag", "").strip()
    validator = etag if re.fullmatch(r'"[\x21\x23-\x7e]{0,512}"', etag) else headers.get("Last-Modified", "")[:64]
    kept = passable({name: headers[name] for name in (
        "Content-Type", "ETag", "Last-Modified", "Cache-Control", "Content-Disposition", "Docker-Content-Digest",
    ) if name in headers})
    return Looked(size, ranges, validator, _digest(headers), kept)


def _digest(headers: Mapping[str, str]) -> Digest | None:
    """What servers say about the whole's SHA-256: RFC 9530, S3's checksum, the hub of models, registries."""
    for name, pattern in (("Repr-Digest", r"(?:.*,)?\s*sha-256=:([A-Za-z0-9+/=]{44}):.*"),
                          ("x-amz-checksum-sha256", r"([A-Za-z0-9+/=]{44})")):
        met = re.fullmatch(pattern, headers.get(name, ""))
        if met is not None:
            try:
                return Digest(f"sha256:{base64.b64decode(met[1], validate=True).hex()}")
            except (binascii.Error, FormatError):
                continue
    met = re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("X-Linked-Etag", ""))
    return Digest(f"sha256:{met[1]}") if met is not None else None
