"""What a tracker answers: views, what has changed, waits, releases, isolation, refusals. In memory, a mock clock."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import trio

from lazyfs.errors import PeerBusyError
from lazyfs.peers.announce import SWARM_COUNT_MAX, Announced, Standing
from lazyfs.peers.packed import unpack
from lazyfs.tracker import release as releasing
from lazyfs.tracker import store as storing
from lazyfs.tracker import views as viewing
from lazyfs.tracker.metrics import page
from lazyfs.tracker.server import Traffic
from lazyfs.tracker.service import YOUNG_S, Service
from lazyfs.tracker.state import INTERVAL_S, TTL_S, YOUNG_INTERVAL_S, MemberState, dump_state, interval_s, ttl_s
from lazyfs.tracker.store import ISOLATE_S, REPORT_WINDOW_S, MemoryStore
from lazyfs.tracker.web import Request, Routes
from tests.trackerkit import KEY, OTHER

if TYPE_CHECKING:
    from trio.testing import MockClock

pytestmark = pytest.mark.trio
DOCUMENT = (Path(__file__).resolve().parents[2] / "docs/tracker.md").read_text()


class Rig:
    """A service; `seen`: by member and key the version that it was given."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.routes = Routes(lambda _: None)
        self.service = Service(self.store, self.routes)
        self.seen: dict[str, dict[str, str]] = {}

    async def ask(self, method: str, path: str, body: object = None, peer: str = "10.0.0.9") -> tuple[int, Any]:
        path, _, query = path.partition("?")
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await self.routes.answer(Request(method, path, query, {}, data, peer))
        return answer.status, json.loads(answer.body)

    async def beat(self, name: str, swarms: dict[str, Any] | None = None, cluster: str = "prod",
                   **more: Any) -> dict[str, Any]:
        member = {"id": name, "address": f"{name}.example:9451", "zone": more.pop("zone", ""),
                  "network": more.pop("network", "")}
        said = {"member": member, "swarms": {KEY: {}} if swarms is None else swarms,
                "seen": self.seen.get(name, {}), **more}
        status, told = await self.ask("POST", f"/v1/clusters/{cluster}/beat", said)
        assert status == 200, told
        self.seen.setdefault(name, {}).update(told.get("swarms", {}))
        return told

    async def sees(self, name: str, key: str = KEY, **more: Any) -> list[str]:
        """Whom a member that has no view yet is told of."""
        self.seen.pop(name, None)
        told = await self.beat(name, **more)
        return [row[0] for row in whole(told, key)["add"]] if key in told.get("swarms", {}) else []


def whole(told: dict[str, Any], key: str = KEY) -> dict[str, Any]:
    return next(part for part in told["views"] if part["version"] == told["swarms"][key])


async def test_who_joins_together_gets_the_same_view(autojump_clock: MockClock) -> None:
    rig = Rig()
    told: dict[str, dict[str, Any]] = {}

    async def join(name: str, after_s: float) -> None:
        await trio.sleep(after_s)
        told[name] = await rig.beat(name)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(join, f"n{number:02}", number * 0.005)
    assert len({one["swarms"][KEY] for one in told.values()}) == 1
    assert [row[0] for row in whole(told["n00"])["add"]] == sorted(told)
    assert trio.current_time() < 1.0


async def test_who_is_alone_in_its_cluster_need_not_wait_for_others(autojump_clock: MockClock) -> None:
    rig = Rig()
    await rig.beat("a", {})
    began = trio.current_time()
    told = await rig.beat("a")
    assert trio.current_time() == began
    assert told["members"] == 1
    assert [row[0] for row in whole(told)["add"]] == ["a"]
    await rig.beat("b", {})
    assert (await rig.beat("b", {OTHER: {}}))["members"] == 2
    assert trio.current_time() > began


