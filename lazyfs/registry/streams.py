"""
Bytes of a blob as they come: exact ranges, whole blobs that resume, pieces of local files.

Layer: registry; implements place.ByteStream for all transports. Invariants: a stream gives exactly the bytes it stands
for or raises; no read outlives its bound (RangeStream: the absolute deadline; BlobStream: a least rate, so that a
server dripping a byte at a time cannot hold a conversion for ever).
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Self

from lazyfs.errors import SourceError
from lazyfs.limits import KIB
from lazyfs.registry.retry import wait_or_raise

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from lazyfs.errors import LazyfsError
    from lazyfs.registry.place import ByteStream
    from lazyfs.registry.transport import HttpResponse

# Less than this in a window (twice the I/O timeout: a minute) is no progress: 1 KiB/s, slower than any modem.
PROGRESS_BYTES = 64 * KIB
RANGE_WINDOW_S, RANGE_BYTES_MIN = 3.0, 6 * KIB   # 2 KiB/s: a chunk of 1 MiB would take eight times a read's deadline


class _Stream:
    """What all have in common of ByteStream."""

    __slots__ = ()

    def read(self, size: int) -> bytes:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def readinto(self, view: memoryview) -> int:
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


class RangeStream(_Stream):
    """
    Exactly `size` bytes out of one answer, whose deadline was set when it was asked for.

    Who drips is left before that: less than RANGE_BYTES_MIN in RANGE_WINDOW_S of waiting is no way to get a chunk in
    time, and another server, or connection, may be better. A caller that is slow itself is not the server's fault.
    """

    __slots__ = ("_left", "_response", "_size", "_waited_s", "_window_bytes")

    def __init__(self, response: HttpResponse, size: int) -> None:
        self._response = response
        self._size = self._left = size
        self._waited_s = 0.0
        self._window_bytes = 0

    def read(self, size: int) -> bytes:
        left = self._left
        if left == 0:
            return b""
        began = time.monotonic()
        data = self._response.read(min(left, size))
        self._count(len(data), began)
        return data

    def readinto(self, view: memoryview) -> int:
        left = self._left
        if left == 0:
            return 0
        began = time.monotonic()
        count = self._response.readinto(view[:left])
        self._count(count, began)
        return count

    def _count(self, came: int, began: float) -> None:
        """Note that so many bytes came. Raises SourceError: the body is not as long as it should be, or drips."""
        if not came:
            raise self._wrong(f"the body ended after {self._size - self._left} of {self._size} bytes")
        self._left -= came
        self._window_bytes += came
        self._waited_s += time.monotonic() - began
        if self._waited_s >= RANGE_WINDOW_S:
            if self._left and self._window_bytes < RANGE_BYTES_MIN:
                raise self._wrong(f"only {self._window_bytes} bytes in {self._waited_s:.0f} s")
            self._waited_s, self._window_bytes = 0.0, 0
        if self._left == 0:
            # A chunked body is only right once its end was seen; one with a length was compared beforehand.
            if self._response.length is None and self._response.read(1):
                raise self._wrong(f"the body is longer than {self._size} bytes")
            self._response.finish()

    def _wrong(self, text: str) -> SourceError:
        self._response.close()
        error = SourceError(f"{self._response.where}: {text}")
        self._response.fail(error)
        return error

    @property
    def server(self) -> str:
        """For server_of()."""
        return self._response.server

    def distrust(self, error: LazyfsError) -> bool:
        """For the function of this name."""
        return self._response.fail(error)

    def close(self) -> None:
        self._response.close()


class BlobStream(_Stream):
    """A whole blob; continues by range request where a connection broke. `reopen(offset)` asks for the rest."""

    def __init__(self, reopen: Callable[[int], HttpResponse], size: int, *, io_timeout_s: float, patience_s: float,
                 retry_count: int) -> None:
        self._reopen = reopen
        self._size = size
        self._offset = 0
        self._response: HttpResponse | None = reopen(0) if size else None
        self._last = self._response          # whose bytes came last
        self._window_s = 2 * io_timeout_s
        self._patience_s = patience_s        # without progress, all retries together
        self._retry_count = retry_count
        self._failure_count = 0
        self._failed_at_offset = 0
        self._give_up_at = 0.0
        self._waited_s = 0.0                 # waiting inside read() only: a slow caller is not the server's fault
        self._window_bytes = 0
        self._is_closed = False

    def read(self, size: int) -> bytes:
        want = min(size, self._size - self._offset)
        if want <= 0:
            return b""
        assert not self._is_closed, "read of a closed stream"
        while True:
            try:
                return self._read_once(want)
            except SourceError as error:
                self._drop()
                self._wait(error)

    def _read_once(self, want: int) -> bytes:
        if self._response is None:
            self._waited_s, self._window_bytes = 0.0, 0
            self._response = self._last = self._reopen(self._offset)
        started = time.monotonic()
        self._response.set_deadline(started + self._window_s)
        data = self._response.read(want)
        if not data:
            error = SourceError(f"{self._response.where}: the body ended after {self._offset} of {self._size} bytes")
            self._response.fail(error)
            raise error
        self._offset += len(data)
        self._window_bytes += len(data)
        self._waited_s += time.monotonic() - started
        if self._failure_count and self._offset - self._failed_at_offset >= PROGRESS_BYTES:
            self._failure_count = 0
        if self._offset == self._size:
            self._response.finish()
            self._response = None
        elif self._waited_s >= self._window_s:
            self._end_window()
        return data

    def _end_window(self) -> None:
        """Too little in a window: this connection is given up, and the bytes that came are kept."""
        is_slow = self._window_bytes < PROGRESS_BYTES
        self._waited_s, self._window_bytes = 0.0, 0
        if is_slow:
            assert self._response is not None
            where = self._response.where
            error = SourceError(f"{where}: less than {PROGRESS_BYTES} bytes in {self._window_s:.0f} s")
            self._response.fail(error)
            self._drop()
            self._wait(error)

    def _wait(self, error: SourceError) -> None:
        now = time.monotonic()
        if self._failure_count == 0:
            self._give_up_at = now + self._patience_s
            self._failed_at_offset = self._offset
        self._failure_count += 1
        wait_or_raise(self._failure_count, error, self._give_up_at, self._retry_count)

    def distrust(self, error: LazyfsError) -> bool:
        """For the function of this name."""
        return self._last is not None and self._last.fail(error)

    def _drop(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            response.close()

    def close(self) -> None:
        self._is_closed = True
        self._drop()


class FileStream(_Stream):
    """Bytes [offset, offset + size) of an open file, read with pread; `is_owner`: close the descriptor as well."""

    __slots__ = ("_descriptor", "_end", "_is_owner", "_name", "_offset")

    def __init__(self, descriptor: int, offset: int, size: int, name: str, *, is_owner: bool) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self._end = offset + size
        self._name = name
        self._is_owner = is_owner

    def read(self, size: int) -> bytes:
        want = min(size, self._end - self._offset)
        if want <= 0:
            return b""
        try:
            data = os.pread(self._descriptor, want, self._offset)
        except OSError as error:
            raise self._failed(error) from error
        self._count(len(data))
        return data

    def readinto(self, view: memoryview) -> int:
        want = min(len(view), self._end - self._offset)
        if want <= 0:
            return 0
        try:
            count = os.preadv(self._descriptor, (view[:want],), self._offset)
        except OSError as error:
            raise self._failed(error) from error
        self._count(count)
        return count

    def _failed(self, error: OSError) -> SourceError:
        return SourceError(f"{self._name}: {error.strerror}", transient=False)

    def _count(self, came: int) -> None:
        if not came:
            raise SourceError(f"{self._name}: ends {self._end - self._offset} bytes early", transient=False)
        self._offset += came

    def close(self) -> None:
        if self._is_owner:
            self._is_owner = False
            os.close(self._descriptor)


def distrust(stream: ByteStream, error: LazyfsError) -> bool:
    """
    Tell where a stream came from that its bytes were wrong.

    True: that was a mirror, which is not asked again for a while; asking anew leads elsewhere.
    """
    return isinstance(stream, RangeStream | BlobStream) and stream.distrust(error)


def server_of(stream: ByteStream) -> str:
    """Who answers, for statistics: host[:port] of a registry or mirror; "local": a file of this machine."""
    return stream.server if isinstance(stream, RangeStream) else "local"


def read_exactly(stream: ByteStream, size: int) -> bytes:
    """`size` bytes of a stream that has so many."""
    pieces = []
    while size and (piece := stream.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)
