"""
Preheating: jobs through a tracker to nodes and back; Harbor's requests as its drivers write them.

The bodies are those that Harbor sends (Go's zero values and all) and the registry's own notifications.
"""

from __future__ import annotations

import json
from base64 import b64encode
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
import urllib3

from lazyfs.errors import SourceError
from lazyfs.peers.jobs import MIRROR, WORD, Agent
from lazyfs.peers.model import Member
from lazyfs.peers.tracked import TrackedMembership
from lazyfs.peers.trackerclient import TrackerClient
from lazyfs.tracker.web import Request
from tests.trackerkit import Node, Running, redis_server, tracker, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from lazyfs.peers.jobs import Progress, Task

BASIC = "harbor:long-enough-secret"
SHA = "sha256:" + "5" * 64
IMAGE = "https://harbor.example/v2/library/app/manifests/1.0"
NEW = {"type": "preheat",
       "args": {"type": "image", "url": IMAGE, "tag": "", "filtered_query_params": "",
                "headers": {"Authorization": "Bearer harbor-token"}, "scope": "", "concurrent_count": 0, "timeout": 0},
       "scheduler_cluster_ids": None}
OLD = {"type": "image", "url": IMAGE, "headers": {"Authorization": "Bearer harbor-token"}, "image": "library/app",
       "tag": "1.0", "digest": SHA}
KRAKEN = {"Events": [{"Id": "1", "TimeStamp": "2026-01-02T03:04:05.6Z", "Action": "push",
                      "Target": {"MediaType": "application/vnd.docker.distribution.manifest.v2+json", "Digest": SHA,
                                 "Repository": "library/app", "Url": IMAGE, "Tag": "1.0"},
                      "Request": None, "Actor": None}]}
NOTIFIED = {"events": [{"id": "1", "action": "push", "target": {"mediaType": "x", "digest": SHA, "repository": "app",
                                                                "url": "https://reg.example:5000/v2/app/blobs/" + SHA}},
                       {"id": "2", "action": "pull", "target": {"url": IMAGE}},
                       {"id": "3", "action": "push", "target": {
                           "url": f"https://reg.example:5000/v2/app/manifests/{SHA}"}}]}