async def test_a_large_view_is_packed_once_for_all_who_can_read_that(autojump_clock: MockClock) -> None:
    rig = Rig()
    for number in range(400):
        state = MemberState(Announced(f"node-{number}", f"10.0.{number >> 8}.{number & 255}:9451"), {KEY: Standing()})
        await rig.store.update("prod", f"node-{number}", dump_state(state))
    await trio.sleep(1.0)
    sizes = []
    for number in (0, 1):
        said = json.dumps({"member": {"id": f"node-{number}", "address": f"10.0.0.{number}:9451"}, "swarms": {KEY: {}}})
        answers = [await rig.routes.answer(Request("POST", "/v1/clusters/prod/beat", "", headers, said.encode(), "::1"))
                   for headers in ({}, {b"accept-encoding": b"gzip, zstd"})]
        plain, packed = answers
        assert plain.headers == ()
        assert packed.headers == (("Content-Encoding", "zstd"),)
        assert unpack(packed.body, len(plain.body)) == plain.body
        assert len(json.loads(plain.body)["views"][0]["add"]) == 400
        sizes.append(len(packed.body))
    assert max(sizes) < len(plain.body) / 3
    said = json.dumps({"member": {"id": "node-0", "address": "10.0.0.0:9451"}, "swarms": {KEY: {}},
                       "seen": json.loads(plain.body)["swarms"]})
    small = await rig.routes.answer(Request("POST", "/v1/clusters/prod/beat", "", {b"accept-encoding": b"zstd"},
                                            said.encode(), "::1"))
    assert small.headers == ()


async def test_what_has_changed_is_sent_once(autojump_clock: MockClock) -> None:
    rig = Rig()
    for name in ("a", "b", "c", "d"):
        await rig.beat(name)
    await trio.sleep(1.0)
    await rig.beat("a")
    assert "views" not in await rig.beat("a")
    await rig.beat("e", {KEY: {"done": 1000}})
    await trio.sleep(1.0)
    part = whole(await rig.beat("a"))
    assert part["add"] == [["e", "e.example:9451", "", 0, True, True]]
    assert part["since"]
    for done, rows in ((99, []), (100, [["b", "b.example:9451", "", 0, False, True]]), (300, [])):
        await rig.beat("b", {KEY: {"done": done}})    # who has some of it is told once
        await trio.sleep(1.0)
        told = await rig.beat("a")
        assert (whole(told)["add"] if "views" in told else []) == rows
    await rig.beat("b", leave=True)
    await trio.sleep(1.0)
    assert whole(await rig.beat("a"))["gone"] == ["b"]


async def test_resources_with_the_same_members_share_a_view(autojump_clock: MockClock) -> None:
    rig = Rig()
    for name in ("a", "b"):
        await rig.beat(name, {KEY: {}, OTHER: {}})
    await trio.sleep(1.0)
    rig.seen.clear()
    told = await rig.beat("a", {KEY: {}, OTHER: {}})
    assert told["swarms"][KEY] == told["swarms"][OTHER]
    assert len(told["views"]) == 1


async def test_a_view_that_the_tracker_does_not_know_is_replaced(autojump_clock: MockClock) -> None:
    rig = Rig()
    await rig.beat("a")
    rig.seen["a"] = {KEY: "0" * 16}
    part = whole(await rig.beat("a"))
    assert "since" not in part
    assert [row[0] for row in part["add"]] == ["a"]


async def test_clusters_networks_and_resources_do_not_see_each_other(autojump_clock: MockClock) -> None:
    rig = Rig()
    await rig.beat("here")
    await rig.beat("elsewhere", cluster="other")
    await rig.beat("unreachable", network="vpc-2")
    await rig.beat("busy-with-else", {OTHER: {}})
    await trio.sleep(1.0)
    assert await rig.sees("me") == ["here", "me"]
    assert await rig.sees("me2", network="vpc-2") == ["me2", "unreachable"]
    await rig.beat("unreachable")    # it is in the first one now
    await trio.sleep(1.0)
    assert await rig.sees("me") == ["here", "me", "unreachable"]


async def test_a_silent_member_is_gone_and_an_empty_cluster_forgotten(autojump_clock: MockClock) -> None:
    rig = Rig()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.store.run)
        await rig.beat("silent")
        for _ in range(int(TTL_S / 3) + 1):
            await rig.beat("a")
            await trio.sleep(3.0)
        await rig.beat("a")
        assert set(rig.store.clusters["prod"].members) == {"a"}
        await trio.sleep(TTL_S + 2)
        assert rig.store.clusters == {}
        assert (await rig.ask("GET", "/v1/clusters/prod"))[0] == 404
        nursery.cancel_scope.cancel()


async def test_an_address_without_a_host_is_that_of_the_connection(autojump_clock: MockClock) -> None:
    rig = Rig()
    for peer, expected in (("10.0.0.9", "10.0.0.9:99"), ("fd00::1", "[fd00::1]:99")):
        said = {"member": {"id": "a", "address": ":99"}, "swarms": {KEY: {}}}
        await rig.ask("POST", "/v1/clusters/prod/beat", said, peer)
        assert rig.store.clusters["prod"].members["a"].state.member.address == expected


