"""
What the tracker is asked over HTTP, and who answers: requests, answers, routes, errors as answers.

Layer: tracker. Who calls: tracker.conversation asks; tracker.service, and whoever has routes of its own, calls
Routes.add before. No state but the routes.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import trio

from lazyfs.errors import (
    AuthError,
    ConfigError,
    FormatError,
    LazyfsError,
    NotFoundError,
    PeerBusyError,
    PeerRefusedError,
    RateLimitedError,
    SourceError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_BODY_BYTES_MAX = 512 * 1024     # a beat with 2,000 resources; a route may say less or more
ANSWER_S = 30.0                  # to make one, and to send one
_LINE_CHARS_MAX = 500
_FOUND_COUNT_MAX = 1024          # paths: of a beat there is one a cluster
_log = logging.getLogger("lazyfs.tracker.web")


class Answer(NamedTuple):
    """What is sent back."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class Request:
    """
    What came in, whole.

    Attributes:
        path: decoded, without query; `query`: as it was sent.
        headers: names in lower case.
        peer: the client's address, without its port.
        names: what the route's {placeholders} stand for.
        certified: the client has shown a certificate of the authority that the tracker was told of.

    """

    method: str
    path: str
    query: str
    headers: dict[bytes, bytes]
    body: bytes
    peer: str
    names: dict[str, str] = field(default_factory=dict)
    certified: bool = False

    def header(self, name: str) -> str:
        """Empty: it was not sent."""
        return self.headers.get(name.encode(), b"").decode("latin-1")


if TYPE_CHECKING:
    Handler = Callable[[Request], Awaitable[Answer]]
    Guard = Callable[[Request], None]


class _Route(NamedTuple):
    parts: tuple[str, ...]
    handler: Handler
    guard: Guard | None
    body_bytes_max: int


class Routes:
    """
    Who answers what. `guard` is asked before each route that is guarded; it raises PeerRefusedError or AuthError.

    A body that does not come with its head is read only for whom the guard has let in by the head.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._exact: dict[tuple[str, str], _Route] = {}
        self._patterns: dict[tuple[str, int], list[_Route]] = {}
        self.find = lru_cache(_FOUND_COUNT_MAX)(self._find)

    def add(self, method: str, pattern: str, handler: Handler, *, guarded: bool = True,
            guard: Guard | None = None, body_bytes_max: int = _BODY_BYTES_MAX) -> None:
        """
        Have `handler` answer a method at a path.

        Args:
            method: in capitals; HEAD is answered wherever GET is.
            pattern: `/v1/clusters/{cluster}/beat`; a {name} stands for one part, a last {name...} for all the rest.
            handler: may raise any LazyfsError: it becomes a status and one line of text.
            guarded: only for who may use the tracker; False: it is for everybody, or `guard` says.
            guard: another one, for this route. It looks at the head only.
            body_bytes_max: a longer body is refused with 413.

        """
        parts = tuple(pattern.split("/")[1:])
        route = _Route(parts, handler, guard or (self._guard if guarded else None), body_bytes_max)
        if "{" not in pattern:
            self._exact[method, pattern] = route
        else:
            self._patterns.setdefault((method, -1 if parts[-1].endswith("...}") else len(parts)), []).append(route)
        self.find.cache_clear()

    def _find(self, method: str, path: str) -> tuple[_Route, dict[str, str]] | None:
        """
        The route, and what its placeholders stand for (not to be changed: `find` gives it to others as well).

        A path's own name is stronger than a placeholder.
        """
        method = "GET" if method == "HEAD" else method
        exact = self._exact.get((method, path))
        if exact is not None:
            return exact, {}
        given = path.split("/")[1:]
        for count in (len(given), -1):
            for route in self._patterns.get((method, count), ()):
                names = _match(route.parts, given)
                if names is not None:
                    return route, names
        return None

    def refusal_of_body(self, request: Request, size: int) -> Answer | None:
        """Why a body of `size` bytes is not read for a request, of which only the head is here; None: it is."""
        found = self.find(request.method, request.path)
        if found is None:
            return refusal(404, "there is nothing here")
        try:
            if found[0].guard is not None:
                found[0].guard(request)
        except LazyfsError as error:
            return of_error(error)
        most = found[0].body_bytes_max
        return refusal(413, f"more than {most} bytes") if size > most else None

    async def answer(self, request: Request) -> Answer:
        """Never raises an Exception: what goes wrong is an answer too."""
        try:
            found = self.find(request.method, request.path)
            if found is None:
                return refusal(404, "there is nothing here")
            route, request.names = found
            if route.guard is not None:
                route.guard(request)
            with trio.move_on_after(ANSWER_S):
                return await route.handler(request)
            return refusal(503, f"this took longer than {ANSWER_S:g} s")
        except LazyfsError as error:
            return of_error(error)
        except Exception:  # noqa: BLE001 - must not end the tracker
            _log.exception("a request failed: %s %.200s", request.method, request.path)
            return refusal(500, "a fault of the tracker; its log says more")


def _match(parts: tuple[str, ...], given: list[str]) -> dict[str, str] | None:
    names: dict[str, str] = {}
    for index, part in enumerate(parts):
        if part.endswith("...}"):
            names[part[1:-4]] = "/".join(given[index:])
            return names if index < len(given) else None
        if part.startswith("{"):
            names[part[1:-1]] = given[index]
        elif index >= len(given) or part != given[index]:
            return None
    return names


def refusal(status: int, text: str, hint: str = "", headers: tuple[tuple[str, str], ...] = ()) -> Answer:
    """An error, as one line of JSON."""
    found = {"error": text[:_LINE_CHARS_MAX]} | ({"hint": hint[:_LINE_CHARS_MAX]} if hint else {})
    return Answer(status, json.dumps(found).encode() + b"\n", headers=headers)


def of_error(error: LazyfsError) -> Answer:
    """The status that says best what went wrong."""
    headers: tuple[tuple[str, str], ...] = ()
    status = 500
    if isinstance(error, PeerBusyError | RateLimitedError):
        status, headers = 429, (("Retry-After", str(max(1, round(error.retry_after_s or 1)))),)
    elif isinstance(error, PeerRefusedError):
        status = 403
    elif isinstance(error, AuthError):
        status, headers = 401, (("WWW-Authenticate", 'Bearer realm="lazyfs-tracker"'),)
    elif isinstance(error, NotFoundError):
        status = 404
    elif isinstance(error, UsageError | FormatError | ConfigError):
        status = 400
    elif isinstance(error, SourceError):
        status = 503
    return refusal(status, str(error), error.hint, headers)
