"""Trackers and Redis that die, hang and come back; nodes that go on; hostile clients. Real ones, on loopback."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import stat
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import trio

from lazyfs import config
from lazyfs.errors import ConfigError, NotFoundError, PeerError, PeerRefusedError
from lazyfs.peers import tracked, trackerclient
from lazyfs.peers.announce import Report, Standing
from lazyfs.peers.membership import DnsMembership, ListedMembership
from lazyfs.peers.model import Member
from lazyfs.peers.tracked import TrackedMembership, open_membership
from lazyfs.peers.trackerclient import TrackerClient
from lazyfs.tracker import conversation, redisstore, server, service
from tests.ports import free_port
from tests.trackerkit import KEY, OTHER, START_S, Node, environment, redis_server, tracker, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.trackerkit import Redis


@pytest.fixture
def redis() -> Iterator[Redis]:
    with redis_server() as running:
        yield running


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for long."""
    monkeypatch.setattr(tracked, "AGAIN_MAX_S", 1.0)
    monkeypatch.setattr(redisstore, "TIMEOUT_S", 1.0)
    monkeypatch.setattr(trackerclient, "AWAY_S", 1.0)


@contextlib.asynccontextmanager
async def joined(urls: list[str], *names: str,
                 leaves: bool = True) -> AsyncIterator[list[tuple[Node, TrackedMembership]]]:
    """Nodes of one cluster; they leave at the end."""
    found = []
    async with trio.open_nursery() as nursery:
        for name in names:
            node = Node()
            membership = TrackedMembership(Member(name, f"{name}.example:9451"), node, TrackerClient(urls), "prod")
            membership.leaves = leaves
            nursery.start_soon(membership.run)
            found.append((node, membership))
        yield found
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_two_trackers_on_one_redis_have_one_cluster(redis: Redis) -> None:
    async with (tracker(redis.url) as one, tracker(redis.url) as two, joined([one.url], "a", "b") as (a, _),
                joined([two.url], "c") as (c,)):
        for node, _ in (a, c):
            await until(lambda node=node: node.sees() == ["a", "b", "c"])
        a[0].has = {KEY: Standing(done=1000)}
        a[1].news()
        await until(lambda: c[0].views[KEY].complete == c[0].views[KEY].partial == {"a"})
        a[0].has = {KEY: Standing(done=500)}
        a[1].news()
        await until(lambda: (c[0].views[KEY].complete, c[0].views[KEY].partial) == (set(), {"a"}))


@pytest.mark.trio
async def test_a_node_that_says_another_rate_is_seen_with_it_by_all_and_by_itself(redis: Redis) -> None:
    async with (tracker(redis.url) as one, tracker(redis.url) as two, joined([one.url], "a") as (a,),
                joined([two.url], "b") as (b,)):
        await until(lambda: a[0].sees() == b[0].sees() == ["a", "b"])
        a[1].says(Member("a", "a.example:9451", up_rate=1 << 20))
        for node, _ in (a, b):
            await until(lambda node=node: {one.id: one.up_rate for one in node.views[KEY].members}
                        == {"a": 1 << 20, "b": 0})


@pytest.mark.trio
async def test_views_that_are_packed_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "PACK_BYTES_MIN", 1)
    async with tracker() as one, joined([one.url], "a", "b", "c") as nodes:
        for node, _ in nodes:
            await until(lambda node=node: node.sees() == ["a", "b", "c"])
        nodes[0][0].has = {KEY: Standing(done=1000), OTHER: Standing()}
        nodes[0][1].news()
        await until(lambda: nodes[1][0].views[KEY].complete == {"a"} and nodes[0][0].sees(OTHER) == ["a"])
    monkeypatch.setattr(trackerclient, "_BODY_BYTES_MAX", 1)
    async with tracker() as one, joined([one.url], "a") as ((_, membership),):
        await until(lambda: "its answer" in membership.describe()["why"])