@pytest.mark.parametrize(("address", "peer", "status"), [
    ("127.0.0.1:6379", "10.0.0.9", 400), ("localhost:9451", "10.0.0.9", 400), ("[::1]:9451", "10.0.0.9", 400),
    ("169.254.169.254:80", "10.0.0.9", 400), ("[::ffff:127.0.0.1]:80", "10.0.0.9", 400),
    ("0.0.0.0:9451", "fd00::1", 400),
    ("10.0.0.9:0", "10.0.0.9", 400), ("10.0.0.9:65536", "10.0.0.9", 400), ("10.0.0.9:9451", "10.0.0.9", 200),
    ("node.example:9451", "10.0.0.9", 200), ("127.0.0.1:9451", "127.0.0.1", 200), (":9451", "127.0.0.1", 200),
])
async def test_an_address_where_others_come_to_themselves_or_nowhere_is_refused(
        address: str, peer: str, status: int, autojump_clock: MockClock) -> None:
    rig = Rig()
    said = {"member": {"id": "a", "address": address}, "swarms": {KEY: {}}}
    found, told = await rig.ask("POST", "/v1/clusters/prod/beat", said, peer)
    assert found == status
    assert status == 200 or "peers.advertise" in told["hint"]
    assert ("a" in rig.store.clusters["prod"].members) == (status == 200)


