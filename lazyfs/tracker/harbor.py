"""
What registries call a preheat provider: Harbor's drivers for Dragonfly (both generations) and Kraken, on one address.

    GET  /healthy                        Dragonfly's manager, Harbor 2.12 and later
    POST /oapi/v1/jobs                   {"type": "preheat", "args": {"type": "image", "url": ..., "headers": ...}}
    GET  /oapi/v1/jobs/{id}
    GET  /_ping                          Dragonfly 1, Harbor before 2.12
    POST /preheats                       {"type": "image", "url": ..., "headers": ...}
    GET  /preheats/{id}
    GET  /health                         Kraken
    POST /registry/notifications         events, as the registry's own notifications too
    POST /proxy/v2/registry/prefetch     {"tag": "host/name:tag"}

Layer: tracker. Who calls: tracker.preheat.extend. State: the secret that is to be shown, if any. Every route wants it,
also the health checks: so whoever registers this provider with the wrong one is told at once. Zero values of Go mean
defaults. What a job's state is called is exact: Harbor gives up on any other word; 208 it takes for an error.
"""

from __future__ import annotations

import base64
import hmac
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

import msgspec
import trio

from lazyfs import shapes
from lazyfs.config.secretfile import read_word
from lazyfs.errors import AuthError, ConfigError, FormatError, UsageError
from lazyfs.peers.jobs import DONE, FAILED
from lazyfs.tracker.preheat import FAILURE, PENDING, SECONDS_DEFAULT, SECONDS_MAX, SUCCESS, Order
from lazyfs.tracker.web import Answer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lazyfs import config
    from lazyfs.tracker.preheat import Job, Preheat, Shown
    from lazyfs.tracker.service import Service
    from lazyfs.tracker.web import Request

_BODY_BYTES_MAX: Final = 256 * 1024      # a notification has some hundred events of 1 KiB
_EVENT_COUNT_MAX: Final = 100
_TASK_COUNT_MAX: Final = 500             # nodes shown of a job
_MANIFEST: Final = re.compile(r"/v2/(?P<name>[^?#]{1,255})/manifests/(?P<what>[^/?#]{1,128})\Z")
_SCOPES: Final = {"": (1, 100.0), "single_seed_peer": (1, 100.0), "single_peer": (1, 100.0),
                  "all_seed_peers": (0, 10.0), "all_peers": (0, 100.0)}
_OLD_STATES: Final = {PENDING: "RUNNING", SUCCESS: "SUCCESS", FAILURE: "FAILED"}
T = TypeVar("T")
_encode = msgspec.json.Encoder().encode


class _Args(msgspec.Struct):
    """Dragonfly's arguments; what is not here is for its own scheduling. `timeout`: nanoseconds, or "30m"."""

    type: str = "image"
    url: str = ""
    headers: dict[str, str] | None = None
    scope: str = ""
    ips: list[str] | None = None
    count: int | None = None
    percentage: float | None = None
    platform: str | None = None
    timeout: int | str | None = None
    username: str | None = None
    password: str | None = None


class _JobRequest(msgspec.Struct):
    type: str
    args: _Args
    scheduler_cluster_ids: list[int] | None = None


class _OldRequest(msgspec.Struct):
    """Dragonfly 1."""

    type: str = "image"
    url: str = ""
    headers: dict[str, str] | None = None


class _Prefetch(msgspec.Struct):
    tag: str
    trace_id: str = ""


