"""
What to put into Authorization: Basic, or a Bearer token for the scope, fetched and refreshed.

Layer: registry; used by client.py. Distribution's token specification (GET with Basic) and its OAuth2 form (POST with a
refresh token). Invariants: one thread at a time asks for a scope's token, the others wait for its result; a token is
renewed before it expires, and once after a 401; the registry's credentials go to the registry's own origin, and to the
token realm only over https, or to the registry's own host, or where --insecure or a registry on this machine makes
plain http acceptable; redirects of a token server are refused (go-containerregistry #2291: one led to 169.254.169.254).
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlencode, urlsplit

import msgspec

from lazyfs.errors import AuthError, DeadlineError, SourceError
from lazyfs.limits import TOKEN_BYTES_MAX
from lazyfs.registry.addresses import is_loopback_host, origin_of, printable
from lazyfs.registry.challenge import Challenge, merge_scopes, parse_challenges
from lazyfs.registry.credentials import Credentials, find_credentials
from lazyfs.registry.options import Secret
from lazyfs.registry.status import raise_for_status
from lazyfs.registry.transport import Call

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lazyfs.registry.endpoint import Endpoint
    from lazyfs.registry.options import RegistryOptions
    from lazyfs.registry.transport import Transport

_LIFETIME_DEFAULT_S = 60.0   # token specification: if the server does not say
_LIFETIME_MAX_S = 24 * 3600.0
_MARGIN_FRACTION = 0.2       # of the lifetime: renew that early, at most
_MARGIN_MAX_S = 30.0
_SCOPE_COUNT_MAX = 256       # tokens kept; mounts and conversions use two or three
_TOKEN_CHARS = frozenset(map(chr, range(33, 127)))  # a header's value must not be split


class _TokenAnswer(msgspec.Struct):
    token: str = ""
    access_token: str = ""
    expires_in: float | None = None


@dataclass(frozen=True, slots=True)
class _Grant:
    """A value for Authorization, and when to renew it (time.monotonic())."""

    value: Secret
    renew_at: float


class Authenticator:
    """The credentials of one repository's client. Thread-safe."""

    def __init__(self, endpoint: Endpoint, repository: str, options: RegistryOptions, transport: Transport) -> None:
        self._endpoint = endpoint
        self._repository = repository
        self._options = options
        self._transport = transport
        self._lock = threading.Lock()
        self._grants: dict[str, _Grant] = {}
        self._bearers: dict[str, Challenge] = {}
        self._credentials: Credentials | None = None
        self._is_looked_up = False

    def authorization(self, scope: str, deadline: float) -> Secret | None:
        """What to send for `scope`; None while nothing was demanded. Renews a token that is about to expire."""
        grant = self._grants.get(scope)
        if grant is None or time.monotonic() < grant.renew_at:
            return grant.value if grant else None
        self._acquire(deadline)
        try:
            grant = self._grants.get(scope)
            bearer = self._bearers.get(scope)
            if grant is None or bearer is None or time.monotonic() < grant.renew_at:
                return grant.value if grant else None
            return self._fetch(bearer, scope, deadline)
        finally:
            self._lock.release()

    def renew(self, challenges: Iterable[str], scope: str, rejected: Secret | None, deadline: float) -> Secret:
        """
        After a 401 that answered `rejected`: another value for Authorization.

        Raises:
            AuthError: there are no credentials, or these were refused too.

        """
        self._acquire(deadline)
        try:
            grant = self._grants.get(scope)
            if grant is not None and grant.value != rejected and time.monotonic() < grant.renew_at:
                return grant.value  # another thread was quicker
            offered = {challenge.scheme: challenge for challenge in reversed(parse_challenges(challenges))}
            if "bearer" in offered:
                return self._fetch(offered["bearer"], scope, deadline)
            if "basic" in offered:
                return self._basic(scope, rejected)
            known = ", ".join(sorted(offered)) or "nothing"
            raise AuthError(f"{self._endpoint.host}: asks for {known[:100]}, lazyfs knows Basic and Bearer")
        finally:
            self._lock.release()

    def _acquire(self, deadline: float) -> None:
        if not self._lock.acquire(timeout=max(deadline - time.monotonic(), 0)):
            raise DeadlineError(f"{self._endpoint.host}: no token in time")

    def _remember(self, scope: str, grant: _Grant, bearer: Challenge | None) -> Secret:
        if len(self._grants) >= _SCOPE_COUNT_MAX:
            self._grants.clear()
            self._bearers.clear()
        self._grants[scope] = grant
        if bearer is not None:
            self._bearers[scope] = bearer
        return grant.value

    def _look_up(self, *, again: bool = False) -> Credentials | None:
        """`again`: a helper's secret may have been a short-lived one."""
        if again or not self._is_looked_up:
            self._credentials = find_credentials(self._options, self._endpoint.host, self._repository)
            self._is_looked_up = True
        return self._credentials

    # --- basic ----------------------------------------------------------------------------------------------------

    def _basic(self, scope: str, rejected: Secret | None) -> Secret:
        credentials = self._look_up()
        if credentials is not None and credentials.username and credentials.basic() == rejected:
            credentials = self._look_up(again=True)
        if credentials is None or not credentials.username:
            raise self._refusal("wants a user name and password")
        value = credentials.basic()
        if value == rejected:
            raise self._refusal("refused the user name or password")
        return self._remember(scope, _Grant(value, float("inf")), None)

    def _refusal(self, what: str) -> AuthError:
        host = self._endpoint.host
        return AuthError(f"{host}/{self._repository}: the registry {what}",
                         hint=f"give --username and the password, or run docker login {host}")

    # --- bearer ---------------------------------------------------------------------------------------------------

    def _fetch(self, bearer: Challenge, scope: str, deadline: float) -> Secret:
        """A new token, from the realm that the challenge names; once more with credentials looked up anew."""
        credentials = self._look_up()
        try:
            grant = self._ask(bearer, scope, credentials, deadline)
        except AuthError:
            fresh = self._look_up(again=True)
            if fresh == credentials:
                raise
            grant = self._ask(bearer, scope, fresh, deadline)
        return self._remember(scope, grant, bearer)

    def _ask(self, bearer: Challenge, scope: str, credentials: Credentials | None, deadline: float) -> _Grant:
        realm = bearer.parameters.get("realm", "")
        guarded = self._check_realm(realm, deadline)
        fields = [("service", bearer.parameters["service"])] if "service" in bearer.parameters else []
        scopes = merge_scopes(scope, bearer.parameters.get("scope", ""))
        asked_at = time.monotonic()
        if credentials is not None and credentials.identity_token:
            form = [("grant_type", "refresh_token"), *fields, ("client_id", "lazyfs"), ("scope", scopes),
                    ("refresh_token", credentials.identity_token.reveal())]
            body = urlencode(form).encode()
            call = Call("POST", realm, {"Content-Type": "application/x-www-form-urlencoded"}, body, len(body),
                        guarded=guarded)
        else:
            query = urlencode([*fields, *(("scope", one) for one in scopes.split())])
            headers = {}
            if credentials is not None and credentials.username:
                headers["Authorization"] = credentials.basic().reveal()
            call = Call("GET", f"{realm}{'&' if '?' in realm else '?'}{query}", headers, guarded=guarded)
        return self._read_token(call, asked_at, deadline)

    def _check_realm(self, realm: str, deadline: float) -> bool:
        """Whether the realm's address must be looked at when dialling. Raises AuthError if it may not be asked."""
        try:
            target = origin_of(realm)
        except SourceError as error:
            raise AuthError(f"{self._endpoint.host}: names no usable token server: {printable(realm)!r}") from error
        if urlsplit(realm).username is not None:
            raise AuthError(f"{self._endpoint.host}: its token server's address holds a user name")
        own = self._endpoint.origin(deadline)
        is_same_host = target.host == own.host
        if is_same_host and target.scheme in {own.scheme, "https"}:
            return False
        local = self._endpoint.is_local
        if target.scheme == "https" or self._options.insecure or (local and is_loopback_host(target.host)):
            return not local
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
            token = msgspec.json.decode(data, type=_TokenAnswer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise AuthError(f"{call.where}: the token server's answer is not the JSON expected") from None
        text = token.token or token.access_token
        if not text or not _TOKEN_CHARS.issuperset(text):
            raise AuthError(f"{call.where}: the token server's answer holds no token")
        lifetime_s = token.expires_in if token.expires_in is not None else _LIFETIME_DEFAULT_S
        lifetime_s = min(max(lifetime_s, 0.0), _LIFETIME_MAX_S)
        margin_s = min(lifetime_s * _MARGIN_FRACTION, _MARGIN_MAX_S)
        return _Grant(Secret(f"Bearer {text}"), asked_at + lifetime_s - margin_s)