async def call(running: Running, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """As Harbor does it."""
    def ask() -> tuple[int, Any]:
        with urllib3.PoolManager(retries=False, timeout=20) as pool:
            answer = pool.request(method, running.url + path, body=None if body is None else json.dumps(body),
                                  headers={"Accept": "application/json", "Content-Type": "application/json", **headers})
            data = answer.data
        return answer.status, json.loads(data) if data.startswith((b"{", b"[")) else data

    return await trio.to_thread.run_sync(ask)


@asynccontextmanager
async def members(running: Running, names: list[str], tasks: dict[str, list[Task]], fails: set[str] = frozenset(),
                  zone: str = "") -> AsyncIterator[None]:
    """Nodes that take tasks: a mirror does all, a daemon says that it is not its affair."""
    async with trio.open_nursery() as nursery:
        found = []
        for name in names:
            async def do(task: Task, progress: Progress, name: str = name) -> bool:
                tasks.setdefault(name, []).append(task)
                progress.show(1, 2)
                await trio.sleep(0.01)
                if name in fails:
                    raise SourceError("the registry said no")
                progress.show(2, 2)
                return name.endswith(MIRROR)

            member = Member(name, f"10.0.0.{len(found) + 1}:9", zone)
            found.append(TrackedMembership(member, Node(has={}), TrackerClient([running.url]), "prod"))
            agent = Agent(do, found[-1].news)
            found[-1].on_word(WORD, agent.say, agent.told)
            nursery.start_soon(agent.run)
            nursery.start_soon(found[-1].run)
        nursery.start_soon(say_often, found)
        await until(lambda: len(running.tracker.store.clusters.get("prod", Nothing).members) >= len(names))
        yield
        nursery.cancel_scope.cancel()


async def say_often(found: list[TrackedMembership]) -> None:
    """Tests do not wait for a beat to be due."""
    while True:
        for one in found:
            one.news()
        await trio.sleep(0.1)


class Nothing:
    members: tuple[str, ...] = ()


async def finished(running: Running, path: str, word: str = "state", over: tuple[str, ...] = ("SUCCESS", "FAILURE"),
                   **headers: str) -> Any:
    with trio.fail_after(30):
        while True:
            status, answer = await call(running, "GET", path, **headers)
            assert status == 200, answer
            assert answer[word] in {*over, "PENDING", "RUNNING"}
            if answer[word] in over:
                return answer
            await trio.sleep(0.05)


@pytest.mark.trio
async def test_harbor_today() -> None:
    tasks: dict[str, list[Task]] = {}
    async with tracker(preheat_auth="none") as running, members(running, ["a", "a.mirror", "b", "b.mirror"], tasks):
        assert (await call(running, "GET", "/healthy"))[0] == 200
        status, job = await call(running, "POST", "/oapi/v1/jobs",
                                 {**NEW, "args": {**NEW["args"], "scope": "all_peers"}})
        assert (status, job["state"]) == (200, "PENDING")
        assert isinstance(job["id"], int)
        done = await finished(running, f"/oapi/v1/jobs/{job['id']}")
        assert done["state"] == "SUCCESS"
        [result] = done["result"]["job_states"][0]["results"]
        assert [one["hostname"] for one in result["success_tasks"]] == ["a", "b"]
        assert result["failure_tasks"] == []
        for name in ("created_at", "updated_at"):
            assert datetime.fromisoformat(done[name]).tzinfo is not None
        assert "harbor-token" not in json.dumps(done)
        [task] = tasks["a.mirror"]
        assert (task.source, task.authorization) == ("harbor.example/library/app:1.0", "Bearer harbor-token")
        assert "harbor-token" not in repr(task)
        _, first = await call(running, "POST", "/oapi/v1/jobs", NEW)       # zero values: one node; never 208
        assert first["id"] != job["id"]
        assert (await finished(running, f"/oapi/v1/jobs/{first['id']}"))["state"] == "SUCCESS"
        assert len(tasks["a.mirror"]) + len(tasks["b.mirror"]) == 3


@pytest.mark.trio
async def test_harbor_before() -> None:
    tasks: dict[str, list[Task]] = {}
    async with tracker(preheat_auth="none") as running, members(running, ["a.mirror"], tasks, fails={"a.mirror"}):
        assert (await call(running, "GET", "/_ping"))[0] == 200
        status, job = await call(running, "POST", "/preheats", OLD)
        assert status == 200
        done = await finished(running, f"/preheats/{job['ID']}", "Status", ("SUCCESS", "FAILED"))
        assert done["Status"] == "FAILED"
        assert done["ID"] == job["ID"]
        assert done["errorMsg"] == "prod/a: the registry said no"
        assert done["finishTime"] >= done["startTime"]


@pytest.mark.trio
@pytest.mark.parametrize(("body", "sources"), [(KRAKEN, ["harbor.example/library/app:1.0"]),
                                               (NOTIFIED, [f"reg.example:5000/app@{SHA}"])])
async def test_kraken_and_a_registrys_notifications(body: Any, sources: list[str]) -> None:
    tasks: dict[str, list[Task]] = {}
    async with tracker(preheat_auth="none") as running, members(running, ["a.mirror"], tasks):
        assert (await call(running, "GET", "/health"))[0] == 200
        assert (await call(running, "POST", "/registry/notifications", body))[0] == 200
        await until(lambda: bool(tasks))
        assert [task.source for task in tasks["a.mirror"]] == sources
        status, answer = await call(running, "POST", "/proxy/v2/registry/prefetch",
                                    {"tag": "reg.example/x/y:z", "trace_id": "t"})
        assert (status, answer) == (200, {"tag": "reg.example/x/y:z", "trace_id": "t", "prefetched": True,
                                          "status": "success", "message": ""})


@pytest.mark.trio
@pytest.mark.parametrize(("mode", "secret", "header"), [
    ("basic", BASIC, {"Authorization": "Basic " + b64encode(BASIC.encode()).decode()}),
    ("oauth", "a-token-of-sixteen", {"Authorization": "Bearer a-token-of-sixteen"}),
    ("custom", "X-Key:a-value-of-sixteen", {"X-Key": "a-value-of-sixteen"}),
])
async def test_every_route_wants_the_secret(tmp_path: Path, mode: str, secret: str, header: dict[str, str]) -> None:
    file = tmp_path / "secret"
    file.write_text(secret + "\n")
    file.chmod(0o600)
    async with tracker(preheat_auth=mode, preheat_secret_file=str(file)) as running:
        for method, path in (("GET", "/healthy"), ("GET", "/_ping"), ("GET", "/health"), ("POST", "/oapi/v1/jobs"),
                             ("GET", "/oapi/v1/jobs/1"), ("POST", "/preheats"), ("GET", "/preheats/1"),
                             ("POST", "/registry/notifications"), ("POST", "/proxy/v2/registry/prefetch")):
            assert (await call(running, method, path))[0] == 401
            assert (await call(running, method, path, Authorization="Bearer wrong"))[0] == 401
        assert (await call(running, "GET", "/healthy", **header))[0] == 200
        assert (await call(running, "GET", "/oapi/v1/jobs/1", **header))[0] == 404
        assert (await call(running, "POST", "/oapi/v1/jobs", {"type": "gc"}, **header))[0] == 400
    async with tracker() as running:
        assert (await call(running, "GET", "/healthy"))[0] == 404      # off


@pytest.mark.trio
async def test_a_malformed_order_is_refused_in_a_line() -> None:
    async with tracker(preheat_auth="none", registries=("harbor.example",)) as running:
        for change in ({"url": "https://harbor.example/app"}, {"url": "file:///etc/passwd"}, {"scope": "everybody"},
                       {"url": "https://u:p@harbor.example/v2/a/manifests/1"}, {"type": "disk"},
                       {"url": "https://other.example/v2/a/manifests/1"}):
            status, answer = await call(running, "POST", "/oapi/v1/jobs", {**NEW, "args": {**NEW["args"], **change}})
            assert status == 400, answer
            assert "\n" not in answer["error"]
        status, answer = await call(running, "POST", "/oapi/v1/jobs", {**NEW, "scheduler_cluster_ids": [7]})
        assert (status, "no cluster 7" in answer["error"]) == (400, True)
        status, job = await call(running, "POST", "/oapi/v1/jobs", NEW)    # nobody is there: said at once
        assert (status, job["state"]) == (200, "FAILURE")
        assert "no node" in job["result"]["job_states"][0]["error"]


@pytest.mark.trio
@pytest.mark.parametrize("change", [
    {"type": "file", "url": "http://files.example/" + "x" * 9000},
    {"headers": {"Authorization": "Bearer " + "x" * 9000}},
    {"headers": {"Authorization": "Bearer x\r\nX-Other: y"}},
    {"username": "u" * 9000, "password": "p"},
], ids=["source", "credential", "two lines", "password"])
async def test_an_order_that_no_node_would_understand_is_refused_and_beats_go_on(change: dict[str, Any]) -> None:
    tasks: dict[str, list[Task]] = {}
    async with tracker(preheat_auth="none") as running, members(running, ["a.mirror"], tasks):
        args = {**NEW["args"], "headers": {}, **change}
        status, answer = await call(running, "POST", "/oapi/v1/jobs", {**NEW, "args": args})
        assert status == 400, answer
        assert "xxx" not in answer["error"]
        _, job = await call(running, "POST", "/oapi/v1/jobs", NEW)
        assert (await finished(running, f"/oapi/v1/jobs/{job['id']}"))["state"] == "SUCCESS"
    assert len(tasks["a.mirror"]) == 1


@pytest.mark.trio
async def test_beats_are_answered_while_jobs_come_and_go() -> None:
    """They look through the jobs, and wait for the store in between."""
    async with tracker() as running:
        routes = running.tracker.service.routes
        said = {"member": {"id": "a", "address": "10.0.0.1:9"}, "extra": {"preheat": {"states": []}}}
        statuses: list[int] = []

        async def ask(path: str, body: Any) -> None:
            for _ in range(20):
                answer = await routes.answer(Request("POST", f"/v1/clusters/prod/{path}", "", {}, body, "10.0.0.1"))
                statuses.append(answer.status)

        await ask("beat", json.dumps(said).encode())
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask, "preheat", b'{"source": "reg.example/app:1"}')
                nursery.start_soon(ask, "beat", json.dumps(said).encode())
    assert set(statuses) == {200}


