"""
Neighbouring pieces from where they come from in the end: a registry, or the server of a URL.

Layer: mirror. Who calls: mirror.download. State: none. The stream is read in threads that are left behind when the
caller is cancelled: they end at the stream's own timeouts, and touch nothing else.
"""

from __future__ import annotations

import threading
import time
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeVar

import trio

from lazyfs.errors import DeadlineError, SourceError
from lazyfs.limits import RETRY_COUNT_MAX
from lazyfs.registry.dial import POOL_CONNECTIONS
from lazyfs.registry.retry import pause_s
from lazyfs.registry.streams import read_exactly

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Iterator

    from lazyfs.image.digest import Digest
    from lazyfs.peers.model import Resource
    from lazyfs.registry.place import ByteStream, ImageSource

T = TypeVar("T")
STREAMS: Final = POOL_CONNECTIONS - 4    # some are left for what is small, and comes besides
_RUN_S: Final = 600.0        # one request of 4 MiB; who drips is left much earlier (registry.streams)


class Origin(Protocol):
    """Who has all of one resource. Blocking, thread-safe."""

    @property
    def name(self) -> str:
        """For messages; no secrets."""
        ...

    @property
    def ranges(self) -> bool:
        """Whether it can begin anywhere; else `read_range` reads what is before and throws it away."""
        ...

    def read_range(self, offset: int, size: int, deadline: float) -> ByteStream:
        """Exactly these bytes, or a LazyfsError; deadline: time.monotonic(), for all of it."""
        ...


class BlobOrigin:
    """A blob of a repository."""

    ranges = True

    def __init__(self, source: ImageSource, digest: Digest) -> None:
        self._source, self._digest = source, digest

    @property
    def name(self) -> str:
        return self._source.name

    def read_range(self, offset: int, size: int, deadline: float) -> ByteStream:
        return self._source.read_range(self._digest, offset, size, deadline)


class Run(NamedTuple):
    """Pieces [first, stop)."""

    first: int
    stop: int


def runs_of(indexes: Iterable[int]) -> Iterator[Run]:
    """Neighbours among ascending indexes."""
    found = list(indexes)
    if not found:
        return
    edges = [0, *(at + 1 for at, (one, two) in enumerate(pairwise(found)) if two != one + 1), len(found)]
    for begin, end in pairwise(edges):
        yield Run(found[begin], found[end - 1] + 1)


@dataclass(frozen=True, slots=True)
class OriginLimits:
    """Of all runs together. `streams`: open at once, a connection each; `threads`: that wait for them."""

    streams: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(STREAMS))
    threads: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(POOL_CONNECTIONS))


async def fetch_run(origin: Origin, resource: Resource, run: Run, deadline: float,
                    limits: OriginLimits) -> AsyncGenerator[tuple[int, bytes], None]:
    """
    The pieces of a run as they come, in order. What passes is tried again, from the piece where it was.

    `deadline`: on trio's clock; nothing is waited for any longer.

    Raises:
        LazyfsError: they cannot be had.

    """
    holder = object()
    with trio.move_on_at(deadline) as waiting:
        await limits.streams.acquire_on_behalf_of(holder)
    if waiting.cancelled_caught:
        raise DeadlineError(f"{origin.name}: {resource.key}: too much else is being asked for")
    try:
        async with aclosing(_run(origin, resource, run, deadline, limits.threads)) as pieces:
            async for piece in pieces:
                yield piece
    finally:
        limits.streams.release_on_behalf_of(holder)


async def _run(origin: Origin, resource: Resource, run: Run, deadline: float,
               threads: trio.CapacityLimiter) -> AsyncGenerator[tuple[int, bytes], None]:
    index, failures = run.first, 0
    while index < run.stop:
        reading = _Reading()
        try:
            start, end = index * resource.piece_size, min(run.stop * resource.piece_size, resource.size)
            await _until(deadline, origin, resource, reading.open, origin, start, end - start, threads=threads)
            while index < run.stop:
                data = await _until(deadline, origin, resource, reading.read, resource.piece_bytes(index),
                                    threads=threads)
                yield index, data
                index, failures = index + 1, 0
        except SourceError as error:
            failures += 1
            wait_s = pause_s(failures, error)
            late = trio.current_time() + wait_s >= deadline
            if not (error.transient or error.elsewhere) or failures > RETRY_COUNT_MAX or late:
                raise
            await trio.sleep(wait_s)
        finally:
            reading.give_up()


async def _until(deadline: float, origin: Origin, resource: Resource, work: Callable[..., T], *args: object,
                 threads: trio.CapacityLimiter) -> T:
    """Raises DeadlineError: the thread is left behind."""
    with trio.move_on_at(deadline):
        return await trio.to_thread.run_sync(work, *args, limiter=threads, abandon_on_cancel=True)
    raise DeadlineError(f"{origin.name}: {resource.key} did not come in time")


class _Reading:
    """A stream that one thread reads, and that is closed by the last of it and of who does not want it any more."""

    def __init__(self) -> None:
        self._stream: ByteStream | None = None
        self._mutex = threading.Lock()
        self._is_busy = self._is_given_up = False

    def open(self, origin: Origin, start: int, size: int) -> None:
        with self._in_use():
            self._stream = origin.read_range(start, size, time.monotonic() + _RUN_S)

    def read(self, size: int) -> bytes:
        assert self._stream is not None
        with self._in_use():
            data = read_exactly(self._stream, size)
        if len(data) != size:
            raise SourceError(f"the body ended {size - len(data)} bytes too early")
        return data

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._mutex:
            self._is_busy = True
        try:
            yield
        finally:
            with self._mutex:
                self._is_busy = False
                is_over = self._is_given_up
            if is_over:
                self._close()

    def give_up(self) -> None:
        with self._mutex:
            self._is_given_up = True
            is_over = not self._is_busy
        if is_over:
            self._close()

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
