"""
Ten thousand members of a cluster, as a tracker sees them: each with a connection of its own, beating as it is told.

    python -m benchmarks.trackerload HOST:PORT MEMBERS SECONDS

They join at _JOIN_RATE, as fast as the tracker answers; when each has the view of all, "steady" is printed
and they beat for SECONDS; then a line of JSON: beats, refusals, seconds from a beat to its answer (p50, p99), seconds
until all had joined, bytes that came meanwhile. One epoll, answers are skimmed: what is measured is the tracker (peer
row 10).
"""

from __future__ import annotations

import heapq
import json
import random
import re
import resource
import select
import socket
import sys
import time
from dataclasses import dataclass, field

import zstandard

from lazyfs.peers.packed import ENCODING

RESOURCES = 10                   # layers of one image
_JOIN_RATE = 200                 # members a second: each gets a view of all that are there
_JOINING_MAX = 512               # that are not answered yet: an answer takes up to 1.5 s, more if the machine is busy
_SKIM_BYTES = 4096               # seconds and versions stand first
_RECEIVE_BYTES = 256 * 1024
_VERSION = re.compile(rb'"(device/sha256:[0-9a-f]{64})":"([0-9a-f]{16})"')
_SECONDS = re.compile(rb'"seconds":([0-9.]+)')
_PACKED = re.compile(rb"(?i)content-encoding: zstd")
_LENGTH = re.compile(rb"(?i)content-length: ([0-9]+)")
_KEYS = [f"device/sha256:{number:064x}" for number in range(RESOURCES)]
_GIVE_UP_S = 240.0
_ACCEPT = f"Accept-Encoding: {ENCODING}\r\n"


@dataclass(slots=True)
class _Member:
    name: str
    connection: socket.socket
    versions: dict[str, str] = field(default_factory=dict)
    asked_at: float = 0.0
    left: int = -1               # bytes of the answer that are still to come; -1: its header is
    head: bytes = b""
    joined: bool = False

    def beat(self, now: float) -> None:
        number = int(self.name[1:])
        said = {"member": {"id": self.name, "address": f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}:9451",
                           "zone": f"zone-{number % 3}"},
                "swarms": {key: {"done": 1000} for key in _KEYS}, "seen": self.versions}
        body = json.dumps(said, separators=(",", ":")).encode()
        head = f"POST /v1/clusters/prod/beat HTTP/1.1\r\nHost: tracker\r\n{_ACCEPT}Content-Length: {len(body)}\r\n\r\n"
        self.asked_at, self.left, self.head = now, -1, b""
        self.connection.sendall(head.encode() + body)

    def heard(self) -> int:
        """Take what has come, and keep the first of it; how many bytes. The answer is whole when `left` is 0."""
        data = self.connection.recv(_RECEIVE_BYTES)
        if not data:
            raise ConnectionError(f"{self.name}: the tracker closed the connection")
        if self.left >= 0:
            self.left -= len(data)
            self.head += data[: max(0, _SKIM_BYTES - len(self.head))]
            return len(data)
        self.head += data
        end = self.head.find(b"\r\n\r\n")
        length = _LENGTH.search(self.head, 0, end) if end >= 0 else None
        if length is not None:
            self.left = int(length[1]) - (len(self.head) - end - 4)
            self.head = self.head[:_SKIM_BYTES]
        return len(data)

    def said(self) -> bytes:
        """The first of an answer's body; what is packed is told in frames, the first of them before the views."""
        head, _, body = self.head.partition(b"\r\n\r\n")
        return zstandard.ZstdDecompressor().decompressobj().decompress(body) if _PACKED.search(head) else body


class Load:
    """All members; `versions` are those of the first one's view, when all have the same."""

    def __init__(self, address: str, count: int) -> None:
        host, _, port = address.rpartition(":")
        self._place = (host, int(port))
        self._count = count
        self._poll = select.epoll()
        self._members: dict[int, _Member] = {}
        self._due: list[tuple[float, int]] = []
        self.beats = self.refused = self.received = self._joining = 0
        self.refusal = ""        # the last one
        self.latencies: list[float] = []

    def join(self) -> None:
        """Everybody comes, at the rate that a tracker is made for."""
        due = time.monotonic()
        for number in range(self._count):
            self.turn(0.0)
            while time.monotonic() < due or self._joining >= _JOINING_MAX:
                self.turn()
            due = max(due, time.monotonic() - 1.0) + 1 / _JOIN_RATE
            connection = socket.create_connection(self._place, timeout=30.0)
            member = _Member(f"n{number}", connection)
            self._members[connection.fileno()] = member
            self._poll.register(connection.fileno(), select.EPOLLIN)
            self._joining += 1
            member.beat(time.monotonic())

    def settle(self) -> None:
        """Until all have the same view."""
        limit = time.monotonic() + _GIVE_UP_S
        while len({tuple(sorted(member.versions.items())) for member in self._members.values()}) > 1:
            if time.monotonic() > limit:
                raise SystemExit("the members' views did not become one")
            until = time.monotonic() + 1.0
            while time.monotonic() < until:
                self.turn()

    def go_on(self, seconds: float) -> None:
        self.beats = self.refused = 0
        self.latencies.clear()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.turn()

    def turn(self, wait_s: float = 0.05) -> None:
        """One look at what came, and who is due."""
        wait_s = min(wait_s, max(0.0, self._due[0][0] - time.monotonic())) if self._due else wait_s
        for number, _ in self._poll.poll(wait_s):
            member = self._members[number]
            self.received += member.heard()
            if member.left == 0:
                self._answered(number, member)
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            self._members[heapq.heappop(self._due)[1]].beat(now)

    def _answered(self, number: int, member: _Member) -> None:
        now = time.monotonic()
        self.beats += 1
        self._joining -= not member.joined
        member.joined = True
        self.latencies.append(now - member.asked_at)
        said = member.said()
        if not member.head.startswith(b"HTTP/1.1 200"):
            self.refused += 1
            self.refusal = member.head[:_SKIM_BYTES].decode("latin-1")
        member.versions = {key.decode(): version.decode() for key, version in _VERSION.findall(said)}
        seconds = _SECONDS.search(said)
        pause_s = float(seconds[1]) if seconds else 5.0
        heapq.heappush(self._due, (now + pause_s * random.uniform(0.85, 1.15), number))


def main() -> None:
    """See above."""
    address, count, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    load = Load(address, count)
    began = time.monotonic()
    load.join()
    load.settle()
    joined_s, joined_bytes = time.monotonic() - began, load.received
    print("steady", flush=True)
    load.go_on(seconds)
    latencies = sorted(load.latencies)
    print(json.dumps({"beats": load.beats, "refused": load.refused, "refusal": load.refusal, "joined_s": joined_s,
                      "joined_bytes": joined_bytes,
                      "p50_s": latencies[len(latencies) // 2], "p99_s": latencies[len(latencies) * 99 // 100]}))


if __name__ == "__main__":
    main()
