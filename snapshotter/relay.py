"""
Connections passed on: what comes in at one end goes out at the other, byte for byte, until either side closes.

The one thing that it knows of HTTP/2: a client gives a connection up when it is not greeted within a second or so
(containerd does), and its request fails. So who waits for a server is greeted at once, by an empty SETTINGS frame
(RFC 9113 3.4). The client acknowledges it and later that of the server: the server must see one of the two.
A server that closes before it has said anything was just dying: the client is given back, with what it had said.

Light to import. Layer: snapshotter, below all else of it. Who calls: snapshotter.door. Invariants: an end is read only
while nothing waits to be written to its peer, so a pair holds 64 KiB at most each way; nothing here blocks.
"""

from __future__ import annotations

import contextlib
import select
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

GREETING: Final = b"\0\0\0\4\0\0\0\0\0"      # length 0, SETTINGS, no flags, stream 0
PAIRS_MAX: Final = 256           # connections; containerd has one, `lazyfs pull` and kubelet one each
_PIECE_BYTES: Final = 64 * 1024
_EARLY_BYTES_MAX: Final = 256 * 1024   # a client may send 64 KiB of bodies, and headers, before it hears of the server
_PREFACE_BYTES: Final = 24       # what a client begins with
_HEADER_BYTES: Final = 9
_SETTINGS, _ACK = 4, 1
_GONE: Final = select.EPOLLHUP | select.EPOLLERR


class Acknowledged:
    """A client's bytes without its first acknowledgement of SETTINGS."""

    def __init__(self) -> None:
        self._through = _PREFACE_BYTES   # bytes until the next frame's header
        self._held = b""                 # a part of a header
        self._found = False

    def feed(self, data: bytes) -> bytes:
        """What goes on of these bytes, and of those held before."""
        if self._found:
            return data
        data, through = self._held + data, self._through
        while len(data) - through >= _HEADER_BYTES:
            length = int.from_bytes(data[through : through + 3], "big")
            kind, flags = data[through + 3], data[through + 4]
            if (kind, flags & _ACK) == (_SETTINGS, _ACK):
                self._found, self._held = True, b""
                return data[:through] + data[through + _HEADER_BYTES + length:]
            through += _HEADER_BYTES + length
        self._held = data[through:]
        self._through = max(0, through - len(data))
        return data[:through]


class _End:
    """
    One socket of a pair. `pending`: to be written here. `mask`: what epoll looks for; 0: it is not in there.

    `early`: all that this client has said, while the server has said nothing; else None.
    """

    def __init__(self, connection: socket.socket, reading: Acknowledged | None, early: bytes | None) -> None:
        self.connection = connection
        self.number = connection.fileno()
        self.reading = reading
        self.early = early
        self.peer: _End = self
        self.pending = b""
        self.mask = 0


class Relay:
    """
    All pairs, on somebody's epoll object.

    `give_back`: takes a client that its server has not answered, all its bytes, and whether it was greeted.
    """

    def __init__(self, epoll: select.epoll, give_back: Callable[[socket.socket, bytes, bool], None]) -> None:
        self._epoll = epoll
        self._give_back = give_back
        self._ends: dict[int, _End] = {}

    @property
    def count(self) -> int:
        """How many pairs there are."""
        return len(self._ends) // 2

    def add(self, client: socket.socket, server: socket.socket, *, greeted: bool = False, early: bytes = b"") -> None:
        """
        Pass on between two connected sockets; they are ours now.

        `greeted`: the client was sent GREETING. `early`: what it has said before.
        """
        ends = _End(client, Acknowledged() if greeted else None, early), _End(server, None, None)
        ends[0].peer, ends[1].peer = ends[1], ends[0]
        ends[1].pending = early if ends[0].reading is None else ends[0].reading.feed(early)
        for end in ends:
            end.connection.setblocking(False)
            self._ends[end.number] = end
            self._watch(end)

    def handle(self, number: int, events: int) -> bool:
        """Do what epoll says of a descriptor. Returns whether it is one of ours."""
        end = self._ends.get(number)
        if end is None:
            return False
        try:
            if events & select.EPOLLOUT:
                self._write(end)
            if events & (select.EPOLLIN | _GONE) and not end.peer.pending:
                self._read(end)
        except BlockingIOError:
            pass
        except OSError:
            self._lost(end if end.early is not None else end.peer)
        if number in self._ends:
            self._watch(end)
            self._watch(end.peer)
        return True

    def close(self) -> None:
        for end in list(self._ends.values()):
            self._close(end)

    def _read(self, end: _End) -> None:
        data = end.connection.recv(_PIECE_BYTES)
        if not data:
            self._lost(end.peer)
            return
        end.peer.early = None
        if end.early is not None:
            end.early = end.early + data if len(end.early) + len(data) <= _EARLY_BYTES_MAX else None
        end.peer.pending = data if end.reading is None else end.reading.feed(data)
        self._write(end.peer)

    def _write(self, end: _End) -> None:
        with contextlib.suppress(BlockingIOError):
            while end.pending:
                end.pending = end.pending[end.connection.send(end.pending):]

    def _watch(self, end: _End) -> None:
        """An end that may be neither read nor written now is taken out: a closed one would be reported for ever."""
        mask = (0 if end.peer.pending else select.EPOLLIN) | (select.EPOLLOUT if end.pending else 0)
        if mask == end.mask:
            return
        if not mask:
            self._epoll.unregister(end.number)
        elif end.mask:
            self._epoll.modify(end.number, mask)
        else:
            self._epoll.register(end.number, mask)
        end.mask = mask

    def _lost(self, end: _End) -> None:
        """The other side of `end` has gone."""
        if end.early is None:
            self._close(end)
            return
        self._forget(end)
        self._close(end.peer)
        self._give_back(end.connection, end.early, end.reading is not None)

    def _close(self, end: _End) -> None:
        for one in (end, end.peer):
            if self._forget(one):
                one.connection.close()

    def _forget(self, end: _End) -> bool:
        known = self._ends.pop(end.number, None) is not None
        if end.mask:
            self._epoll.unregister(end.number)
            end.mask = 0
        return known
