"""Connections that are passed on: every byte, in order, however slow a side is; the one frame that is left out."""

from __future__ import annotations

import queue
import random
import select
import socket
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.relay import GREETING, PAIRS_MAX, Acknowledged, Relay

if TYPE_CHECKING:
    from collections.abc import Callable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
ACK = b"\0\0\0\4\1\0\0\0\0"
WAIT_S = 20.0
_END, _ADD = b".", b"+"


def frame(kind: int, payload: bytes, flags: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + b"\0\0\0\1" + payload


class Running:
    """A relay in a thread of its own, until `finish()`."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.given_back: queue.SimpleQueue[tuple[socket.socket, bytes, bool]] = queue.SimpleQueue()
        self.relay = Relay(self.epoll, lambda *found: self.given_back.put(found))
        self.ended, self.wakes = socket.socketpair()
        self.epoll.register(self.ended, select.EPOLLIN)
        self.adding: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.spins = 0
        self.thread = threading.Thread(target=self.run)

    def pair(self, *, greeted: bool = False) -> tuple[socket.socket, socket.socket]:
        (client, one), (two, server) = socket.socketpair(), socket.socketpair()
        self.relay.add(one, two, greeted=greeted)
        for end in (client, server):
            end.settimeout(WAIT_S)
        return client, server

    def run(self) -> None:
        while True:
            for number, events in self.epoll.poll(WAIT_S):
                self.spins += 1
                if self.relay.handle(number, events):
                    continue
                if self.ended.recv(1) == _END:
                    return
                self.adding.get_nowait()()

    def add(self, client: socket.socket, server: socket.socket, *, greeted: bool, early: bytes) -> None:
        """On the thread that runs: a relay has one."""
        self.adding.put(lambda: self.relay.add(client, server, greeted=greeted, early=early))
        self.wakes.send(_ADD)

    def finish(self) -> None:
        self.wakes.send(_END)
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        self.relay.close()
        self.epoll.close()
        self.ended.close()
        self.wakes.close()


def receive(end: socket.socket, size: int) -> bytes:
    parts = []
    while size and (part := end.recv(min(size, 65536))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def test_both_ways_at_once_with_slow_readers() -> None:
    running = Running()
    client, server = running.pair()
    running.thread.start()
    data = random.Random(1).randbytes(8 << 20)
    senders = [threading.Thread(target=end.sendall, args=(data,)) for end in (client, server)]
    for sender in senders:
        sender.start()
    for end in (client, server):   # one after the other: meanwhile that way is full, and nobody reads it
        assert receive(end, len(data)) == data
    for sender in senders:
        sender.join(WAIT_S)
    client.close()
    assert server.recv(1) == b"", "an end is told on"
    running.finish()
    assert not running.relay.count
    server.close()


def test_who_closes_with_bytes_on_the_way_makes_nobody_spin() -> None:
    running = Running()
    client, server = running.pair()
    running.thread.start()
    data = b"x" * (4 << 20)
    sender = threading.Thread(target=lambda: (server.sendall(data), server.close()))
    sender.start()
    first = receive(client, 1 << 20)
    spins = running.spins
    assert first == data[: 1 << 20]
    rest = receive(client, len(data))
    sender.join(WAIT_S)
    assert first + rest == data
    assert running.spins - spins < 2000
    client.close()
    running.finish()


@pytest.mark.parametrize("greeted", [False, True])
def test_a_client_that_was_not_answered_is_given_back_with_what_it_said(*, greeted: bool) -> None:
    running = Running()
    client, server = running.pair(greeted=greeted)
    running.thread.start()
    said = PREFACE + frame(4, b"") + ACK + frame(1, b"request")
    client.sendall(said)
    heard = said.replace(ACK, b"") if greeted else said
    assert receive(server, len(heard)) == heard
    server.close()
    again, early, was_greeted = running.given_back.get(timeout=WAIT_S)
    assert (early, was_greeted) == (said, greeted)
    assert running.relay.count == 0
    one, other = socket.socketpair()
    other.settimeout(WAIT_S)
    running.add(again, one, greeted=greeted, early=early)
    client.sendall(frame(0, b"more"))
    wanted = heard + frame(0, b"more")
    assert receive(other, len(wanted)) == wanted
    other.sendall(b"answer")
    assert receive(client, 6) == b"answer"
    other.close()
    assert client.recv(1) == b"", "an answered client is told"
    client.close()
    running.finish()
    assert running.given_back.empty()


def test_a_greeted_client_is_heard_once_in_what_it_acknowledges() -> None:
    running = Running()
    client, server = running.pair(greeted=True)
    running.thread.start()
    client.sendall(PREFACE + frame(4, b"") + ACK + frame(1, b"request") + ACK)
    wanted = PREFACE + frame(4, b"") + frame(1, b"request") + ACK
    assert receive(server, len(wanted)) == wanted
    server.sendall(GREETING)
    assert receive(client, 9) == GREETING
    client.close()
    server.close()
    running.finish()


@given(st.lists(st.tuples(st.sampled_from([0, 1, 8]), st.binary(max_size=40)), max_size=6),
       st.lists(st.tuples(st.sampled_from([0, 1, 4]), st.binary(max_size=40)), max_size=6), st.data())
def test_the_first_acknowledgement_is_taken_out_wherever_the_bytes_are_cut(
    before: list[tuple[int, bytes]], after: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    head = PREFACE + b"".join(frame(*one) for one in before)
    tail = b"".join(frame(*one) for one in after) + ACK
    stream = head + ACK + tail
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reading = Acknowledged()
    places = zip([0, *cuts], [*cuts, len(stream)], strict=True)
    found = b"".join(reading.feed(stream[start:end]) for start, end in places)
    assert found == head + tail


@pytest.mark.parametrize("seed", range(20))
def test_bytes_that_are_no_frames_are_passed_on(seed: int) -> None:
    data = random.Random(seed).randbytes(5000).replace(b"\4", b"\5")   # no SETTINGS in it
    reading = Acknowledged()
    found = b"".join(reading.feed(data[start : start + 7]) for start in range(0, len(data), 7))
    assert data.startswith(found)
    assert len(data) - len(found) < 9


def test_pairs_are_counted() -> None:
    running = Running()
    ends = [end for _ in range(3) for end in running.pair()]
    assert running.relay.count == 3 < PAIRS_MAX
    running.thread.start()
    ends[0].close()
    assert ends[1].recv(1) == b""
    running.finish()
    for end in ends[1:]:
        end.close()
