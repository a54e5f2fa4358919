"""
Distance to a server: a TCP proxy that holds every byte back by half a round trip, both ways, and throttles nothing.

For machines whose kernel has no netem. Run it at the server's end of a link (`Link.inside()`), so that what it lets go
is shaped by the link like anything else:

    python -m benchmarks.kit.delay --listen 198.18.0.2:5001 --to 127.0.0.1:5000 --rtt-ms 100 [--slow-start]

The kernel answers a connect() at once, so the handshake's round trip is added to the first bytes of a connection. With
`--slow-start` the answers' bytes in flight are bounded as a new TCP connection bounds them: ten packets at first, as
many more as were acknowledged (RFC 5681, 6928); without, a connection is as if it had been used for long. It serves
until it is killed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import queue
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.kit.proc import Daemon, ToolError

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.kit.link import Link
    from benchmarks.kit.workspace import Workspace

_PIECE_BYTES = 256 * 1024
_HELD_COUNT_MAX = 512  # pieces on their way, a direction: at 1 Gbit/s and 100 ms there are 12 MB
_FIRST_WINDOW_BYTES = 10 * 1460
_WINDOW_BYTES_MAX = 64 << 20
_START_TIMEOUT_S = 20.0


@dataclass(slots=True)
class _Window:
    """The congestion window of one direction, which never loses a packet. For its writer alone."""

    rtt_s: float
    size: int = _FIRST_WINDOW_BYTES
    in_flight: int = 0
    acknowledged: collections.deque[tuple[float, int]] = field(default_factory=collections.deque)

    def take(self, wanted: int) -> int:
        """Wait until bytes may go out; returns how many of `wanted`."""
        while True:
            now = time.monotonic()
            while self.acknowledged and self.acknowledged[0][0] <= now:
                _, count = self.acknowledged.popleft()
                self.in_flight -= count
                self.size = min(self.size + count, _WINDOW_BYTES_MAX)
            count = min(wanted, self.size - self.in_flight)
            if count > 0:
                self.in_flight += count
                self.acknowledged.append((now + self.rtt_s, count))
                return count
            time.sleep(max(self.acknowledged[0][0] - now, 0))


def _carry(
    source: socket.socket, target: socket.socket, delay_s: float, not_before: float, window: _Window | None
) -> None:
    """Bytes of one direction until their end, each `delay_s` after it came. Blocking, two threads."""
    held: queue.Queue[tuple[float, bytes]] = queue.Queue(_HELD_COUNT_MAX)

    def receive() -> None:
        data = b"more"
        while data:
            try:
                data = source.recv(_PIECE_BYTES)
            except OSError:
                data = b""
            held.put((max(time.monotonic(), not_before) + delay_s, data))

    threading.Thread(target=receive, daemon=True).start()
    broken = False
    while True:
        due, data = held.get()
        if not data:
            break
        if not broken:
            time.sleep(max(due - time.monotonic(), 0))
            try:
                _send(target, data, window)
            except OSError:  # the rest is taken and thrown away, so that `receive` ends
                broken = True
                with contextlib.suppress(OSError):
                    source.shutdown(socket.SHUT_RD)
    time.sleep(max(due - time.monotonic(), 0))
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _send(target: socket.socket, data: bytes, window: _Window | None) -> None:
    view = memoryview(data)
    while view:
        count = len(view) if window is None else window.take(len(view))
        target.sendall(view[:count])
        view = view[count:]


def _serve(client: socket.socket, to: tuple[str, int], rtt_s: float, *, slow_start: bool) -> None:
    not_before = time.monotonic() + rtt_s  # the handshake
    with client, socket.socket() as server:
        try:
            server.connect(to)
        except OSError:
            return
        for one in (client, server):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        window = _Window(rtt_s) if slow_start else None
        threads = [
            threading.Thread(target=_carry, args=(client, server, rtt_s / 2, not_before, None), daemon=True),
            threading.Thread(target=_carry, args=(server, client, rtt_s / 2, 0.0, window), daemon=True),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def start_delay(
    place: Workspace, link: Link | None, port: int, to_port: int, rtt_ms: float, *, slow_start: bool = False
) -> str:
    """
    Start a proxy at the far end of a link (None: on loopback) to a server there; returns its host:port.

    It ends with the workspace. Raises ToolError: it does not answer in time.
    """
    address = link.address if link else "127.0.0.1"
    words: list[str | Path] = [
        *(link.inside() if link else []), sys.executable, "-m", "benchmarks.kit.delay", "--listen", f"{address}:{port}",
        "--to", f"{address}:{to_port}", "--rtt-ms", str(rtt_ms), *(["--slow-start"] if slow_start else []),
        "--workspace", place.top,
    ]  # fmt: skip
    daemon = Daemon(words, log=place.top / f"delay-{port}.log")
    place.stack.callback(daemon.close)
    limit = time.monotonic() + _START_TIMEOUT_S
    while not _answers(address, port):
        daemon.check()
        if time.monotonic() > limit:
            raise ToolError(f"no delaying proxy answers at {address}:{port}")
        time.sleep(0.02)
    return f"{address}:{port}"


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kit.delay", description=__doc__)
    parser.add_argument("--listen", type=_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--to", type=_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--rtt-ms", type=float, required=True)
    parser.add_argument("--slow-start", action="store_true")
    parser.add_argument("--workspace", help="whose it is: cleaning up finds it by this")
    options = parser.parse_args()
    with socket.create_server(options.listen, backlog=64) as listener:
        while True:
            client, _ = listener.accept()
            arguments = (client, options.to, options.rtt_ms / 1000)
            threading.Thread(
                target=_serve, args=arguments, kwargs={"slow_start": options.slow_start}, daemon=True
            ).start()


if __name__ == "__main__":
    main()