@pytest.mark.trio
async def test_nodes_of_networks_that_do_not_reach_each_other_never_hear_of_each_other(redis: Redis) -> None:
    async with tracker(redis.url) as one, tracker(redis.url) as two, trio.open_nursery() as nursery:
        nodes = {}
        for name, network, where in (("a", "east", one), ("b", "east", two), ("c", "west", one), ("d", "", two)):
            settings = config.Peers(cluster="prod", tracker=(where.url,), network=network)
            membership = open_membership(settings, Member(name, f"{name}.example:9451"), nodes.setdefault(name, Node()))
            assert membership.describe()["network"] == network
            nursery.start_soon(membership.run)
        await until(lambda: nodes["a"].sees() == nodes["b"].sees() == ["a", "b"])
        await until(lambda: (nodes["c"].sees(), nodes["d"].sees()) == (["c"], ["d"]))
        client = TrackerClient([one.url])
        told = json.loads((await client.request("GET", "/v1/clusters/prod")).body)
        assert [(swarm["network"], swarm["members"]) for swarm in told["swarms"]] == [("", 1), ("east", 2), ("west", 1)]
        await client.aclose()
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_the_next_tracker_serves_when_one_is_killed(redis: Redis) -> None:
    async with (tracker(redis.url) as one, tracker(redis.url) as two,
                joined([one.url, two.url], "a", "b") as (a, b)):
        await until(lambda: a[0].sees() == b[0].sees() == ["a", "b"])
        one.kill()
        async with joined([one.url, two.url], "c") as (c,):
            await until(lambda: c[0].sees() == ["a", "b", "c"])
            await until(lambda: a[0].sees() == b[0].sees() == ["a", "b", "c"])


@pytest.mark.trio
async def test_a_lost_tracker_leaves_nodes_what_they_know_and_comes_back_empty() -> None:
    port = free_port()
    async with contextlib.AsyncExitStack() as stack:
        one = await stack.enter_async_context(tracker(address=f"127.0.0.1:{port}"))
        (a, b) = await stack.enter_async_context(joined([one.url], "a", "b"))
        await until(lambda: a[0].sees() == b[0].sees() == ["a", "b"])
        one.kill()
        a[0].has = {KEY: Standing(), OTHER: Standing()}
        a[1].news()
        await until(lambda: a[1].describe()["why"] != "")
        assert a[0].sees() == ["a", "b"]
        assert a[1].describe()["members"] == 2
        async with tracker(address=f"127.0.0.1:{port}"):    # knows nothing: members tell it
            await until(lambda: a[0].sees(OTHER) == ["a"])
            await until(lambda: a[1].lost_s() == b[1].lost_s() == 0.0)
            await until(lambda: b[0].sees() == ["a", "b"])


@pytest.mark.trio
async def test_redis_that_is_killed_is_told_and_nodes_tell_the_next_one_all_again(redis: Redis) -> None:
    async with tracker(redis.url) as one, joined([one.url], "a", "b") as (a, b):
        await until(lambda: a[0].sees() == b[0].sees() == ["a", "b"])
        client = TrackerClient([one.url])
        redis.stop()
        await until(lambda: "does not answer" in one.tracker.store.problem())
        with pytest.raises(PeerError, match="does not answer"):
            await client.request("GET", "/readyz")
        await client.request("GET", "/healthz")
        await until(lambda: "does not answer" in a[1].describe()["why"])
        assert a[0].sees() == ["a", "b"]
        redis.start()
        await until(lambda: one.tracker.store.problem() == "")
        async with joined([one.url], "c") as (c,):
            await until(lambda: c[0].sees() == ["a", "b", "c"])
            await until(lambda: a[0].sees() == b[0].sees() == ["a", "b", "c"])
        await client.aclose()


@pytest.mark.trio
async def test_redis_that_hangs_costs_no_more_than_its_timeout(redis: Redis) -> None:
    async with tracker(redis.url) as one, joined([one.url], "a") as (a,):
        await until(lambda: a[0].sees() == ["a"])
        redis.signal(signal.SIGSTOP)
        await until(lambda: one.tracker.store.problem() != "")
        await until(lambda: a[1].lost_s() > 0)
        redis.signal(signal.SIGCONT)
        await until(lambda: a[1].lost_s() == 0)


