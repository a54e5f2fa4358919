"""Health over HTTP: what is answered, and that no client, however odd, does more than ask."""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
import trio

from lazyfs.node import health
from tests.daemonkit import WAIT_S, running_daemon
from tests.mountkit import Machine, require_mounting
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

READY: dict[str, Any] = {"ready": True, "mounts": 3, "broken": []}


@pytest.fixture
async def server(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    monkeypatch.setattr(health, "_CONNECTION_S", 0.5)
    state = dict(READY)
    port = free_port()
    nursery.start_soon(health.serve, f"127.0.0.1:{port}", lambda: dict(state))
    with trio.fail_after(10):
        while True:
            try:
                await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
                break
            except OSError:
                await trio.sleep(0.02)
    yield port, state
    nursery.cancel_scope.cancel()


async def ask(port: int, data: bytes) -> bytes:
    """Send, then everything until the server closes."""
    found = b""
    with trio.fail_after(10):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(data)
            try:
                async for part in stream:
                    found += part
            except trio.BrokenResourceError:
                pass   # closed with something of ours unread
    return found


def request(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ")[1])


@pytest.mark.trio
async def test_alive_and_ready(server: tuple[int, dict[str, Any]]) -> None:
    port, state = server
    answer = await ask(port, request("/healthz"))
    assert status_of(answer) == 200
    answer = await ask(port, request("/readyz?verbose"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert status_of(answer) == 200
    assert json.loads(body) == READY
    assert b"Connection: close" in head
    state["ready"] = False
    assert status_of(await ask(port, request("/readyz"))) == 503
    assert status_of(await ask(port, request("/healthz"))) == 200
    answer = await ask(port, request("/readyz", "HEAD"))
    assert answer.endswith(b"\r\n\r\n")
    assert status_of(await ask(port, request("/other"))) == 404
    assert status_of(await ask(port, request("/readyz", "POST"))) == 405


@pytest.mark.parametrize("data", [b"\0\xff\r\n\r\n", b"GET /readyz", b"GET / HTTP/9.9\r\n\r\n", b"A" * 100_000,
                                  b"GET /readyz HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000, b"\r\n" * 30_000, b""])
@pytest.mark.trio
async def test_odd_clients_are_sent_away_in_time(server: tuple[int, dict[str, Any]], data: bytes) -> None:
    port, _ = server
    try:
        answer = await ask(port, data)
    except trio.BrokenResourceError:
        answer = b""
    assert not answer or 400 <= status_of(answer) < 506
    assert status_of(await ask(port, request("/readyz"))) == 200


@pytest.mark.trio
async def test_silent_clients_do_not_keep_others_out(server: tuple[int, dict[str, Any]]) -> None:
    port, _ = server
    silent = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(3 * health._CONNECTION_COUNT_MAX)]
    assert status_of(await ask(port, request("/readyz"))) == 200
    for stream in silent:
        await stream.aclose()


@pytest.mark.trio
async def test_a_port_that_is_taken_is_tried_again(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(health, "_RETRY_S", 0.05)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        nursery.start_soon(health.serve, f"127.0.0.1:{port}", lambda: dict(READY))
        with trio.fail_after(10):
            while "cannot be used" not in caplog.text:  # noqa: ASYNC110 - a log tells nobody
                await trio.sleep(0.01)
    with trio.fail_after(10):
        while True:
            try:
                assert status_of(await ask(port, request("/healthz"))) == 200
                break
            except OSError:
                await trio.sleep(0.02)
    nursery.cancel_scope.cancel()


@pytest.mark.mount
def test_the_daemon_serves_it_over_the_death_of_a_worker(tmp_path: Path) -> None:
    require_mounting()
    machine = Machine(tmp_path)
    port = free_port()
    config = tmp_path / "config.toml"
    config.write_text(f"[daemon]\nhealth_address = '127.0.0.1:{port}'\n")
    try:
        with running_daemon(machine, "--config", str(config)) as daemon:
            assert wait_ready(port)["pid"] == daemon.worker()
            worker = daemon.worker()
            os.kill(worker, 9)
            daemon.wait_ready(not_worker=worker)
            assert wait_ready(port)["pid"] == daemon.worker() != worker
            daemon.stop()
    finally:
        machine.close()


def wait_ready(port: int) -> dict[str, Any]:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                found: dict[str, Any] = json.loads(answer.read())
                return found
        except (OSError, urllib.error.URLError):
            assert time.monotonic() < deadline
            time.sleep(0.05)