class Harbor:
    """See the module."""

    def __init__(self, service: Service, preheat: Preheat, own: config.Tracker) -> None:
        """Raises ConfigError: the secret cannot be used."""
        self._preheat, self._store, self._own = preheat, service.store, own
        self._expected = _expected(own)
        for path in ("/healthy", "/_ping", "/health"):
            self._add(service, "GET", path, self._healthy)
        self._add(service, "POST", "/oapi/v1/jobs", self._post)
        self._add(service, "GET", "/oapi/v1/jobs/{id}", self._get)
        self._add(service, "POST", "/preheats", self._post_old)
        self._add(service, "GET", "/preheats/{id}", self._get_old)
        self._add(service, "POST", "/registry/notifications", self._notified)
        self._add(service, "POST", "/proxy/v2/registry/prefetch", self._prefetch)

    def _add(self, service: Service, method: str, path: str, handler: Any) -> None:
        service.routes.add(method, path, handler, guard=self._admit, body_bytes_max=_BODY_BYTES_MAX)

    def _admit(self, request: Request) -> None:
        """Raises AuthError. The secret's file is read again when another one is shown: it may have been replaced."""
        for attempt in range(2):
            if self._expected is None:
                return
            name, value = self._expected
            if hmac.compare_digest(request.headers.get(name, b""), value):
                return
            if not attempt:
                self._expected = _expected(self._own)
        raise AuthError(f"this preheat provider wants authentication mode {self._own.preheat_auth.upper()}",
                        hint="Harbor: Distributions, the instance's authentication; here: tracker.preheat_secret_file")

    async def _healthy(self, _request: Request) -> Answer:
        await trio.lowlevel.checkpoint()
        problem = self._store.problem()
        return Answer(503, _encode({"error": problem})) if problem else Answer(200, b"OK", "text/plain")

    # --- Dragonfly's manager -------------------------------------------------------------------------------------

    async def _post(self, request: Request) -> Answer:
        asked = _decode(request, _JobRequest)
        args = asked.args
        if asked.type != "preheat" or args.type not in {"image", "file"}:
            raise FormatError("expected a job of type preheat, of an image or a file")
        if args.scope not in _SCOPES:
            raise FormatError(f"args.scope: expected one of {', '.join(filter(None, _SCOPES))}")
        nodes, percent = _SCOPES[args.scope]
        if args.scope == "all_peers" and args.count:
            nodes = min(max(args.count, 0), 100_000)
        elif args.scope == "all_peers" and args.percentage and 0 < args.percentage <= 100:
            percent = args.percentage
        authorization = _authorization(args.headers)
        if not authorization and args.username and args.password:
            authorization = "Basic " + base64.b64encode(f"{args.username}:{args.password}".encode()).decode()
        order = Order(_source(args.type, args.url), args.type, nodes, percent, platform=(args.platform or "")[:100],
                      seconds=_seconds(args.timeout), authorization=authorization)
        job = await self._preheat.create(self._clusters(asked.scheduler_cluster_ids), order)
        return Answer(200, _encode(self._shown(job, [])))

    async def _get(self, request: Request) -> Answer:
        return Answer(200, _encode(self._shown(*await self._preheat.find(_number(request)))))

    def _shown(self, job: Job, nodes: Iterable[Shown]) -> dict[str, Any]:
        ids = {name: number for number, name in enumerate(self._names(), 1)}
        results: dict[str, dict[str, Any]] = {}
        for one in list(nodes)[:_TASK_COUNT_MAX]:
            entry = results.setdefault(one.cluster, {"scheduler_cluster_id": ids.get(one.cluster, 0),
                                                     "success_tasks": [], "failure_tasks": []})
            task = {"url": job.source.partition("?")[0], "hostname": one.node, "ip": ""}
            if one.state == DONE:
                entry["success_tasks"].append(task)
            elif one.state == FAILED:
                entry["failure_tasks"].append({**task, "description": one.error})
        state = {"error": job.problems.get("", ""), "results": list(results.values())}
        return {"id": job.id, "created_at": _when(job.made_at), "updated_at": _when(job.ended_at or job.made_at),
                "type": "preheat", "state": job.state, "result": {"job_states": [state]},
                "args": {"type": job.kind, "url": job.source.partition("?")[0]}}

    def _names(self) -> list[str]:
        return list(self._own.preheat_clusters) or sorted(self._store.clusters)

    def _clusters(self, ids: list[int] | None) -> list[str]:
        """Raises FormatError: there is none of such a number."""
        names = self._names()
        wrong = [one for one in ids or () if not 1 <= one <= len(names)]
        if wrong:
            raise FormatError(f"scheduler_cluster_ids: there is no cluster {wrong[0]}, expected 1 to {len(names)}",
                              hint="tracker.preheat_clusters, in its order")
        return [names[one - 1] for one in ids] if ids else names

    # --- Dragonfly 1 ---------------------------------------------------------------------------------------------

    async def _post_old(self, request: Request) -> Answer:
        asked = _decode(request, _OldRequest)
        kind = "file" if asked.type == "file" else "image"
        order = Order(_source(kind, asked.url), kind, *_SCOPES[""], authorization=_authorization(asked.headers))
        job = await self._preheat.create(self._names(), order)
        return Answer(200, _encode({"ID": str(job.id)}))

    async def _get_old(self, request: Request) -> Answer:
        job, _ = await self._preheat.find(_number(request))
        problems = "; ".join(f"{name}: {text}" if name else text for name, text in job.problems.items())
        return Answer(200, _encode({
            "ID": str(job.id), "startTime": _when(job.made_at),
            "finishTime": _when(job.ended_at) if job.ended_at else "",
            "errorMsg": problems[:1000], "Status": _OLD_STATES[job.state]}))

    # --- Kraken --------------------------------------------------------------------------------------------------

    async def _notified(self, request: Request) -> Answer:
        """Pushes only; its names come in any case: Harbor says Events, the registry itself events."""
        try:
            body = _lowered(msgspec.json.decode(request.body))
            events = body["events"]
            targets = [event["target"] for event in events if str(event.get("action", "")).lower() == "push"]
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError):
            raise FormatError("these are no notifications of a registry") from None
        for target in targets[:_EVENT_COUNT_MAX]:
            url = str(target.get("url") or "") if isinstance(target, dict) else ""
            if _MANIFEST.search(urlsplit(url).path):     # blobs are pushed too, each with an event
                await self._preheat.create(self._names(), Order(_source("image", url), "image", *_SCOPES[""]))
        return Answer(200, b"{}")

    async def _prefetch(self, request: Request) -> Answer:
        asked = _decode(request, _Prefetch)
        answer = {"tag": asked.tag[:500], "trace_id": asked.trace_id[:200]}
        try:
            job = await self._preheat.create(self._names(), Order(asked.tag, "image", *_SCOPES[""]))
        except UsageError as error:
            return Answer(400, _encode({**answer, "prefetched": False, "status": "failure", "message": str(error)}))
        failed = job.state == FAILURE
        return Answer(200, _encode({**answer, "prefetched": not failed, "status": "failure" if failed else "success",
                                    "message": job.problems.get("", "")}))