@pytest.mark.trio
async def test_a_tracker_that_misses_changes_reads_all_anew(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    async with tracker(redis.url) as one, tracker(redis.url) as two, joined([two.url], "b") as (b,):
        await until(lambda: b[0].sees() == ["b"])
        keys = redisstore.scripts.keys_of("prod")
        async with joined([one.url], "a"):
            await until(lambda: b[0].sees() == ["a", "b"])
            client = redisstore.redis.Redis.from_url(redis.url)
            for _ in range(3):    # numbers whose changes nobody can read
                client.incr(keys["seq"])
            client.close()
        async with joined([one.url], "c"):
            await until(lambda: b[0].sees() == ["b", "c"])


@pytest.mark.trio
async def test_who_leaves_is_gone_at_once_and_who_is_replaced_is_not(redis: Redis) -> None:
    async with tracker(redis.url) as one, joined([one.url], "a") as (a,):
        async with joined([one.url], "b"):
            await until(lambda: a[0].sees() == ["a", "b"])
        await until(lambda: a[0].sees() == ["a"])
        async with joined([one.url], "c", leaves=False):
            await until(lambda: a[0].sees() == ["a", "c"])
        assert "c" in one.tracker.store.clusters["prod"].members


@pytest.mark.trio
async def test_several_reporters_isolate_over_two_trackers(redis: Redis) -> None:
    async with (tracker(redis.url) as one, tracker(redis.url) as two,
                joined([one.url], "a", "b", "liar") as (a, _, liar), joined([two.url], "c") as (c,)):
        for node in (a, c):
            await until(lambda node=node: len(node[0].sees()) == 4)
        a[0].bad = [Report("liar", "lied")]
        a[1].news()
        c[0].bad = [Report("liar", "lied")]
        c[1].news()
        for node in (a, c):
            await until(lambda node=node: node[0].sees() == ["a", "b", "c"])
            assert node[1].describe()["isolated"] == ["liar"]
        await until(lambda: liar[1].describe()["isolated"] == ["liar"])


@pytest.mark.trio
async def test_a_word_is_wanted_and_may_be_replaced(tmp_path: Path) -> None:
    words = [tmp_path / "tracker", tmp_path / "node", tmp_path / "wrong"]
    for file in words:
        file.write_text("correct-horse-battery\n" if file.name != "wrong" else "another-word-altogether\n")
        file.chmod(0o600)
    async with tracker(token_file=str(words[0])) as one:
        for client in (TrackerClient([one.url]), TrackerClient([one.url], token_file=str(words[2]))):
            with pytest.raises(PeerRefusedError):
                await client.request("GET", "/v1/clusters")
            await client.aclose()
        client = TrackerClient([one.url], token_file=str(words[1]))
        await client.request("GET", "/v1/clusters")
        for file in words[:2]:
            file.write_text("the-next-word-of-ours\n")
        await client.request("GET", "/v1/clusters")
        with pytest.raises(NotFoundError):
            await client.request("GET", "/v1/nothing")
        words[1].chmod(0o644)
        with pytest.raises(ConfigError, match="can be read by others"):
            await client.request("GET", "/v1/clusters")
        await client.aclose()
    assert stat.S_IMODE(words[0].stat().st_mode) == 0o600


async def talk(address: str, *pieces: bytes) -> bytes:
    """What a tracker answers to bytes."""
    host, _, port = address.rpartition(":")
    stream = await trio.open_tcp_stream(host, int(port))
    found = b""
    async with stream:
        with trio.move_on_after(30.0), contextlib.suppress(trio.BrokenResourceError):
            for piece in pieces:
                await stream.send_all(piece)
            while data := await stream.receive_some(65536):
                found += bytes(data)
    return found


@pytest.mark.parametrize(("data", "status"), [
    (b"\x16\x03\x01\x00\xa5" + b"\0" * 100 + b"\r\n\r\n", b"400"),
    (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000, b"431"),
    (b"POST /v1/clusters/c/beat HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\n\r\n" + b"[" * 1_000_000, b"413"),
    (b"POST /nothing HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n12345", b"404"),
    (b"GET /..%2f..%2fetc HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", b"404"),
    (b"HEAD /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", b"200"),
    (b"BREW /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", b"404"),
], ids=["tls", "long header", "long body", "body nobody wants", "path", "head", "method"])
@pytest.mark.trio
async def test_bytes_that_are_no_request_get_one_line(data: bytes, status: bytes) -> None:
    async with tracker() as one:
        answer = await talk(one.tracker.addresses[0], data)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert answer[9:12] == status, answer[:200]
        assert len(body.splitlines()) <= 1
        assert b"200" in (await talk(one.tracker.addresses[0], b"GET /readyz HTTP/1.1\r\nHost: a\r\nConnection: close"
                                                               b"\r\n\r\n"))[:20]
        assert head


@pytest.mark.trio
async def test_requests_that_come_in_one_piece_or_in_many_are_answered_in_order() -> None:
    requests = [b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n",
                b"POST /v1/clusters/c/beat HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}",
                b"GET /readyz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"]
    whole = b"".join(requests)
    async with tracker() as one:
        for pieces in ([whole], [bytes([byte]) for byte in whole], [whole[:150], whole[150:]], requests):
            answer = await talk(one.tracker.addresses[0], *pieces)
            assert re.findall(rb"HTTP/1\.1 (\d+)", answer) == [b"200", b"404", b"400", b"200"], pieces


@pytest.mark.trio
async def test_silent_and_slow_clients_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECTION_COUNT_MAX", 8)
    monkeypatch.setattr(conversation, "REQUEST_S", 0.5)
    async with tracker() as one, contextlib.AsyncExitStack() as stack:
        host, _, port = one.tracker.addresses[0].rpartition(":")
        for _ in range(30):
            await stack.enter_async_context(await trio.open_tcp_stream(host, int(port)))
        half = b"POST /v1/clusters/c/beat HTTP/1.1\r\nHost: a\r\n"
        slow = [await stack.enter_async_context(await trio.open_tcp_stream(host, int(port))) for _ in range(3)]
        for stream, sent in zip(slow, (half, half + b"Content-Length: 9\r\n\r\n{", b"P"), strict=True):
            await stream.send_all(sent)
        client = TrackerClient([one.url])
        await client.request("GET", "/readyz")
        with trio.fail_after(20.0):
            for stream in slow:
                assert await stream.receive_some(1) == b"", "who never ends its request is cut off"
        await client.aclose()


def test_the_command_says_where_it_listens_and_ends_in_order(redis: Redis) -> None:
    words = [sys.executable, "-m", "lazyfs", "tracker", "--address", "127.0.0.1:0", "--redis", redis.url, "--json"]
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    try:
        address = json.loads(process.stdout.readline())["addresses"][0]
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=START_S) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
            process.send_signal(signal.SIGTERM)
            assert process.wait(START_S) == 0
            assert all(json.loads(line) for line in process.communicate()[1].splitlines())
    finally:
        process.kill()
        process.communicate()


