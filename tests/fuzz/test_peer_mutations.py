"""Whatever bytes a peer sends, on either side: an answer, an error, or the end; and the next one is served."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING

import lz4.block
import pytest
import trio

from lazyfs.errors import FormatError, PeerError
from lazyfs.peers import handshake, wire
from lazyfs.peers.channel import Channel
from lazyfs.peers.client import PeerClient
from lazyfs.peers.model import Member
from tests.peerwire import FileStore, OpenGate, asking, pair_of, resource_of, until

if TYPE_CHECKING:
    from pathlib import Path

RESOURCE = resource_of(4 * 4096 + 77, 4096)
CONTENT = bytes(4096) + random.Random(3).randbytes(RESOURCE.size - 4096)
REQUEST = asking(RESOURCE, range(5))
FRAMES, STREAMS = 3000, 150     # mutations; a hundred times as many were run while this was written


def times(request: pytest.FixtureRequest, count: int) -> int:
    return int(count * request.config.getoption("--fuzz"))


def mutated(rng: random.Random, good: bytes) -> bytes:
    """A few bytes changed, left out, put in or said twice; one in ten ends early."""
    data = bytearray(good)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at, size = rng.randrange(len(data)), rng.choice([1, 2, 4, 12, 60])
        if rng.random() < 0.5:
            at = min(at, rng.randrange(100))        # where the numbers are
        kind = rng.randrange(5)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xC0, 0xFF])
        elif kind == 2 and len(data) > 200:
            del data[at:at + size]
        elif kind == 3:
            data[at:at] = data[at:at + size]
        else:
            data[at:at + size] = rng.randbytes(len(data[at:at + size]))
    if rng.random() < 0.1:
        del data[rng.randrange(len(data)):]
    return bytes(data)


def answer() -> bytes:
    """A good answer: pieces of both encodings, beats, an error, the end."""
    packed = lz4.block.compress(CONTENT[:4096], store_size=False)
    found = wire.head(wire.Frame.ALIVE, 1, 0) + wire.piece_head(1, 0, 4096, wire.Encoding.LZ4, len(packed)) + packed
    for index in (2, 3):
        data = CONTENT[index * 4096:][:4096]
        found += wire.piece_head(1, index, 4096, wire.Encoding.RAW, 4096) + data
    found += wire.trouble_frame(1, wire.Trouble(wire.Code.BUSY, "full", 1.5, ("10.0.0.1:7",), 1))
    last = CONTENT[4 * 4096:]
    return found + wire.piece_head(1, 4, 77, wire.Encoding.RAW, 77) + last + wire.head(wire.Frame.END, 1, 0)


def test_parsers_raise_nothing_else(request: pytest.FixtureRequest) -> None:
    rng = random.Random(11)
    question = wire.request_frame(1, REQUEST, "a token")
    trouble = wire.trouble_frame(1, wire.Trouble(wire.Code.BUSY, "full", 1.5, ("10.0.0.1:7",), 1))
    accepted = 0
    for parse, good in ((wire.parse_request, question), (wire.parse_trouble, trouble)):
        for _ in range(times(request, FRAMES)):
            with contextlib.suppress(FormatError):
                parse(mutated(rng, good[wire.HEAD.size:]))
                accepted += 1
    assert 0 < accepted < 2 * FRAMES * max(1.0, request.config.getoption("--fuzz"))


@pytest.mark.trio
async def test_mutated_requests(tmp_path: Path, request: pytest.FixtureRequest,
                                caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(12)
    path = tmp_path / "device"
    path.write_bytes(CONTENT)
    good = b"".join([wire.request_frame(1, REQUEST, "good"), wire.head(wire.Frame.CANCEL, 1, 0),
                     wire.request_frame(2, REQUEST, "")])
    async with pair_of(FileStore(path)) as pair:
        host, _, port = pair.member.address.rpartition(":")
        for _ in range(times(request, STREAMS)):
            async with await trio.open_tcp_stream(host, int(port)) as stream:
                await handshake.ask(Channel(stream), pair.member.address)
                with contextlib.suppress(trio.BrokenResourceError), trio.fail_after(20):
                    await stream.send_all(mutated(rng, good))
                    await stream.send_eof()
                    while await stream.receive_some(1 << 16):
                        pass
        await until(lambda: not pair.uploads.open_requests)
        assert await pair.get(REQUEST) == pair.content(REQUEST)
    assert [record for record in caplog.records if record.levelname in {"ERROR", "WARNING"}] == []


@pytest.mark.trio
async def test_mutated_answers(request: pytest.FixtureRequest) -> None:
    """Pieces have their size, whatever their bytes (their digest is checked by who takes them), and each comes once."""
    rng = random.Random(13)
    good = answer()

    async def serve(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, PeerError):
            if await handshake.answer(Channel(stream)) and await stream.receive_some(1000):
                await stream.send_all(mutated(rng, good))

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    outcomes = {"whole": 0, "error": 0}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        client = PeerClient(OpenGate())
        nursery.start_soon(client.run)
        member = Member("liar", f"127.0.0.1:{listeners[0].socket.getsockname()[1]}")
        for _ in range(times(request, STREAMS)):
            seen = set()
            try:
                with trio.fail_after(20):
                    async with client.ask(member, REQUEST) as pieces:
                        async for piece in pieces:
                            assert piece.index in REQUEST.indexes
                            assert piece.index not in seen
                            assert len(piece.data) == RESOURCE.piece_bytes(piece.index)
                            seen.add(piece.index)
            except PeerError:
                outcomes["error"] += 1
            else:
                outcomes["whole"] += 1
        nursery.cancel_scope.cancel()
    assert outcomes["error"] > 0