def _expected(own: config.Tracker) -> tuple[bytes, bytes] | None:
    """The header, and its value, that are to be shown. Raises ConfigError."""
    if own.preheat_auth in {"off", "none"}:
        return None
    word = read_word(own.preheat_secret_file, "tracker.preheat_secret_file")
    name, colon, value = word.partition(":")
    if own.preheat_auth == "oauth":
        return b"authorization", b"Bearer " + word.encode()
    if not colon or not name or not value:
        raise ConfigError(f"tracker.preheat_secret_file {own.preheat_secret_file}: expected NAME:VALUE in its line")
    if own.preheat_auth == "basic":
        return b"authorization", b"Basic " + base64.b64encode(word.encode())
    return name.lower().encode(), value.encode()


def _decode(request: Request, kind: type[T]) -> T:
    try:
        return shapes.from_json(request.body, kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"the request is malformed: {error!s:.200}") from None


def _source(kind: str, url: str) -> str:
    """HOST/NAME:TAG of https://HOST/v2/NAME/manifests/TAG. Raises FormatError."""
    if kind == "file":
        return url
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    met = _MANIFEST.fullmatch(parts.path)
    if parts.scheme not in {"http", "https"} or not parts.netloc or "@" in parts.netloc or met is None:
        raise FormatError("args.url: expected https://HOST/v2/NAME/manifests/TAG")
    return f"{parts.netloc}/{met['name']}{'@' if ':' in met['what'] else ':'}{met['what']}"


def _authorization(headers: dict[str, str] | None) -> str:
    return next((value for name, value in (headers or {}).items() if name.lower() == "authorization"), "")


def _seconds(timeout: int | str | None) -> float:
    """Go's durations: nanoseconds, or words as 30m; 0 and nothing mean the default."""
    if isinstance(timeout, str):
        met = re.fullmatch(r"(\d{1,6})(s|m|h)", timeout)
        seconds = float(met[1]) * {"s": 1, "m": 60, "h": 3600}[met[2]] if met is not None else 0.0
    else:
        seconds = (timeout or 0) / 1e9
    return min(max(seconds, 1.0), SECONDS_MAX) if seconds > 0 else SECONDS_DEFAULT


def _number(request: Request) -> int:
    text = request.names["id"]
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


def _when(seconds: float) -> str:
    """RFC 3339: Go refuses the whole answer for a time in other words."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _lowered(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name).lower(): _lowered(one) for name, one in value.items()}
    return [_lowered(one) for one in value] if isinstance(value, list) else value
