"""Peers on loopback: pieces come, several in one answer; what goes wrong on either side ends soon, alone."""

from __future__ import annotations

import os
import random
import threading
import time
from typing import TYPE_CHECKING

import pytest
import trio

from lazyfs.errors import PeerBusyError, PeerError, PeerLacksError, PeerRefusedError
from lazyfs.peers import channel
from lazyfs.peers.hop import Hop
from lazyfs.peers.model import SILENCE_S, Priority
from lazyfs.peers.uploads import UploadLimits
from tests.peerwire import FileStore, Pair, asking, pair_of, resource_of, until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.trio
SIZE = 3_000_001
RESOURCE = resource_of(SIZE)
ALL = range(RESOURCE.piece_count)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "device"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, data: Path) -> FileStore:
    return FileStore(data, in_memory=request.param == "memory")


@pytest.fixture
def files(data: Path) -> FileStore:
    return FileStore(data)


async def test_all_pieces_in_one_answer(store: FileStore) -> None:
    async with pair_of(store) as pair:
        request = asking(RESOURCE, ALL)
        assert await pair.get(request) == pair.content(request)
        assert await pair.get(asking(RESOURCE, [5, 6, 40])) == pair.content(asking(RESOURCE, [5, 6, 40]))
        assert pair.client.connections == 1, "it is kept"
        assert pair.gate.admitted == 1, "a token is checked once"
        seen = store.asked[0][1]
        assert (seen.hops, seen.priority, seen.request) == (0, Priority.FOREGROUND, "1f3a9c02-1")


async def test_several_requests_at_once(files: FileStore) -> None:
    async with pair_of(files) as pair:
        async def one(first: int) -> None:
            request = asking(RESOURCE, range(first, first + 8))
            assert await pair.get(request) == pair.content(request)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(one, number)
        assert pair.client.connections <= 20
        assert pair.uploads.counters.pieces == 160


async def test_pieces_come_as_soon_as_they_are_there(files: FileStore) -> None:
    """A piece that is late holds up no other."""
    files.late = {0, 1}
    async with pair_of(files) as pair, pair.client.ask(pair.member, asking(RESOURCE, range(6))) as pieces:
        first = [(await anext(pieces)).index for _ in range(4)]
        assert sorted(first) == [2, 3, 4, 5]
        files.gate.set()
        assert sorted([piece.index async for piece in pieces]) == [0, 1]


async def test_what_is_lacking_is_told_after_the_rest(files: FileStore) -> None:
    files.lacks = {3}
    got: dict[int, bytes] = {}
    async with pair_of(files) as pair:
        with pytest.raises(PeerLacksError, match="piece 3 is not here"):
            await pair.get(asking(RESOURCE, range(6)), got)
        assert sorted(got) == [0, 1, 2, 4, 5]
        await pair.get(asking(RESOURCE, [1]))
        assert pair.client.connections == 1, "the connection is as good as before"


async def test_a_token_that_is_not_good(files: FileStore) -> None:
    async with pair_of(files) as pair:
        pair.gate.shown = "stolen"
        with pytest.raises(PeerRefusedError, match="the token is not good"):
            await pair.get(asking(RESOURCE, [1]))
        assert files.asked == []
        pair.gate.shown = "good"
        assert len(await pair.get(asking(RESOURCE, [1]))) == 1


async def test_leaving_early_stops_the_sender(files: FileStore) -> None:
    """What was being fetched for the asker is given up, and the connection is used again."""
    files.late = set(range(10, 40))
    async with pair_of(files) as pair:
        async with pair.client.ask(pair.member, asking(RESOURCE, range(40))) as pieces:
            await anext(pieces)
            await until(lambda: files.waiting)
        await until(lambda: not files.waiting and not pair.uploads.open_requests)
        request = asking(RESOURCE, range(8))
        assert await pair.get(request) == pair.content(request)
        assert pair.client.connections == 1


async def test_an_asker_that_is_cancelled(files: FileStore) -> None:
    files.late = {7}
    async with pair_of(files) as pair:
        with trio.move_on_after(0.2):
            await pair.get(asking(RESOURCE, [7]))
        await until(lambda: not files.waiting and not pair.uploads.open_requests)


async def test_too_late(files: FileStore) -> None:
    """The asker's deadline is the answerer's too, who says so; it was never silent before."""
    files.late = {7}
    async with pair_of(files) as pair:
        with pytest.raises(PeerError, match="could not be had in the time"):
            await pair.get(asking(RESOURCE, [6, 7], seconds=0.7))
        assert not files.waiting
        assert len(await pair.get(asking(RESOURCE, [6]))) == 1
        assert pair.client.connections == 1


async def test_a_server_that_went_away_and_came_back(files: FileStore, data: Path) -> None:
    """Connections that died while idle are found out at the next use, and that use does not fail."""
    async with pair_of(files) as pair:
        await pair.get(asking(RESOURCE, [1]))
        pair.server.cancel()
        port = int(pair.member.address.rpartition(":")[2])
        await until(lambda: not pair.uploads.open_requests)
        again = FileStore(data)
        listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
        async with trio.open_nursery() as nursery:
            from lazyfs.peers.server import serve  # noqa: PLC0415

            nursery.start_soon(serve, listeners, again, pair.gate, pair.uploads)
            assert len(await pair.get(asking(RESOURCE, [1, 2]))) == 2
            nursery.cancel_scope.cancel()
        again.close()
        with pytest.raises(PeerError):
            await pair.get(asking(RESOURCE, [1]))


