"""
What to put into Authorization: Basic, or a Bearer token for the scope, fetched and refreshed.

Layer: registry; used by client.py. Distribution's token specification (GET with Basic) and its OAuth2 form (POST with a
refresh token). Invariants: one thread at a time asks for a scope's token, the others wait for its result, be it a token
or a refusal; a token is renewed before it expires, after a 401, and after a 403 where that may help; credentials that
were refused are replaced by what the keychain has besides; the registry's credentials go to the registry's own origin,
and to the token realm only over https, or to the registry's own host, or where --insecure or a registry on this
machine makes plain http acceptable; redirects of a token server are refused (go-containerregistry #2291: one led to
169.254.169.254).
"""

from __future__ import annotations

import copy
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlencode, urlsplit

import msgspec

from lazyfs import shapes
from lazyfs.errors import AuthError, DeadlineError, LazyfsError, SourceError
from lazyfs.limits import TOKEN_BYTES_MAX
from lazyfs.registry.addresses import is_loopback_host, origin_of, printable
from lazyfs.registry.challenge import Challenge, merge_scopes, parse_challenges
from lazyfs.registry.credentials import Credentials
from lazyfs.registry.keychain import Keychain
from lazyfs.registry.options import Secret
from lazyfs.registry.status import raise_for_status
from lazyfs.registry.transport import Call

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lazyfs.registry.addresses import Reach
    from lazyfs.registry.endpoint import Endpoint
    from lazyfs.registry.options import RegistryOptions
    from lazyfs.registry.transport import Transport

_LIFETIME_DEFAULT_S = 60.0   # token specification: if the server does not say
_LIFETIME_MAX_S = 24 * 3600.0
_MARGIN_FRACTION = 0.2       # of the lifetime: renew that early, at most
_MARGIN_MAX_S = 30.0
_YOUNG_S = 5.0               # a 403 to a token of this age speaks of rights, not of time
_REFUSED_COUNT_MAX = 4       # credentials tried for one token: as many as there are sources
_SCOPE_COUNT_MAX = 256       # tokens kept; mounts and conversions use two or three
_TOKEN_CHARS = frozenset(map(chr, range(33, 127)))  # a header's value must not be split


class _TokenAnswer(msgspec.Struct):
    token: str = ""
    access_token: str = ""
    expires_in: float | None = None


@dataclass(frozen=True, slots=True)
class _Grant:
    """A value for Authorization; when it was given, and when to renew it (time.monotonic())."""

    value: Secret
    made_at: float
    renew_at: float


