"""
One repository of a registry: its documents and blobs, read from mirrors first where there are any.

Layer: registry; used by remote.py and upload.py. Distribution-spec v1.1. Each read goes to the mirrors in their order
(mirrors.py), then to the registry itself; what a push needs goes to the registry alone. An answer is checked as far as
its header can tell before it counts; whoever reads its body tells (HttpResponse.fail) when that was wrong.
Nothing is retried here: another server is not a retry.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import urlencode

import msgspec

from lazyfs import shapes
from lazyfs.errors import (
    AuthError,
    DeadlineError,
    FormatError,
    LazyfsError,
    NotFoundError,
    RateLimitedError,
    SourceError,
)
from lazyfs.image.digest import Digest
from lazyfs.limits import MANIFEST_BYTES_MAX
from lazyfs.registry.addresses import origin_of, resolve
from lazyfs.registry.documents import ACCEPT, make_document
from lazyfs.registry.hedge import Race
from lazyfs.registry.hostclient import HostClient
from lazyfs.registry.hosts import PLAIN, Stamp, find_hosts, stamp
from lazyfs.registry.hoststoml import PULL, RESOLVE
from lazyfs.registry.mirrors import HEALTH
from lazyfs.registry.status import raise_for_status

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import IO

    from lazyfs.registry.endpoint import Endpoint
    from lazyfs.registry.options import RegistryOptions, Secret
    from lazyfs.registry.place import Document
    from lazyfs.registry.transport import HttpResponse, Transport

T = TypeVar("T")
_log: Final = logging.getLogger("lazyfs.registry")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\Z")
_TAGS_BYTES_MAX = 4 * 1024 * 1024
TAG_PAGE_COUNT = 100
_LOOK_EVERY_S = 5.0          # whether hosts.toml has changed
_MIRROR_TIME_SHARE = 0.5     # of what is left, for the header of an answer: the next one needs time as well
_MIRROR_S_MAX = 15.0
_BLAME_S_MIN = 1.0           # who had less time than this is not to blame for being late


class _TagList(msgspec.Struct):
    tags: list[str] | None = None


class RegistryClient:
    """
    Requests about one repository. Thread-safe.

    `through_mirrors`: False for a destination, which must see what it holds itself.
    """

    def __init__(self, host: str, repository: str, options: RegistryOptions, *, through_mirrors: bool = True) -> None:
        """Raises UsageError: what hosts.toml says is wrong, or a certificate cannot be used."""
        self.host = host
        self.repository = repository
        self.options = options
        self._through_mirrors = through_mirrors
        self._lock = threading.Lock()
        self._stamp = Stamp()
        self._look_at = 0.0
        self._mirrors: tuple[HostClient, ...] = ()
        self._own = self._set_up()

    def _set_up(self) -> HostClient:
        self._stamp = stamp(self.options.hosts_dir, self.host)
        self._look_at = time.monotonic() + _LOOK_EVERY_S
        found = find_hosts(self.options.hosts_dir, self.host) if self._stamp != Stamp() else PLAIN
        make = partial(HostClient, host=self.host, repository=self.repository, options=self.options)
        own = make(found.server, is_last=True)
        try:
            mirrors = found.mirrors if self._through_mirrors else ()
            self._mirrors = tuple(make(entry, is_last=False) for entry in mirrors)
        except BaseException:
            own.close()
            raise
        return own

    def _hosts(self) -> tuple[HostClient, ...]:
        """The mirrors and the registry, in order; anew when hosts.toml has changed."""
        if self.options.hosts_dir is not None and time.monotonic() >= self._look_at:
            with self._lock:
                if time.monotonic() >= self._look_at and stamp(self.options.hosts_dir, self.host) != self._stamp:
                    self._change()
                self._look_at = time.monotonic() + _LOOK_EVERY_S
        return (*self._mirrors, self._own)

    def _change(self) -> None:
        """Go on with what hosts.toml says now; if that is wrong, with what it said before."""
        old = (*self._mirrors, self._own)
        try:
            self._own = self._set_up()
        except LazyfsError as error:
            _log.warning("still reading %s as before: %s", self.host, str(error))
            return
        for one in old:
            one.close()   # answers of theirs that are being read stay open

    def close(self) -> None:
        for one in (*self._mirrors, self._own):
            one.close()

    # --- the registry itself --------------------------------------------------------------------------------------

    @property
    def transport(self) -> Transport:
        return self._own.transport

    @property
    def endpoint(self) -> Endpoint:
        return self._own.endpoint

    def scope(self, *, push: bool = False, other: str = "") -> str:
        """The token scope for this repository, and for pulling from another one."""
        own = f"repository:{self.repository}:pull{',push' if push else ''}"
        return f"{own} repository:{other}:pull" if other else own

    def url(self, path: str, deadline: float) -> str:
        return self._own.url(path, deadline)

    def send(
        self, method: str, url: str, deadline: float, *, scope: str = "", headers: Mapping[str, str] | None = None,
        body: bytes | IO[bytes] | None = None, body_size: int = 0, io_timeout_s: float | None = None,
    ) -> HttpResponse:
        """One request to the registry itself: HostClient.send()."""
        return self._own.send(method, url, deadline, scope=scope, headers=headers, body=body, body_size=body_size,
                              io_timeout_s=io_timeout_s)

    def place(self, answer: HttpResponse, deadline: float) -> str:
        """HostClient.place()."""
        return self._own.place(answer, deadline)

    # --- whom to ask ----------------------------------------------------------------------------------------------

    def _first(self, capability: str, deadline: float, attempt: Callable[[HostClient, float], T]) -> T:
        """
        attempt(server, its deadline) of the first server that gives a result.

        Raises:
            LazyfsError: the registry's own; a mirror's where that says more, because another try may help.

        """
        able = [one for one in self._hosts() if capability in one.capabilities]
        hosts = HEALTH.in_order(able)
        if not hosts:
            raise SourceError(f"{self.host}/{self.repository}: hosts.toml names no server that may {capability}",
                              transient=False)
        errors: dict[HostClient, LazyfsError] = {}
        for one in hosts:
            if one in errors:
                continue   # asked already, as the second one
            started = time.monotonic()
            is_last = one is hosts[-1]
            left_s = deadline - started
            until = deadline if is_last else started + min(left_s * _MIRROR_TIME_SHARE, _MIRROR_S_MAX)
            beside = None if is_last else next((other for other in hosts[hosts.index(one) + 1 :]
                                                if other not in errors and HEALTH.is_well(other)), None)
            try:
                return _ask(attempt, one, until, beside, errors)
            except LazyfsError as error:
                errors[one] = error.with_traceback(None)   # else this frame would hold itself, and the answer
                if len(hosts) > 1:
                    _blame(one, error, until - started)
                if time.monotonic() >= deadline:
                    break
        raise _most_telling(errors, hosts[-1] if self._own not in errors else self._own)

    # --- reading --------------------------------------------------------------------------------------------------

    def manifest(self, reference: str, expected: Digest | None, deadline: float) -> Document:
        """A manifest or index by tag or digest. Raises NotFoundError, AuthError, FormatError, IntegrityError."""
        where = f"{self.host}/{self.repository}{'@' if expected else ':'}{reference}"

        def attempt(server: HostClient, until: float) -> Document:
            wanted = expected
            url = server.url(f"manifests/{reference}", until)
            with server.send("GET", url, until, headers={"Accept": ACCEPT}) as answer:
                if answer.status != 200:
                    raise_for_status(answer, where)
                content_type = answer.headers.get("Content-Type", "")
                promised = answer.headers.get("Docker-Content-Digest", "")
                data = answer.read_all(MANIFEST_BYTES_MAX)
            if wanted is None and promised.startswith("sha256:"):
                wanted = Digest(promised)  # nothing to trust, but it finds bytes that were changed on the way
            return make_document(data, content_type, wanted, where)

        return self._first(RESOLVE if expected is None else PULL, deadline, attempt)

    def head(self, path: str, deadline: float, *, resolves: bool = False) -> Mapping[str, str]:
        """
        The header of the answer to HEAD, of `blobs/DIGEST` or `manifests/REFERENCE`; `resolves`: that is a tag.

        Raises:
            NotFoundError, AuthError, SourceError: it has another status than 200, or did not come.

        """
        def attempt(server: HostClient, until: float) -> Mapping[str, str]:
            with server.send("HEAD", server.url(path, until), until, headers={"Accept": ACCEPT}) as answer:
                answer.finish()
                if answer.status != 200:
                    raise_for_status(answer, f"{path} of {self.host}/{self.repository}")
                return answer.headers

        return self._first(RESOLVE if resolves else PULL, deadline, attempt)

    def blob(self, digest: Digest, offset: int, size: int, deadline: float, *, is_whole: bool = False) -> HttpResponse:
        """
        An answer whose body is exactly bytes [offset, offset + size) of a blob, as far as its header can tell.

        `is_whole`: [offset, offset + size) reaches to the blob's end; then no range is asked for from offset 0.

        """
        what = f"blob {digest.short} of {self.host}/{self.repository}"
        wants_all = is_whole and offset == 0
        headers = {} if wants_all else {"Range": f"bytes={offset}-{offset + size - 1}"}

        def attempt(server: HostClient, until: float) -> HttpResponse:
            answer = server.send("GET", server.url(f"blobs/{digest}", until), until, headers=headers)
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
            answer.set_deadline(deadline)
            answer.server = server.host
            if self._mirrors:
                given_s = deadline - time.monotonic()
                answer.on_failure = lambda error: _blame(server, error, given_s)
            return answer

        return self._first(PULL, deadline, attempt)

    def credential(self, deadline: float) -> Secret | None:
        """What the registry itself gets to see for a pull from this repository; None: it has demanded nothing yet."""
        return self._own.credential(deadline)

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


def _ask(attempt: Callable[[HostClient, float], T], one: HostClient, until: float, beside: HostClient | None,
         errors: dict[HostClient, LazyfsError]) -> T:
    """One server's result; `beside`: asked as well if that takes too long; its error is put into `errors`."""

    def timed(server: HostClient, deadline: float) -> T:
        began = time.monotonic()
        found = attempt(server, deadline)
        HEALTH.praise(server, time.monotonic() - began)
        return found

    if beside is None:
        return timed(one, until)
    other = beside
    started = time.monotonic()
    race: Race[T] = Race(lambda: timed(other, until), HEALTH.hedge_after_s(one), until, lambda: HEALTH.may_hedge(one))
    try:
        return race.run(lambda: timed(one, until))
    finally:
        if race.second_won and HEALTH.beaten(one, time.monotonic() - started):
            _blame(one, SourceError(f"{one.key}: slower than {other.key}, again and again"), until - started)
        if race.second_error is not None:
            errors[other] = race.second_error.with_traceback(None)
            _blame(other, race.second_error, until - started)


def _blame(server: HostClient, error: LazyfsError, given_s: float) -> bool:
    """Remember that a server failed, unless it had next to no time. True: there is another one to ask."""
    if isinstance(error, DeadlineError) and given_s < _BLAME_S_MIN:
        return not server.is_last
    return HEALTH.blame(server, error)


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
        return shapes.from_json(data, _TagList).tags or []
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{where}: not a list of tags") from error


def _most_telling(errors: Mapping[HostClient, LazyfsError], own: HostClient) -> LazyfsError:
    """The registry's error; if it was not reached, and a mirror's may pass, that one."""
    final = errors[own]
    if isinstance(final, NotFoundError | AuthError | RateLimitedError) or (
            isinstance(final, SourceError) and final.transient):
        return final
    return next((one for one in errors.values() if isinstance(one, SourceError) and one.transient), final)