def test_the_command_refuses_what_cannot_be(tmp_path: Path) -> None:
    for words, expected in ((["--redis", "redis://user:secret@host"], b"--redis: expected"),
                            (["--address", "nowhere:port"], b"--address: expected"),
                            (["--address", "nowhere.invalid:1"], b"tracker.address nowhere.invalid:1 cannot be used")):
        process = subprocess.run([sys.executable, "-m", "lazyfs", "tracker", *words], env=environment(), check=False,
                                 capture_output=True, timeout=60)
        assert process.returncode != 0
        assert expected in process.stderr
        assert b"Traceback" not in process.stderr
        assert b"secret" not in process.stderr


@pytest.mark.trio
async def test_lists_and_names_give_the_same_members_without_a_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [OSError("no such name"), ["10.0.0.1", "10.0.0.2"], ["10.0.0.2", "10.0.0.3"]]

    async def look(_name: str, port: int, **_more: object) -> list[tuple[Any, ...]]:
        await trio.lowlevel.checkpoint()
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(found, OSError):
            raise found
        return [(2, 1, 6, "", (host, port)) for host in found]

    monkeypatch.setattr(trio.socket, "getaddrinfo", look)
    monkeypatch.setattr("lazyfs.peers.membership.DNS_EVERY_S", 0.02)
    me = Member("10.0.0.2-9451", "10.0.0.2:9451")
    by_dns, by_list = Node(), Node()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(DnsMembership(me, by_dns, "nodes.example:9451").run)
        nursery.start_soon(ListedMembership(me, by_list, ["10.0.0.2:9451", "10.0.0.3:9451"]).run)
        await until(lambda: by_dns.sees() == by_list.sees() == ["10.0.0.2-9451", "10.0.0.3-9451"])
        assert by_dns.views[KEY].members == by_list.views[KEY].members
        nursery.cancel_scope.cancel()