async def _fill(pair: Pair, nursery: trio.Nursery, count: int, priority: Priority) -> None:
    """So many requests open at the server, none of which gets anything."""
    async def one() -> None:
        await pair.get(asking(RESOURCE, [0], priority=priority))

    for _ in range(count):
        nursery.start_soon(one)
    await until(lambda: pair.uploads.open_requests == count)


async def test_busy_with_a_better_address(files: FileStore) -> None:
    files.late = {0}
    async with pair_of(files, UploadLimits(per_peer=3), better=("10.0.0.9:4000",)) as pair:
        async with trio.open_nursery() as nursery:
            await _fill(pair, nursery, 3, Priority.FOREGROUND)
            with pytest.raises(PeerBusyError, match="of this peer") as caught:
                await pair.get(asking(RESOURCE, [1]))
            assert caught.value.better == ("10.0.0.9:4000",)
            assert caught.value.retry_after_s > 0
            files.gate.set()
        assert len(await pair.get(asking(RESOURCE, [1]))) == 1


async def test_places_are_kept_for_foreground(files: FileStore) -> None:
    files.late = {0}
    async with pair_of(files, UploadLimits(requests=8)) as pair, trio.open_nursery() as nursery:
        await _fill(pair, nursery, 6, Priority.COPY)
        with pytest.raises(PeerBusyError):
            await pair.get(asking(RESOURCE, [1], priority=Priority.COPY))
        assert len(await pair.get(asking(RESOURCE, [1]))) == 1
        files.gate.set()


async def test_compressed_when_the_link_is_slow_and_it_compresses(tmp_path: Path) -> None:
    """At 4 MB/s: text goes compressed, random bytes as they are."""
    text = tmp_path / "text"
    text.write_bytes(b"".join(b"%d bottles of beer\n" % number for number in range(200_000))[:SIZE])
    noise = tmp_path / "noise"
    noise.write_bytes(random.Random(1).randbytes(SIZE))
    for path, compressed in ((text, True), (noise, False)):
        store = FileStore(path)
        async with pair_of(store, UploadLimits(rate=40_000_000), hop=Hop(busy_share=100.0)) as pair:
            request = asking(RESOURCE, ALL)
            assert await pair.get(request) == pair.content(request)
            counters = pair.uploads.counters
            assert counters.plain_bytes == SIZE
            assert (counters.wire_bytes < SIZE * 0.7) == compressed, counters


async def test_the_rate_is_kept(files: FileStore) -> None:
    async with pair_of(files, UploadLimits(rate=6_000_000), hop=Hop(busy_share=0)) as pair:
        began = trio.current_time()
        await pair.get(asking(RESOURCE, ALL))
        assert trio.current_time() - began >= 0.3, "3 MB at 6 MB/s, less a burst of a tenth of a second"


async def test_a_slow_disk_is_read_in_threads_while_beats_are_sent(files: FileStore,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop goes on, and the asker does not take the node for dead."""
    threads = []

    def slow(file: int, offset: int, size: int) -> None:
        threads.append(threading.current_thread())
        assert len(os.pread(file, size, offset)) == size
        time.sleep(SILENCE_S * 1.3)     # what a disk would do

    monkeypatch.setattr(channel, "_in_memory", lambda _file, offset: offset < 64 << 10)
    monkeypatch.setattr(channel, "_read_through", slow)
    async with pair_of(files) as pair:
        request = asking(RESOURCE, range(3))
        assert await pair.get(request) == pair.content(request)
    assert len(threads) == 2
    assert threading.main_thread() not in threads


async def test_a_receiver_that_is_cancelled_loses_nothing() -> None:
    """Whenever that is: a look at the clock in the middle of a piece is such a cancellation."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    sender = await trio.open_tcp_stream("127.0.0.1", listeners[0].socket.getsockname()[1])
    receiver = channel.Channel(await listeners[0].accept())
    data, found, room = random.Random(3).randbytes(200_000), bytearray(), memoryview(bytearray(1000))

    async def cancel(scope: trio.CancelScope) -> None:
        scope.cancel()

    async with listeners[0], sender, trio.open_nursery() as nursery:
        nursery.start_soon(sender.send_all, data)
        with trio.fail_after(30):
            while len(found) < len(data):
                with trio.CancelScope() as scope:
                    nursery.start_soon(cancel, scope)
                    count = 0
                    count = await receiver.receive(room, all_comes=len(found) % 3 > 0)
                found += room[:count]
        await receiver.close()
    assert found == data


async def test_who_is_asked_says_what_it_can_give_with_all_that_it_sends(files: FileStore) -> None:
    """Before its first piece, for who asks may have others to ask; and again when it is another rate."""
    told: list[tuple[str, int]] = []
    files.late = {3}
    async with pair_of(files) as pair:
        pair.client.told_rate = lambda member, step: told.append((member, step))
        await pair.get(asking(RESOURCE, [1, 2]))
        assert told == []
        pair.uploads.giving.step = 24
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.get, asking(RESOURCE, [3]))
            await until(lambda: told)
            files.gate.set()
        pair.uploads.giving.step = 200       # any byte is taken, none beyond what a rate can be is passed on
        await pair.get(asking(RESOURCE, [4]))
        assert told == [(pair.member.id, 24), (pair.member.id, 63)]
