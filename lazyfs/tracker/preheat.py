"""
Preheating: jobs that make nodes have an image, or a file, before somebody asks for it.

    POST /v1/clusters/{cluster}/preheat        Order -> {"id": N}
    GET  /v1/clusters/{cluster}/preheat        the jobs of the last days
    GET  /v1/clusters/{cluster}/preheat/{id}   one, with each node

Layer: tracker. Who calls: tracker.run (extension), tracker.harbor. A job names its nodes when it is made; they get the
task in the answer to a beat, and say in later beats how far they are. Jobs, states of members and the credential of a
job are items of the store, so any tracker answers; a node that has left, or says nothing until the job's end, has
failed. State here: copies of the jobs that are under way, looked at every LOOK_S. A credential is kept apart, no
longer than the job, and in no answer.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import trio

from lazyfs import shapes
from lazyfs.errors import FormatError, NotFoundError, PeerBusyError, SourceError, UsageError
from lazyfs.peers.announce import CLUSTER
from lazyfs.peers.jobs import (
    AUTHORIZATION_CHARS_MAX,
    DONE,
    FAILED,
    LAST_WORDS,
    MIRROR,
    NOT_MINE,
    RUNNING,
    SOURCE_CHARS_MAX,
    STATE_COUNT_MAX,
    TASK_COUNT_MAX,
    WORD,
    Said,
    Task,
    TaskState,
    Told,
)
from lazyfs.registry.reference import RegistryReference, parse_reference
from lazyfs.tracker.web import Answer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from lazyfs import config
    from lazyfs.tracker.service import Service
    from lazyfs.tracker.state import Cluster
    from lazyfs.tracker.web import Request

JOB_COUNT_MAX: Final = 256               # under way at a time
KEEP_S: Final = 7 * 86_400.0             # a job that is over can be looked at for so long
SECONDS_DEFAULT: Final = 1800.0          # Harbor itself looks for 1801 s
SECONDS_MAX: Final = 86_400.0
LOOK_S: Final = 2.0
PENDING: Final = "PENDING"               # of a job; the words that Harbor knows, and no others
SUCCESS: Final = "SUCCESS"
FAILURE: Final = "FAILURE"
_JOBS: Final = "preheat"
_KEYS: Final = "preheatkeys"
_SHOWN_COUNT_MAX: Final = 200            # of failed nodes in a job's record; all of them while it is under way
_log = logging.getLogger("lazyfs.tracker")
_encode = msgspec.json.Encoder().encode


class Order(msgspec.Struct, omit_defaults=True):
    """
    What is wanted.

    Attributes:
        source: HOST/REPOSITORY:TAG or @DIGEST; of a file its URL.
        nodes: so many of the nodes, chosen anew for each job; 0: see `percent`.
        percent: of the nodes, at least one.
        zone: only nodes there; empty: anywhere.
        platform: of an index; empty: each node's own.
        seconds: then who is not done has failed.
        authorization: to show to the registry instead of the nodes' own credentials.

    """

    source: Annotated[str, msgspec.Meta(min_length=1, max_length=SOURCE_CHARS_MAX)]
    kind: Annotated[str, msgspec.Meta(pattern=r"^(image|file)\Z")] = "image"
    nodes: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 0
    percent: Annotated[float, msgspec.Meta(gt=0, le=100)] = 100.0
    zone: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{0,128}\Z")] = ""
    platform: Annotated[str, msgspec.Meta(max_length=100)] = ""
    seconds: Annotated[float, msgspec.Meta(ge=1, le=SECONDS_MAX)] = SECONDS_DEFAULT
    authorization: Annotated[str, msgspec.Meta(max_length=AUTHORIZATION_CHARS_MAX, pattern=r"^[ -~]*\Z")] = ""

    def __repr__(self) -> str:
        """Without the credential."""
        return f"Order({self.kind}, {self.nodes or self.percent})"

    __str__ = __repr__


class Job(msgspec.Struct, omit_defaults=True):
    """
    An order that was taken.

    Attributes:
        nodes: by cluster: who shall have it.
        made_at, ended_at: seconds since 1970; ended_at 0: it is under way.
        done, failed: how many nodes; counted at the end. `problems`: of some that failed, by cluster/node.

    """

    id: int
    kind: str
    source: str
    nodes: dict[str, list[str]]
    made_at: float
    until: float
    platform: str = ""
    state: str = PENDING
    ended_at: float = 0.0
    done: int = 0
    failed: int = 0
    problems: dict[str, str] = {}


class Shown(msgspec.Struct):
    """A node of a job, for people."""

    cluster: str
    node: str
    state: str
    done: int = 0
    total: int = 0
    error: str = ""


class Preheat:
    """See the module. `counters`: jobs, tasks, last_words."""

    def __init__(self, service: Service, registries: tuple[str, ...] = ()) -> None:
        """`registries`: the only ones that images may be of; empty: any."""
        self.counters: Counter[str] = Counter()
        self._store = service.store
        self._registries = frozenset(registries)
        self._open: dict[int, Job] = {}
        self._heard: dict[tuple[int, str, str], TaskState] = {}     # job, cluster, member: what was stored from here
        self._authorizations: dict[int, str] = {}
        service.on_beat(WORD, self._beat)
        routes = service.routes
        routes.add("POST", "/v1/clusters/{cluster}/preheat", self._post)
        routes.add("GET", "/v1/clusters/{cluster}/preheat", self._list)
        routes.add("GET", "/v1/clusters/{cluster}/preheat/{id}", self._get)

    async def create(self, clusters: Iterable[str], order: Order) -> Job:
        """
        Take an order. A job without nodes has failed at once.

        Raises:
            UsageError: its source is none. PeerBusyError: too many are under way. SourceError: the store fails.

        """
        self._check(order)
        if len(self._open) >= JOB_COUNT_MAX:
            raise PeerBusyError(f"{JOB_COUNT_MAX} preheat jobs are under way", retry_after_s=30.0)
        number = int(time.time() * 1000) * 1000 + random.randrange(1000)  # noqa: S311 - two trackers in one millisecond
        nodes = {name: _choose(await self._store.cluster(name), order, number) for name in clusters}
        now = time.time()
        job = Job(number, order.kind, order.source, {name: found for name, found in nodes.items() if found}, now,
                  now + order.seconds, order.platform)
        if not job.nodes:
            job.state, job.ended_at = FAILURE, now
            where = f"{', '.join(nodes) or 'any cluster'}{f' in zone {order.zone}' if order.zone else ''}"
            job.problems = {"": f"no node of {where} takes preheat tasks"}
        elif order.authorization:
            await self._store.put(_KEYS, str(number), order.authorization.encode(), order.seconds)
        await self._keep(job)
        self.counters["jobs"] += 1
        _log.info("preheat job", extra={"fields": {"job": number, "kind": job.kind, "state": job.state,
                                                   "nodes": sum(map(len, job.nodes.values()))}})
        return job

    async def find(self, number: int) -> tuple[Job, list[Shown]]:
        """A job as it is now, with its nodes. Raises NotFoundError, SourceError."""
        raw = await self._store.get(_JOBS, str(number))
        if raw is None:
            raise NotFoundError(f"there is no preheat job {number}", hint="jobs are kept for a week")
        job = _job(raw)
        return await self._settled(job)

    async def run(self) -> None:
        """Look for jobs of other trackers, and end those whose time is over; until cancelled."""
        while True:
            try:
                found = [_job(raw) for raw in (await self._store.all(_JOBS)).values()]
                self._open = {job.id: job for job in found if not job.ended_at}
                for job in list(self._open.values()):
                    await self._settled(job)
                self._heard = {key: state for key, state in self._heard.items() if key[0] in self._open}
                self._authorizations = {key: one for key, one in self._authorizations.items() if key in self._open}
            except SourceError as error:
                _log.debug("preheat jobs: %s", error)
            await trio.sleep(LOOK_S)

    # --- beats ---

    async def _beat(self, cluster: str, member: str, raw: msgspec.Raw | None) -> msgspec.Raw | None:
        if raw is None:
            return None
        try:
            said = shapes.from_json(raw, Said)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(f"these are no states of tasks: {error!s:.200}") from None
        node = member.removesuffix(MIRROR)
        heard = []
        for state in said.states[:STATE_COUNT_MAX]:
            await self._hear(cluster, member, state)
            if state.state in LAST_WORDS:
                heard.append(state.id)
        tasks: list[Task] = []
        for job in list(self._open.values()):      # others come and go while the store is asked
            if len(tasks) >= TASK_COUNT_MAX:
                break
            known = self._heard.get((job.id, cluster, member))
            if node in job.nodes.get(cluster, ()) and (known is None or known.state not in LAST_WORDS):
                tasks.append(Task(job.id, job.kind, job.source, job.platform, await self._authorization(job.id)))
        self.counters["tasks"] += len(tasks)
        if not tasks and not heard:
            return None
        return msgspec.Raw(_encode(Told(tasks, heard)))

    async def _hear(self, cluster: str, member: str, state: TaskState) -> None:
        key = (state.id, cluster, member)
        job = self._open.get(state.id)
        if job is None or self._heard.get(key) == state or (
                member.removesuffix(MIRROR) not in job.nodes.get(cluster, ())):
            return
        await self._store.put(_states_of(state.id), f"{cluster}/{member}", _encode(state), KEEP_S)
        self._heard[key] = state
        self.counters["last_words"] += state.state in LAST_WORDS

    async def _authorization(self, number: int) -> str:
        if number not in self._authorizations:
            raw = await self._store.get(_KEYS, str(number))
            self._authorizations[number] = (raw or b"").decode()
        return self._authorizations[number]

    # --- jobs ---

    def _check(self, order: Order) -> None:
        """Raises UsageError. Nodes check what they are told: a beat that holds anything else is none to them."""
        try:
            shapes.from_plain(msgspec.to_builtins(order), Order)
        except msgspec.ValidationError as error:
            raise UsageError(f"this is not an order: {error!s:.200}") from None
        if order.kind == "file":
            if not order.source.startswith(("http://", "https://")):
                raise UsageError("a file is named by its http or https URL")
            return
        reference = parse_reference(order.source)
        if not isinstance(reference, RegistryReference):
            raise UsageError("expected an image of a registry: HOST/REPOSITORY:TAG")
        if self._registries and reference.host not in self._registries:
            raise UsageError(f"this tracker knows no registry {reference.host}", hint="[tracker] registries")

    async def _keep(self, job: Job) -> None:
        await self._store.put(_JOBS, str(job.id), _encode(job), KEEP_S)
        if job.ended_at:
            self._open.pop(job.id, None)
        else:
            self._open[job.id] = job

    async def _settled(self, job: Job) -> tuple[Job, list[Shown]]:
        """What its nodes say; if that is all there will be, it ends."""
        said = await self._store.all(_states_of(job.id))
        shown = []
        for cluster, nodes in job.nodes.items():
            members = (await self._store.cluster(cluster)).members
            late = bool(job.ended_at) or time.time() > job.until
            shown += [_node(cluster, node, said, [name for name in (node, node + MIRROR) if name in members], late=late)
                      for node in nodes]
        counts = Counter(one.state for one in shown)
        if not counts[RUNNING] and not job.ended_at:
            job.state = SUCCESS if not counts[FAILED] else FAILURE
            job.ended_at, job.done, job.failed = time.time(), counts[DONE], counts[FAILED]
            job.problems = {f"{one.cluster}/{one.node}": one.error for one in shown
                            if one.state == FAILED}
            job.problems = dict(list(job.problems.items())[:_SHOWN_COUNT_MAX])
            await self._store.drop(_KEYS, str(job.id))
            await self._keep(job)
            _log.info("preheat job ends", extra={"fields": {"job": job.id, "state": job.state, "done": job.done,
                                                            "failed": job.failed}})
        return job, shown

    # --- routes ---

    async def _post(self, request: Request) -> Answer:
        try:
            order = shapes.from_json(request.body, Order)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(f"this is not an order: {error!s:.200}") from None
        job = await self.create([_cluster_name(request)], order)
        return Answer(200, _encode({"id": job.id, "state": job.state, "nodes": sum(map(len, job.nodes.values()))}))

    async def _list(self, request: Request) -> Answer:
        cluster = _cluster_name(request)
        jobs = [_job(raw) for raw in (await self._store.all(_JOBS)).values()]
        mine = sorted((job for job in jobs if cluster in job.nodes), key=lambda job: job.id)
        return Answer(200, _encode([_plain(job) for job in mine[-_SHOWN_COUNT_MAX:]]))

    async def _get(self, request: Request) -> Answer:
        text, cluster = request.names["id"], _cluster_name(request)
        job, shown = await self.find(int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0)
        if job.nodes and cluster not in job.nodes:
            raise NotFoundError(f"cluster {cluster} has no preheat job {job.id}")
        return Answer(200, _encode({**_plain(job), "problem": job.problems.get("", ""),
                                    "nodes": [one for one in shown if one.cluster == cluster]}))


def _choose(cluster: Cluster, order: Order, number: int) -> list[str]:
    """Nodes for a job, in an order of its own: those that are preheated are not always the same."""
    found = {name.removesuffix(MIRROR) for name, entry in cluster.members.items()
             if name not in cluster.isolated and order.zone in {"", entry.state.member.zone}}
    ordered = sorted(found, key=lambda name: hashlib.blake2b(f"{number} {name}".encode()).digest())
    count = order.nodes or max(1, round(len(ordered) * order.percent / 100))
    return sorted(ordered[:count])


def _node(cluster: str, node: str, said: Any, here: list[str], *, late: bool) -> Shown:
    """What the members of a node say together: done if one is, failed if none that is left can be."""
    states = {name: shapes.from_json(said[f"{cluster}/{name}"], TaskState)
              for name in (node, node + MIRROR) if f"{cluster}/{name}" in said}
    by_state = {one.state: one for one in states.values()}
    best = by_state.get(DONE) or by_state.get(FAILED) or by_state.get(RUNNING)
    is_open = any(name not in states or states[name].state == RUNNING for name in here)
    if best is not None and best.state in {DONE, FAILED}:
        return Shown(cluster, node, best.state, best.done, best.total, best.error)
    if late or not is_open:
        error = "it does not serve images of this kind" if by_state.get(NOT_MINE) and not late else "no answer in time"
        return Shown(cluster, node, FAILED, error=error if here else "it has left")
    running = by_state.get(RUNNING)
    return Shown(cluster, node, RUNNING, running.done if running else 0, running.total if running else 0)


def _plain(job: Job) -> dict[str, Any]:
    return {"id": job.id, "kind": job.kind, "source": job.source.partition("?")[0], "state": job.state,
            "made_at": round(job.made_at, 3), "ended_at": round(job.ended_at, 3), "done": job.done,
            "failed": job.failed, "count": sum(map(len, job.nodes.values()))}


def _job(raw: bytes) -> Job:
    return shapes.from_json(raw, Job)


def _states_of(number: int) -> str:
    return f"preheat{number}"


def _cluster_name(request: Request) -> str:
    name = request.names["cluster"]
    if CLUSTER.fullmatch(name) is None:
        raise FormatError("this is not the name of a cluster")
    return name


def extend(service: Service, settings: config.Config) -> Callable[[], Awaitable[None]]:
    """Preheating, and Harbor's way to it, added to a tracker. Raises ConfigError: its secret cannot be read."""
    from lazyfs.tracker.harbor import Harbor  # noqa: PLC0415 - it needs Preheat

    preheat = Preheat(service, settings.tracker.registries)
    if settings.tracker.preheat_auth != "off":
        Harbor(service, preheat, settings.tracker)
    return preheat.run