@pytest.mark.trio
async def test_a_job_is_known_to_all_trackers_of_one_redis() -> None:
    tasks: dict[str, list[Task]] = {}
    with redis_server() as redis:
        async with tracker(redis.url) as one, tracker(redis.url) as two, members(two, ["a.mirror", "b.mirror"], tasks):
            status, job = await call(one, "POST", "/v1/clusters/prod/preheat",
                                     {"source": "reg.example/app:1", "percent": 50, "authorization": "Bearer s3cret"})
            assert (status, job["nodes"]) == (200, 1)
            done = await finished(one, f"/v1/clusters/prod/preheat/{job['id']}")
            assert (done["state"], done["done"], [node["state"] for node in done["nodes"]]) == ("SUCCESS", 1, ["done"])
            [[task]] = tasks.values()
            assert task.authorization == "Bearer s3cret"
            _, listed = await call(two, "GET", "/v1/clusters/prod/preheat")
            assert [one["id"] for one in listed] == [job["id"]]
            assert "s3cret" not in json.dumps(listed)
        async with tracker(redis.url) as three:    # a restart forgets nothing
            _, again = await call(three, "GET", f"/v1/clusters/prod/preheat/{job['id']}")
            assert again["state"] == "SUCCESS"


@pytest.mark.trio
async def test_who_cannot_and_who_says_nothing_has_failed() -> None:
    tasks: dict[str, list[Task]] = {}
    async with tracker() as running, members(running, ["only-a-daemon"], tasks, zone="z1"):
        order = partial(call, running, "POST", "/v1/clusters/prod/preheat")
        _, job = await order({"source": "reg.example/app:1", "zone": "z1"})
        done = await finished(running, f"/v1/clusters/prod/preheat/{job['id']}")
        assert (done["state"], done["nodes"][0]["error"]) == ("FAILURE", "it does not serve images of this kind")
        _, job = await order({"source": "reg.example/app:1", "zone": "elsewhere"})
        assert (job["state"], job["nodes"]) == ("FAILURE", 0)
    async with tracker() as running:
        mute = TrackedMembership(Member("mute", "10.0.0.1:9"), Node(has={}), TrackerClient([running.url]), "prod")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mute.run)
            await until(lambda: bool(running.tracker.store.clusters.get("prod", Nothing).members))
            _, job = await call(running, "POST", "/v1/clusters/prod/preheat",
                                {"source": "reg.example/app:1", "seconds": 1})
            done = await finished(running, f"/v1/clusters/prod/preheat/{job['id']}")
            assert (done["state"], done["nodes"][0]["error"]) == ("FAILURE", "no answer in time")
            nursery.cancel_scope.cancel()