async def test_two_nodes_with_one_name_are_told_of_but_not_one_that_moves(
        autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()

    async def beat(name: str, host: str) -> None:
        said = {"member": {"id": name, "address": f"{host}:99"}, "swarms": {KEY: {}}}
        assert (await rig.ask("POST", "/v1/clusters/prod/beat", said, host))[0] == 200
        await trio.sleep(4)

    for host in ("10.0.0.1", "10.0.0.2", "10.0.0.3"):
        await beat("moves", host)
    assert caplog.records == []
    for _ in range(10):
        await beat("twice", "10.0.0.1")
        await beat("twice", "10.0.0.2")
    said = [record.getMessage() for record in caplog.records]
    assert 1 <= len(said) <= 3
    assert all("member twice of cluster prod is at 10.0.0" in line and "peers.node" in line for line in said)


async def test_intervals_follow_size_and_youth(autojump_clock: MockClock) -> None:
    rig = Rig()
    assert (await rig.beat("a"))["seconds"] == YOUNG_INTERVAL_S
    await trio.sleep(YOUNG_S + 1)
    assert (await rig.beat("a"))["seconds"] == INTERVAL_S
    assert interval_s(10_000, young=True) == interval_s(10_000) == pytest.approx(20)
    assert ttl_s(10_000) > 3 * interval_s(10_000)


async def test_a_swarm_in_cells_has_everybody_in_one(
        monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    monkeypatch.setattr(viewing, "CELL_COUNT_MAX", 16)
    rig = Rig()
    names = [f"n{number}" for number in range(60)]
    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(rig.beat, name)
    await trio.sleep(1.0)
    cells = {name: await rig.sees(name) for name in names}
    assert all(name in seen for name, seen in cells.items())
    assert all(cells[other] == seen for seen in cells.values() for other in seen)
    assert 4 <= len({tuple(seen) for seen in cells.values()}) <= 8


async def test_a_copy_for_others_is_released_by_some_and_then_by_all(autojump_clock: MockClock) -> None:
    rig = Rig()
    names = [f"n{number:02}" for number in range(40)]
    mine = {"done": 1000, "need": False}
    for name in names:
        await rig.beat(name, {KEY: mine})
    await rig.beat("user", {KEY: {"done": 1000}})
    await rig.beat("late", {KEY: {"done": 100, "need": False}})
    for name in names:
        assert "release" not in await rig.beat(name, {KEY: mine})
    await trio.sleep(releasing.QUIET_S + 1)
    told = [(await rig.beat(name, {KEY: mine})).get("release") for name in names]
    assert {json.dumps(one) for one in told} == {"null", json.dumps({KEY: "some"})}
    assert told.count(None) == 4 or told.count(None) == 3     # a tenth of 41; the user may be among them
    assert "release" not in await rig.beat("user", {KEY: {"done": 1000}})
    await rig.beat("late", {KEY: {"done": 1000, "need": False}})
    await trio.sleep(releasing.IDLE_S)
    told = [(await rig.beat(name, {KEY: mine})).get("release") for name in names]
    assert told == [{KEY: "all"}] * len(names)
    for name in [*names, "late"]:
        await rig.beat(name, {})
    assert len(rig.store.clusters["prod"].swarms) == 1
    await rig.beat("user", {})
    assert rig.store.clusters["prod"].swarms == {}


async def test_nothing_is_released_while_many_still_fetch(autojump_clock: MockClock) -> None:
    rig = Rig()
    for number in range(10):
        await rig.beat(f"n{number}", {KEY: {"done": 1000 if number < 7 else 500, "need": False}})
    await trio.sleep(releasing.IDLE_S + 1)
    assert "release" not in await rig.beat("n0", {KEY: {"done": 1000, "need": False}})


async def report(rig: Rig, by: str, *of: str) -> dict[str, Any]:
    return await rig.beat(by, reports=[{"id": name, "why": "lied"} for name in of])


async def test_one_reporter_isolates_nobody_several_do_for_a_time(autojump_clock: MockClock) -> None:
    rig = Rig()
    for number in range(12):
        await rig.beat(f"n{number:02}")
    for _ in range(50):
        told = await report(rig, "n01", "n00")
    assert "isolated" not in told
    await report(rig, "n00", "n02")
    await report(rig, "n02", "n00")
    told = await report(rig, "n03", "n00")
    assert told["isolated"] == ["n00"]
    await trio.sleep(1.0)
    assert "n00" not in await rig.sees("n05")
    assert rig.seen["n05"] == (await rig.beat("n00"))["swarms"], "it may still fetch"
    shown = (await rig.ask("GET", "/v1/clusters/prod"))[1]["isolated"]
    assert shown[0]["id"] == "n00"
    await trio.sleep(ISOLATE_S)
    rig.store.clusters["prod"].sweep(rig.store.now())
    assert "isolated" not in await rig.beat("n05")


async def test_reports_long_apart_do_not_count_together(autojump_clock: MockClock) -> None:
    rig = Rig()
    for number in range(12):
        await rig.beat(f"n{number:02}")
    for by in ("n01", "n02", "n03", "n04"):
        told = await report(rig, by, "n00")
        await trio.sleep(REPORT_WINDOW_S / 2 + 1)
    assert "isolated" not in told


async def test_who_accuses_many_is_not_believed_and_few_are_isolated_at_once(autojump_clock: MockClock) -> None:
    rig = Rig()
    names = [f"n{number:02}" for number in range(30)]
    for name in names:
        await rig.beat(name)
    for by in names[:8]:    # a part of the network that is cut off
        await report(rig, by, *names[8:])
    isolated = (await rig.beat("n29")).get("isolated", [])
    assert len(isolated) <= storing.isolated_max(len(names)) == 6
    assert set(isolated) <= set(names[8:8 + storing.ACCUSED_COUNT_MAX])


async def test_reports_of_strangers_and_about_oneself_do_not_count(autojump_clock: MockClock) -> None:
    rig = Rig()
    for name in ("a", "b"):
        await rig.beat(name)
    await rig.store.report("prod", "stranger", ["a"])
    await rig.store.report("prod", "a", ["a", "stranger"])
    await rig.store.report("prod", "b", ["a"])
    assert rig.store.clusters["prod"].isolated == {}


@pytest.mark.parametrize("body", [
    b"", b"[]", b"\xff", b"[" * 100_000, b'{"member":{}}', b'{"member":{"id":"a"}}',
    {"member": {"id": "a/b", "address": "h:1"}},
    {"member": {"id": "a\n", "address": "h:1"}},
    {"member": {"id": "a" * 129, "address": "h:1"}},
    {"member": {"id": "a", "address": "h"}},
    {"member": {"id": "a", "address": "http://h:1"}},
    {"member": {"id": "a", "address": "h:1", "up_rate": -1}},
    {"member": {"id": "a", "address": "h:1", "zone": "a b"}},
    {"member": {"id": "a", "address": "h:1"}, "swarms": {"device/sha256:00": {}}},
    {"member": {"id": "a", "address": "h:1"}, "swarms": {KEY: {"done": 1001}}},
    {"member": {"id": "a", "address": "h:1"}, "swarms": {f"{KEY[:-6]}{n:06x}": {} for n in range(SWARM_COUNT_MAX + 1)}},
    {"member": {"id": "a", "address": "h:1"}, "swarms": {KEY: {}}, "reports": [{"id": "b", "why": "X"}]},
    {"member": {"id": "a", "address": "h:1"}, "swarms": {KEY: {}}, "reports": [1]},
    {"member": {"id": "a", "address": "h:1"}, "extra": {"Not a word": 1}},
], ids=lambda body: str(body)[:50])
async def test_what_is_no_beat_is_refused_in_a_line(body: object, autojump_clock: MockClock) -> None:
    rig = Rig()
    status, told = await rig.ask("POST", "/v1/clusters/prod/beat", body)
    assert status == 400
    assert "\n" not in told["error"]
    assert len(told["error"]) < 600


async def test_a_cluster_has_a_name_and_unknown_fields_are_skipped(autojump_clock: MockClock) -> None:
    rig = Rig()
    assert (await rig.ask("POST", "/v1/clusters/a%20b/beat", {"member": {"id": "a", "address": "h:1"}}))[0] == 400
    said = {"member": {"id": "a", "address": "h:1", "newer": 1}, "swarms": {KEY: {"newer": 2}}, "newer": []}
    assert (await rig.ask("POST", "/v1/clusters/prod/beat", said))[0] == 200


async def test_extensions_speak_in_beats_and_have_routes(autojump_clock: MockClock) -> None:
    rig = Rig()

    async def hook(cluster: str, name: str, said: msgspec.Raw | None) -> msgspec.Raw | None:
        await trio.lowlevel.checkpoint()
        return msgspec.Raw(json.dumps([cluster, name, json.loads(bytes(said))]).encode()) if said else None

    rig.service.on_beat("jobs", hook)
    assert "extra" not in await rig.beat("a")
    assert (await rig.beat("a", extra={"jobs": {"done": 3}}))["extra"] == {"jobs": ["prod", "a", {"done": 3}]}

    async def refuse(_request: Request) -> Any:
        await trio.lowlevel.checkpoint()
        raise PeerBusyError("too many jobs", retry_after_s=7.0)

    rig.routes.add("GET", "/v1/jobs/{name}/{rest...}", refuse)
    answer = await rig.routes.answer(Request("GET", "/v1/jobs/a/b/c", "", {}, b"", ""))
    assert answer.status == 429
    assert ("Retry-After", "7") in answer.headers
    assert (await rig.ask("GET", "/v1/jobs/a"))[0] == 404


async def test_what_is_shown_to_people(autojump_clock: MockClock) -> None:
    rig = Rig()
    await rig.beat("a", {KEY: {"done": 1000, "origin": 700}}, zone="z1")
    await rig.beat("b", {KEY: {"done": 400, "origin": 350}})
    shown = (await rig.ask("GET", "/v1/clusters/prod"))[1]
    assert shown["swarms"] == [{"resource": KEY, "network": "", "members": 2, "complete": 1, "origin_copies": 1.05}]
    assert shown["zones"] == {"z1": 1, "": 1}
    members = (await rig.ask("GET", "/v1/clusters/prod/members?after=a"))[1]
    assert [one["id"] for one in members] == ["b"]
    assert (await rig.ask("GET", "/v1/clusters"))[1][0]["members"] == 2
    assert (await rig.ask("GET", "/readyz"))[0] == 200


async def test_small_things_are_kept_for_their_time(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    await store.put("jobs", "a", b"1", 10.0)
    await store.put("jobs", "b", b"2", 1.0)
    await trio.sleep(2.0)
    assert await store.all("jobs") == {"a": b"1"}
    assert await store.get("jobs", "b") is None
    await store.drop("jobs", "a")
    assert await store.all("jobs") == {}


async def test_the_document_names_all_metrics(autojump_clock: MockClock) -> None:
    rig = Rig()
    await rig.beat("a", {KEY: {"origin": 500}})
    text = page(rig.service, Traffic(1, {200: 3})).decode()
    names = set(re.findall(r"^(lazyfs_tracker_\w+)", text, re.MULTILINE))
    assert 'lazyfs_tracker_origin_copies{cluster="prod"} 0.5' in text
    assert {name for name in names if f"`{name}" not in DOCUMENT} == set()
