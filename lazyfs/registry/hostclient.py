"""
One server and one repository: requests with credentials, redirects understood.

Layer: registry; used by client.py. Distribution-spec v1.1. The server is the registry itself or a mirror of it (then
it is told whose images it is asked for: `?ns=`, and the registry's own credentials are never shown to it). Invariants:
Authorization and the configured headers are sent to the server's own origin only (scheme, host and port), never to
where a redirect leads; https never falls to http; at most REDIRECT_COUNT_MAX redirects; at most RENEWAL_COUNT_MAX new
tokens a request. Nothing is retried here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final
from urllib.parse import urlencode, urlsplit

from lazyfs.errors import SourceError
from lazyfs.limits import REDIRECT_COUNT_MAX
from lazyfs.registry.addresses import Origin, origin_of, printable, resolve
from lazyfs.registry.auth import Authenticator
from lazyfs.registry.endpoint import DOCKER_HUB, DOCKER_HUB_API, Endpoint
from lazyfs.registry.transport import Call, HttpResponse, Transport
from lazyfs.registry.trust import Trust

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import IO

    from lazyfs.registry.hoststoml import HostEntry
    from lazyfs.registry.options import RegistryOptions, Secret

_REDIRECTS: Final = {301, 302, 303, 307, 308}
RENEWAL_COUNT_MAX = 4     # as many sources of credentials as there are


class HostClient:
    """Requests to one server about one repository of registry `host`. Thread-safe."""

    def __init__(self, entry: HostEntry, host: str, repository: str, options: RegistryOptions, *,
                 is_last: bool) -> None:
        """
        The client; nothing is sent. `is_last`: there is nobody to ask after it.

        Raises:
            UsageError: a certificate cannot be used.

        """
        origin = entry.origin
        self.is_own = origin is None or is_same_server(origin, host)
        name = host if self.is_own or origin is None else origin.netloc
        if not self.is_own:
            # The command line speaks of the registry; a mirror is no more than its hosts.toml says.
            options = replace(options, username=None, password=None, insecure=False, client_cert=None, client_key=None)
        options = options.for_host(name)
        if entry.dial_timeout_s is not None:
            options = replace(options, connect_timeout_s=entry.dial_timeout_s)
        self.is_last = is_last
        self.host = name
        self.repository = repository
        self.capabilities = entry.capabilities
        self._prefix = entry.prefix
        self._namespace = "" if self.is_own else host
        self._headers = {key: value.reveal() for key, value in entry.headers}
        self.transport = Transport(options, Trust.of(options, entry))
        self.endpoint = Endpoint(name, options, self.transport, origin)
        self._auth = Authenticator(self.endpoint, repository, options, self.transport)

    @property
    def key(self) -> str:
        """Who is asked: the same for all repositories."""
        return f"{self.host}{self._prefix}"

    def close(self) -> None:
        self.transport.close()

    def url(self, path: str, deadline: float) -> str:
        """The URL of something of this repository, `path` as blobs/..."""
        url = f"{self.endpoint.base(deadline)}{self._prefix}/{self.repository}/{path}"
        if not self._namespace:
            return url
        return f"{url}{'&' if '?' in url else '?'}{urlencode({'ns': self._namespace})}"

    def credential(self, deadline: float) -> Secret | None:
        """What is shown for a pull from this repository, renewed if need be; None: nothing was demanded yet."""
        return self._auth.authorization(f"repository:{self.repository}:pull", deadline)

    # --- sending --------------------------------------------------------------------------------------------------

    def send(
        self, method: str, url: str, deadline: float, *, scope: str = "", headers: Mapping[str, str] | None = None,
        body: bytes | IO[bytes] | None = None, body_size: int = 0, io_timeout_s: float | None = None,
    ) -> HttpResponse:
        """
        One request, with credentials where they belong, and redirects of GET and HEAD followed.

        `scope`: of the token; empty: to pull from this repository. A file as `body` is read from its start. The
        answer may have any status but a redirect's or 401.

        Raises:
            AuthError: credentials are missing or refused. SourceError: no (sensible) answer.

        """
        scope = scope or f"repository:{self.repository}:pull"
        own = self.endpoint.origin(deadline)
        follows = method in {"GET", "HEAD"}
        renewal_count = redirect_count = 0
        while True:
            origin = origin_of(url)
            authorization = self._auth.authorization(scope, deadline) if origin == own else None
            all_headers = {**(self._headers if origin == own else {}), **(headers or {})}
            if authorization is not None:
                all_headers["Authorization"] = authorization.reveal()
            if body is not None and not isinstance(body, bytes):
                body.seek(0)
            call = Call(method, url, all_headers, body, body_size, io_timeout_s, self.endpoint.may_send_to(origin))
            answer = self.transport.send(call, deadline)
            if origin == own:
                self.endpoint.reach = answer.reach
            if answer.status == 401 and origin == own:
                challenges = answer.headers.getlist("WWW-Authenticate")
                answer.finish()
                self._auth.renew(challenges, scope, authorization, deadline, renewal_count)
                renewal_count += 1
            elif (answer.status == 403 and authorization is not None and origin == own and not renewal_count
                  and self._auth.refresh(scope, authorization, deadline)):
                answer.finish()   # some registries answer so where a token is no longer good
                renewal_count += 1
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


def is_same_server(origin: Origin, host: str) -> bool:
    """Whether an address is the registry that `host` names in image references, and no mirror of it."""
    if host == DOCKER_HUB:
        return origin.netloc in {DOCKER_HUB, DOCKER_HUB_API}
    return origin.netloc == host.lower() or f"{origin.host}:{origin.port}" == host.lower()
