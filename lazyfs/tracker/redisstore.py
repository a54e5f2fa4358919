"""
The store in Redis: any number of trackers have one state, and each of them all of it in memory too.

Layer: tracker. Who calls: tracker.run makes one. A tracker writes what it is told, and follows the log of what others
write (redisscripts says what is there); views are made of the replica in memory. Writes and looks go to Redis in
rounds: all that came in since the last one in one pipeline, in one thread with one connection. A member is answered
when Redis has what it said. A beat that says nothing new waits for no round: that its member was heard of goes with the
next one, and costs Redis an entry of a ZADD; if that fails, it goes with the one after it.

State: the replicas; operations that wait for the next round, bounded; members heard of since the last one (only such
as the replicas have). Every round has a deadline (socket timeouts).
While Redis does not answer, operations fail at once: the tracker says 503, nodes go on with what they know.
"""

from __future__ import annotations

import logging
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import redis
import trio
from redis.backoff import NoBackoff
from redis.retry import Retry

from lazyfs.config.secretfile import read_word
from lazyfs.errors import FormatError, LazyfsError, PeerBusyError, SourceError
from lazyfs.tracker import redisscripts as scripts
from lazyfs.tracker.state import Cluster, parse_state, ttl_s
from lazyfs.tracker.store import (
    ACCUSED_COUNT_MAX,
    CLUSTER_COUNT_MAX,
    ISOLATE_S,
    ISOLATED_SHARE,
    ITEM_COUNT_MAX,
    MEMBER_COUNT_MAX,
    REPORT_WINDOW_S,
    SMALL_CLUSTER,
    SWEEP_S,
    check_item,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

POLL_S = 0.25                    # what another tracker was told is known here after that
GATHER_S = 0.04                  # between two rounds: what comes in together goes together
TIMEOUT_S = 2.0                  # of a connection, a read, a write
AGAIN_S = 0.5                    # after a failure
UNUSED_S = 120.0                 # a cluster that nobody asks for is no longer followed
_PENDING_COUNT_MAX = 20_000      # operations
_ROUND_COUNT_MAX = 2000          # of them in one round
_LOG_COUNT = 5000                # changes read in one round
_REAP_COUNT = 200                # members, in one run of the script: Redis does nothing else meanwhile
_log = logging.getLogger("lazyfs.tracker")


@dataclass(slots=True, eq=False)
class _Operation:
    """`result` or `error` when `done` is set."""

    cluster: str
    script: str
    keys: list[str] = field(default_factory=list)
    args: list[str | bytes | float | int] = field(default_factory=list)
    done: trio.Event = field(default_factory=trio.Event)
    result: Any = None
    error: LazyfsError | None = None


@dataclass(slots=True)
class _Replica:
    """A cluster here, and up to which change it follows Redis. `heard_at`: the latest that was read of `alive`."""

    cluster: Cluster
    seq: int
    used_at: float
    heard_at: float = 0.0


@dataclass(slots=True)
class _Round:
    """What one asks Redis: operations, members heard of by cluster, replicas to follow; `now` by Redis' clock."""

    batch: list[_Operation]
    heard: dict[str, set[str]]
    follow: dict[str, _Replica]
    reap: bool
    now: float


@dataclass(slots=True)
class _Found:
    """What a round has read. `looks` by cluster: number of the last change, changes, who was heard when."""

    time: float = 0.0
    results: list[Any] = field(default_factory=list)
    looks: dict[str, tuple[int, list[Any], list[Any]]] = field(default_factory=dict)


class RedisStore:
    """Of one tracker. Use `run`, or nothing happens."""

    def __init__(self, url: str, password_file: str = "") -> None:
        """Raises ConfigError: the password cannot be read."""
        password = read_word(password_file, "tracker.redis_password_file", chars_min=1) if password_file else None
        self._redis = redis.Redis.from_url(url, password=password, socket_timeout=TIMEOUT_S,
                                           socket_connect_timeout=TIMEOUT_S, retry=Retry(NoBackoff(), 0))
        self._where = url
        self._replicas: dict[str, _Replica] = {}
        self._pending: deque[_Operation] = deque()
        self._heard_of: dict[str, set[str]] = {}     # by cluster, since the last round
        self._wanted = trio.Event()
        self._offset = 0.0               # Redis' clock minus ours
        self._problem = "nobody has asked Redis yet"
        self._failing = False
        self._scripts: dict[str, str] = {}
        self._reap_at = 0.0
        self._loading: dict[str, _Operation] = {}

    @property
    def clusters(self) -> Mapping[str, Cluster]:
        return {name: replica.cluster for name, replica in self._replicas.items()}

    def now(self) -> float:
        return trio.current_time() + self._offset

    def problem(self) -> str:
        return self._problem

    async def cluster(self, name: str) -> Cluster:
        replica = self._replicas.get(name)
        if replica is None:
            await self._wait(self._loading.get(name) or self._begin_load(name))
            replica = self._replicas[name]
        elif self._failing:
            raise SourceError(self._problem)
        replica.used_at = trio.current_time()
        return replica.cluster

    async def update(self, cluster: str, name: str, state: bytes) -> None:
        parse_state(state)
        if not await self._do(cluster, scripts.UPDATE, self._keys(cluster), [name, state, MEMBER_COUNT_MAX]):
            raise PeerBusyError(f"cluster {cluster} has {MEMBER_COUNT_MAX} members", retry_after_s=60.0)

    async def heard(self, cluster: str, name: str) -> None:
        replica = self._replicas.get(cluster)
        if self._failing:
            raise SourceError(self._problem)
        if replica is not None and name in replica.cluster.members:
            self._heard_of.setdefault(cluster, set()).add(name)

    async def leave(self, cluster: str, name: str) -> None:
        await self._do(cluster, scripts.LEAVE, self._keys(cluster), [name])

    async def report(self, cluster: str, by: str, of: Iterable[str]) -> None:
        names = scripts.keys_of(cluster)
        for name in of:
            keys = [*self._keys(cluster), names["isolated"], f"{names['by']}:{by}", f"{names['of']}:{name}"]
            await self._do(cluster, scripts.REPORT, keys, [by, name, REPORT_WINDOW_S, ISOLATE_S, ACCUSED_COUNT_MAX,
                                                           SMALL_CLUSTER, ISOLATED_SHARE])

    async def put(self, collection: str, name: str, value: bytes, seconds: float) -> None:
        check_item(collection, name, value)
        if not await self._do("", scripts.PUT, scripts.item_keys(collection), [name, value, seconds, ITEM_COUNT_MAX]):
            raise PeerBusyError(f"{collection}: there are {ITEM_COUNT_MAX} already", retry_after_s=60.0)

    async def get(self, collection: str, name: str) -> bytes | None:
        found = await self._do("", scripts.GET, scripts.item_keys(collection), [name])
        return found if isinstance(found, bytes) else None

    async def all(self, collection: str) -> Mapping[str, bytes]:
        found = await self._do("", scripts.ALL, scripts.item_keys(collection))
        return {name.decode(): value for name, value in zip(found[::2], found[1::2], strict=True)}

    async def drop(self, collection: str, name: str) -> None:
        await self._do("", scripts.DROP, scripts.item_keys(collection), [name])

    async def run(self) -> None:
        try:
            while True:
                await self._round()
                with trio.move_on_after(POLL_S):
                    await self._wanted.wait()
                await trio.sleep(GATHER_S)
        finally:
            self._redis.close()

    @staticmethod
    def _keys(cluster: str) -> list[str]:
        keys = scripts.keys_of(cluster)
        return [keys["alive"], keys["state"], keys["log"], keys["seq"]]

    async def _do(self, cluster: str, script: str, keys: list[str] | None = None,
                  args: list[str | bytes | float | int] | None = None) -> Any:
        """One operation, in the next round. Raises SourceError."""
        operation = _Operation(cluster, script, keys or [], args or [])
        self._begin(operation)
        return await self._wait(operation)

    def _begin(self, operation: _Operation) -> None:
        if self._failing:
            raise SourceError(self._problem)     # it failed AGAIN_S ago: nobody waits for the next attempt
        if len(self._pending) >= _PENDING_COUNT_MAX:
            raise SourceError(f"{_PENDING_COUNT_MAX} operations wait for Redis")
        self._pending.append(operation)
        self._wanted.set()

    def _begin_load(self, name: str) -> _Operation:
        """Read all of a cluster, once for all who want it."""
        keys = scripts.keys_of(name)
        operation = _Operation(name, scripts.LOAD, [keys["alive"], keys["state"], keys["isolated"], keys["seq"]])
        self._begin(operation)
        self._loading[name] = operation
        return operation

    @staticmethod
    async def _wait(operation: _Operation) -> Any:
        await operation.done.wait()
        if operation.error is not None:
            raise operation.error
        return operation.result

    async def _round(self) -> None:
        """Never raises an Exception."""
        batch = [self._pending.popleft() for _ in range(min(_ROUND_COUNT_MAX, len(self._pending)))]
        heard, self._heard_of = self._heard_of, {}
        if not self._pending:
            self._wanted = trio.Event()
        follow = {name: replica for name, replica in self._replicas.items() if name not in self._loading}
        reap = trio.current_time() >= self._reap_at
        try:
            found = await trio.to_thread.run_sync(self._ask, _Round(batch, heard, follow, reap, self.now()))
        except (redis.RedisError, OSError) as error:
            self._failed(batch, error)
            for name, members in heard.items():
                self._heard_of.setdefault(name, set()).update(members)
            await trio.sleep(AGAIN_S)
            return
        self._offset = found.time - trio.current_time()
        if self._failing:
            _log.info("Redis at %s answers", self._where)
        self._problem, self._failing = "", False
        if reap:
            self._reap_at = trio.current_time() + SWEEP_S
        for name, (seq, changes, alive) in found.looks.items():
            self._follow(name, seq, changes, alive)
        for operation, result in zip(batch, found.results, strict=True):
            self._finish(operation, result)
        if reap:
            self._sweep()

    def _failed(self, batch: list[_Operation], error: Exception) -> None:
        text = f"Redis at {self._where} does not answer: {error}"
        if not self._failing:
            _log.warning("%s; nodes go on with what they know", text)
        self._problem, self._failing = text, True
        for operation in batch:
            self._loading.pop(operation.cluster, None)
            operation.error = SourceError(text)
            operation.done.set()

    def _ask(self, asked: _Round) -> _Found:
        """In the thread: a round. Raises RedisError, OSError."""
        for attempt in range(2):
            if not self._scripts:
                self._scripts = {text: self._redis.script_load(text) for text in (
                    scripts.UPDATE, scripts.LEAVE, scripts.REAP, scripts.REPORT, scripts.LOAD, scripts.PUT,
                    scripts.GET, scripts.ALL, scripts.DROP)}
            try:
                return self._pipeline(asked)
            except redis.exceptions.NoScriptError:   # it was started anew, or told to forget them
                self._scripts = {}
                if attempt:
                    raise
        raise AssertionError

    def _pipeline(self, asked: _Round) -> _Found:
        pipe = self._redis.pipeline(transaction=False)
        for operation in asked.batch:
            pipe.evalsha(self._scripts[operation.script], len(operation.keys), *operation.keys, *operation.args)
        for name, members in asked.heard.items():
            pipe.zadd(scripts.keys_of(name)["alive"], dict.fromkeys(members, asked.now), xx=True)
        looked = []
        for name, replica in asked.follow.items():
            keys = scripts.keys_of(name)
            if asked.reap:
                pipe.evalsha(self._scripts[scripts.REAP], 4, *self._keys(name),
                             ttl_s(len(replica.cluster.members)), _REAP_COUNT)
            pipe.get(keys["seq"])
            pipe.xrange(keys["log"], f"{replica.seq}-2", "+", count=_LOG_COUNT)
            pipe.zrange(keys["alive"], replica.heard_at, "+inf", byscore=True, withscores=True, offset=0,
                        num=MEMBER_COUNT_MAX)
            looked.append(name)
        pipe.time()
        answers = pipe.execute(raise_on_error=False)
        for answer in answers:
            if isinstance(answer, redis.exceptions.NoScriptError | redis.exceptions.ReadOnlyError):
                raise answer
        found = _Found(results=answers[: len(asked.batch)])
        rest = iter(answers[len(asked.batch) + len(asked.heard):])
        for name in looked:
            if asked.reap:
                next(rest)
            seq, changes, alive = next(rest), next(rest), next(rest)
            for one in (seq, changes, alive):
                if isinstance(one, Exception):
                    raise one
            found.looks[name] = int(seq or 0), changes, alive
        seconds, micros = next(rest)
        found.time = seconds + micros / 1e6
        return found

    def _finish(self, operation: _Operation, result: Any) -> None:
        if operation.script == scripts.LOAD:
            self._loading.pop(operation.cluster, None)
        if isinstance(result, Exception):
            operation.error = SourceError(f"Redis at {self._where}: {result}")
        elif operation.script == scripts.LOAD:
            try:
                self._replicas[operation.cluster] = self._load(operation.cluster, result)
            except PeerBusyError as error:
                operation.error = error
        else:
            operation.result = result
        operation.done.set()

    def _load(self, name: str, found: list[Any]) -> _Replica:
        """A replica, of what LOAD gave."""
        if name not in self._replicas and len(self._replicas) >= CLUSTER_COUNT_MAX:
            raise PeerBusyError(f"there are {CLUSTER_COUNT_MAX} clusters already", retry_after_s=60.0)
        seq, states, alive, isolated = found
        replica = _Replica(Cluster(name), int(seq), trio.current_time())
        heard = {member: float(score) for member, score in zip(alive[::2], alive[1::2], strict=True)}
        for member, state in zip(states[::2], states[1::2], strict=True):
            self._update(replica.cluster, state, heard.get(member, self.now()))
        for member, until in zip(isolated[::2], isolated[1::2], strict=True):
            replica.cluster.isolate(member.decode(), float(until))
        return replica

    def _follow(self, name: str, seq: int, changes: list[Any], heard: list[Any]) -> None:
        """Bring a replica up to date; one that has missed something is read anew."""
        replica = self._replicas.get(name)
        if replica is None:
            return
        for place, values in changes:
            number = int(place.partition(b"-")[0])
            if number != replica.seq + 1:
                break
            replica.seq = number
            self._change(replica.cluster, values[b"k"], values[b"i"].decode(), values[b"v"])
        followed = replica.seq == seq or (bool(changes) and (replica.seq > seq or len(changes) == _LOG_COUNT))
        if followed:
            self._heard(replica, heard)
        elif name not in self._loading:
            _log.info("cluster %s is read anew", name)
            with suppress(SourceError):   # there is too much to do: in the next round
                self._begin_load(name)

    def _heard(self, replica: _Replica, heard: list[Any]) -> None:
        for member, score in heard:
            replica.cluster.heard(member.decode(), float(score))
            replica.heard_at = max(replica.heard_at, float(score))

    def _change(self, cluster: Cluster, kind: bytes, name: str, value: bytes) -> None:
        if kind == b"set":
            self._update(cluster, value, self.now())
        elif kind == b"gone":
            cluster.gone(name)
        elif kind == b"isolated":
            cluster.isolate(name, float(value))

    def _update(self, cluster: Cluster, state: bytes, at: float) -> None:
        try:
            cluster.update(parse_state(state), at)
        except FormatError as error:    # of a tracker of another version: that member is not seen here
            _log.warning("%s", error)

    def _sweep(self) -> None:
        """End isolations, forget clusters that nobody asks for. Who is silent for too long is Redis' decision."""
        limit = trio.current_time() - UNUSED_S
        for name, replica in list(self._replicas.items()):
            replica.cluster.sweep(self.now())
            if replica.used_at < limit:
                del self._replicas[name]