class Authenticator:
    """The credentials of one repository's client. Thread-safe."""

    def __init__(self, endpoint: Endpoint, repository: str, options: RegistryOptions, transport: Transport) -> None:
        self._endpoint = endpoint
        self._repository = repository
        self._options = options
        self._transport = transport
        self._keychain = Keychain(options)
        self._lock = threading.Lock()
        self._grants: dict[str, _Grant] = {}
        self._bearers: dict[str, Challenge] = {}
        self._failures: dict[str, tuple[float, SourceError]] = {}
        self._credentials: Credentials | None = None

    def authorization(self, scope: str, deadline: float) -> Secret | None:
        """What to send for `scope`; None while nothing was demanded. Renews a token that is about to expire."""
        if self._options.shown:
            return self._options.shown
        grant = self._grants.get(scope)
        if grant is None or time.monotonic() < grant.renew_at:
            return grant.value if grant else None
        asked_at = self._acquire(deadline)
        try:
            grant = self._grants.get(scope)
            bearer = self._bearers.get(scope)
            if grant is None or bearer is None or time.monotonic() < grant.renew_at:
                return grant.value if grant else None
            return self._fetch(bearer, scope, deadline, asked_at)
        finally:
            self._lock.release()

    def renew(self, challenges: Iterable[str], scope: str, rejected: Secret | None, deadline: float,
              renewal_count: int = 0) -> Secret:
        """
        After a 401 that answered `rejected`: another value for Authorization.

        Args:
            challenges: of the 401.
            scope: of the token.
            rejected: what it answered.
            deadline: for all of it.
            renewal_count: how often this request's value was renewed already. From the first on the credentials
                themselves are in doubt.

        Raises:
            AuthError: there are no credentials, or these were refused too.

        """
        if self._options.shown:
            raise self._refusal("refused what was shown as proof")
        asked_at = self._acquire(deadline)
        try:
            grant = self._grants.get(scope)
            if grant is not None and grant.value != rejected and time.monotonic() < grant.renew_at:
                return grant.value  # another thread was quicker
            offered = {challenge.scheme: challenge for challenge in reversed(parse_challenges(challenges))}
            if "bearer" in offered:
                if renewal_count:
                    self._change_credentials(renewal_count)
                return self._fetch(offered["bearer"], scope, deadline, asked_at)
            if "basic" in offered:
                return self._basic(scope, rejected)
            known = ", ".join(sorted(offered)) or "nothing"
            raise AuthError(f"{self._endpoint.host}: asks for {known[:100]}, lazyfs knows Basic and Bearer")
        finally:
            self._lock.release()

    def refresh(self, scope: str, rejected: Secret, deadline: float) -> bool:
        """After a 403 that answered `rejected`: whether there is another value now. Raises DeadlineError only."""
        asked_at = self._acquire(deadline)
        try:
            grant, bearer = self._grants.get(scope), self._bearers.get(scope)
            if grant is None or grant.value != rejected:
                return grant is not None
            if bearer is not None and time.monotonic() - grant.made_at > _YOUNG_S:
                return self._fetch(bearer, scope, deadline, asked_at) != rejected
            fresh = self._keychain.find(self._endpoint.host, self._repository, self._refused())
            if fresh is None:
                return False
            self._credentials = fresh
            value = self._basic(scope, rejected) if bearer is None else self._fetch(bearer, scope, deadline, asked_at)
        except DeadlineError:
            raise
        except LazyfsError:
            return False
        else:
            return value != rejected
        finally:
            self._lock.release()

    def _acquire(self, deadline: float) -> float:
        """Wait for one's turn; the time at which the wait began."""
        asked_at = time.monotonic()
        if not self._lock.acquire(timeout=max(deadline - asked_at, 0)):
            raise DeadlineError(f"{self._endpoint.host}: no token in time")
        return asked_at

    def _remember(self, scope: str, grant: _Grant, bearer: Challenge | None) -> Secret:
        if len(self._grants) >= _SCOPE_COUNT_MAX:
            self._grants.clear()
            self._bearers.clear()
        self._grants[scope] = grant
        self._failures.pop(scope, None)
        if bearer is not None:
            self._bearers[scope] = bearer
        return grant.value

    # --- credentials ----------------------------------------------------------------------------------------------

    def _refused(self) -> list[Credentials]:
        return [] if self._credentials is None else [self._credentials]

    def _look_up(self) -> Credentials | None:
        """What is known. Nothing is looked for again: it may have come since."""
        if self._credentials is None:
            self._credentials = self._keychain.find(self._endpoint.host, self._repository)
        return self._credentials

    def _change_credentials(self, renewal_count: int) -> None:
        """The registry refused a token just made: with other credentials, if there are."""
        fresh = None
        if renewal_count < _REFUSED_COUNT_MAX:
            fresh = self._keychain.find(self._endpoint.host, self._repository, self._refused())
        if fresh is None:
            raise AuthError(f"{self._endpoint.host}/{self._repository}: the registry refuses its own token",
                            hint="the credentials may lack the right to this image, or the clocks differ")
        self._credentials = fresh

    def _basic(self, scope: str, rejected: Secret | None) -> Secret:
        """A name and password that is not `rejected`; those that are no such pair are passed over."""
        credentials, refused = self._look_up(), list[Credentials]()
        while credentials is not None and len(refused) < _REFUSED_COUNT_MAX:
            if credentials.username and credentials.basic() != rejected:
                self._credentials = credentials
                return self._remember(scope, _Grant(credentials.basic(), time.monotonic(), float("inf")), None)
            refused.append(credentials)
            credentials = self._keychain.find(self._endpoint.host, self._repository, refused)
        raise self._refusal("wants a user name and password" if rejected is None
                            else "refused the user name or password")

    def _refusal(self, what: str) -> AuthError:
        host = self._endpoint.host
        return AuthError(f"{host}/{self._repository}: the registry {what}",
                         hint=f"give --username and the password, or run docker login {host}; docs/credentials.md")

    # --- bearer ---------------------------------------------------------------------------------------------------

    def _fetch(self, bearer: Challenge, scope: str, deadline: float, asked_at: float) -> Secret:
        """
        A new token, from the realm that the challenge names; with the next credentials where the first are refused.

        `asked_at`: when the caller began to wait. A failure since then is the answer to it too.
        """
        failed_at, failure = self._failures.get(scope, (0.0, None))
        if failure is not None and failed_at > asked_at:
            raise copy.copy(failure)
        credentials, refused = self._look_up(), list[Credentials]()
        while True:
            try:
                grant = self._ask(bearer, scope, credentials, deadline)
            except AuthError as error:
                if credentials is not None:
                    refused.append(credentials)
                fresh = None
                if len(refused) < _REFUSED_COUNT_MAX:
                    fresh = self._keychain.find(self._endpoint.host, self._repository, refused)
                if fresh is None:
                    self._failures[scope] = (time.monotonic(), error)
                    raise
                credentials = fresh
            except SourceError as error:
                if not isinstance(error, DeadlineError):   # that is the deadline of this caller only
                    self._failures[scope] = (time.monotonic(), error)
                raise
            else:
                self._credentials = credentials
                return self._remember(scope, grant, bearer)

    def _ask(self, bearer: Challenge, scope: str, credentials: Credentials | None, deadline: float) -> _Grant:
        realm = bearer.parameters.get("realm", "")
        reach = self._check_realm(realm, deadline)
        fields = [("service", bearer.parameters["service"])] if "service" in bearer.parameters else []
        scopes = merge_scopes(scope, bearer.parameters.get("scope", ""))
        asked_at = time.monotonic()
        if credentials is not None and credentials.identity_token:
            form = [("grant_type", "refresh_token"), *fields, ("client_id", "lazyfs"), ("scope", scopes),
                    ("refresh_token", credentials.identity_token.reveal())]
            body = urlencode(form).encode()
            call = Call("POST", realm, {"Content-Type": "application/x-www-form-urlencoded"}, body, len(body),
                        reach=reach)
        else:
            query = urlencode([*fields, *(("scope", one) for one in scopes.split())])
            headers = {}
            if credentials is not None and credentials.username:
                headers["Authorization"] = credentials.basic().reveal()
            call = Call("GET", f"{realm}{'&' if '?' in realm else '?'}{query}", headers, reach=reach)
        return self._read_token(call, asked_at, deadline)

    def _check_realm(self, realm: str, deadline: float) -> Reach:
        """The most private address that it may be at. Raises AuthError if it may not be asked at all."""
        try:
            target = origin_of(realm)
        except SourceError as error:
            raise AuthError(f"{self._endpoint.host}: names no usable token server: {printable(realm)!r}") from error
        if urlsplit(realm).username is not None:
            raise AuthError(f"{self._endpoint.host}: its token server's address holds a user name")
        own = self._endpoint.origin(deadline)
        reach = self._endpoint.may_send_to(target)
        if target.host == own.host and target.scheme in {own.scheme, "https"}:
            return reach
        local = self._endpoint.is_local and is_loopback_host(target.host)
        if target.scheme == "https" or self._options.insecure or local:
            return reach
        raise AuthError(f"{self._endpoint.host}: its token server {printable(realm)} would get credentials in clear",
                        hint="if this network is to be trusted, --insecure allows it")

    def _read_token(self, call: Call, asked_at: float, deadline: float) -> _Grant:
        with self._transport.send(call, deadline) as answer:
            if answer.status in {400, 401, 403}:
                answer.finish()
                raise self._refusal("has a token server that refused the credentials, or their right to this image")
            if answer.status != 200:
                raise_for_status(answer, "token")
            data = answer.read_all(TOKEN_BYTES_MAX)
        try:
            token = shapes.from_json(data, _TokenAnswer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise AuthError(f"{call.where}: the token server's answer is not the JSON expected") from None
        text = token.token or token.access_token
        if not text or not _TOKEN_CHARS.issuperset(text):
            raise AuthError(f"{call.where}: the token server's answer holds no token")
        lifetime_s = token.expires_in if token.expires_in is not None else _LIFETIME_DEFAULT_S
        lifetime_s = min(max(lifetime_s, 0.0), _LIFETIME_MAX_S)
        margin_s = min(lifetime_s * _MARGIN_FRACTION, _MARGIN_MAX_S)
        return _Grant(Secret(f"Bearer {text}"), asked_at, asked_at + lifetime_s - margin_s)
