"""What strangers send to a tracker's port: nobody costs it memory, or speaks past who stands between."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from lazyfs.tracker import server
from tests.fault.test_tracker_faults import talk
from tests.trackerkit import tracker

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.trio
BEAT = b"POST /v1/clusters/c/beat HTTP/1.1\r\nHost: a\r\n"
LAST = b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
WORD = "the-word-of-this-tracker"


def word_in(path: Path) -> str:
    path.write_text(WORD)
    path.chmod(0o600)
    return str(path)


@pytest.mark.parametrize("head", [
    BEAT + b"Content-Length: 500000\r\n\r\n",
    BEAT + b"Content-Length: 500000\r\nConnection: close\r\n\r\n{",
    BEAT + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"mem\r\n',
    b"POST /v1/clusters/c/preheat HTTP/1.1\r\nHost: a\r\nContent-Length: 500000\r\n\r\n{",
    b"POST /oapi/v1/jobs HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n{",
], ids=["beat", "other HTTP", "chunks", "preheat", "harbor"])
async def test_a_body_of_who_shows_no_word_is_not_waited_for(tmp_path: Path, head: bytes) -> None:
    word = word_in(tmp_path / "word")
    async with tracker(token_file=word, preheat_auth="oauth", preheat_secret_file=word) as one:
        with trio.fail_after(server.REQUEST_S - 1):
            answer = await talk(one.tracker.addresses[0], head)
        assert answer[9:12] == b"401", answer[:200]


async def test_who_shows_it_may_send_one(tmp_path: Path) -> None:
    async with tracker(token_file=word_in(tmp_path / "word")) as one:
        for more in (b"", b"Connection: close\r\n"):
            head = BEAT + more + f"Authorization: Bearer {WORD}\r\nContent-Length: 300000\r\n".encode()
            answer = await talk(one.tracker.addresses[0], head + b"\r\n", b"{" + b" " * 299_999, LAST)
            assert answer[9:12] == b"400", answer[:200]     # it was read to its end, and is no beat


async def until_answered(address: str, head: bytes, status: bytes) -> None:
    """Others' bytes may be taken in, or let go, a moment later than ours: so it is asked again."""
    with trio.fail_after(20):
        while (await talk(address, head + b"Content-Length: 300000\r\n\r\n", b"[" * 300_000))[9:12] != status:  # noqa: ASYNC110
            await trio.sleep(0.05)


async def test_bodies_that_come_at_once_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BODIES_BYTES_MAX", 1_000_000)
    async with tracker() as one:
        address = one.tracker.addresses[0]
        host, _, port = address.rpartition(":")
        held = [await trio.open_tcp_stream(host, int(port)) for _ in range(3)]
        for stream in held:
            await stream.send_all(BEAT + b"Content-Length: 300000\r\n\r\n")
        for head in (BEAT, BEAT + b"Connection: close\r\n"):
            await until_answered(address, head, b"503")
        for stream in held:
            await stream.aclose()
        await until_answered(address, BEAT + b"Connection: close\r\n", b"400")


async def test_a_length_that_is_said_in_two_ways_ends_the_connection() -> None:
    both = BEAT + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    async with tracker() as one:
        answer = await talk(one.tracker.addresses[0], both + b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
    assert answer[9:12] == b"400"
    assert answer.count(b"HTTP/1.1 ") == 1
