"""
A made-up layer device, its blob and table, and sources that serve it from memory and misbehave on demand.

    sample = make_sample(chunk_count=8)            # deterministic for its arguments
    source = MemorySource({sample.blob: sample.stored})
    source.faults.append(lambda request: ...)      # see MemorySource
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np

from lazyfs.errors import DeadlineError, NotFoundError, SourceError
from lazyfs.fetch.device import FetchDevice
from lazyfs.image.codec import Codec, compress
from lazyfs.image.digest import Digest, chunk_digest
from lazyfs.image.table import ROW, ChunkTable, parse_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs.cache.store import CacheDir

CHUNK = 64 * 1024
BOOT = bytes(range(16))


@dataclass(frozen=True)
class Sample:
    """`data`: the device's bytes; `stored`: the blob that holds its chunks one after another."""

    data: bytes
    stored: bytes
    blob: Digest
    table: ChunkTable

    @property
    def digest(self) -> Digest:
        return self.table.device_digest()

    def chunk(self, index: int) -> bytes:
        size = self.table.chunk_size
        return self.data[index * size : (index + 1) * size]

    def device(self, cache: CacheDir, source: MemorySource) -> FetchDevice:
        cached = cache.device(self.digest, self.table.chunk_size, self.table.device_size)
        return FetchDevice(self.table, cached, [(source, self.blob, len(self.stored))])


def make_sample(
    chunk_count: int = 8, *, seed: int = 0, chunk_size: int = CHUNK, codec: Codec = Codec.LZ4, tail: int = 4096,
    zeros: tuple[int, ...] = (), order: list[int] | None = None,
) -> Sample:  # fmt: skip
    """The last chunk holds `tail` bytes; chunks in `zeros` are zeros; `order` is that of the chunks in the blob."""
    draw = random.Random(seed)
    words = [draw.randbytes(12) for _ in range(200)]
    chunks = []
    for index in range(chunk_count):
        size = tail if index == chunk_count - 1 else chunk_size
        text = b"".join(draw.choices(words, k=size // 12 + 1))
        chunks.append(bytes(size) if index in zeros else text[:size])
    rows = np.zeros(chunk_count, dtype=ROW)
    stored = b""
    for index in order or range(chunk_count):
        used, piece = compress(chunks[index], codec, 1 if codec is not Codec.NONE else 0)
        rows[index] = (len(stored), len(piece), 0, used, 0, chunk_digest(chunks[index]))
        stored += bytes(piece)
    data = b"".join(chunks)
    table = parse_table(rows.tobytes(), chunk_size, len(data), [len(stored)])
    return Sample(data, stored, Digest.of(stored), table)


@dataclass
class Request:
    """A range request, as a fault sees it. A fault may block, raise, or change `data` and `pieces`."""

    number: int
    offset: int
    size: int
    deadline: float
    data: bytes
    piece_bytes: int = 1 << 30    # the most that one read() returns
    before_piece: Callable[[int], None] | None = None    # called with the bytes already read; may block or raise


class MemoryStream:
    def __init__(self, request: Request) -> None:
        self._request = request
        self._position = 0

    def read(self, size: int) -> bytes:
        request = self._request
        if request.before_piece is not None:
            request.before_piece(self._position)
        if time.monotonic() > request.deadline:
            raise DeadlineError("memory: too late")
        piece = request.data[self._position : self._position + min(size, request.piece_bytes)]
        self._position += len(piece)
        return piece

    def readinto(self, view: memoryview) -> int:
        piece = self.read(len(view))
        view[: len(piece)] = piece[: len(view)]    # a fault may give more than was asked for
        return len(piece)

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(eq=False)
class MemorySource:
    """
    :requests: (offset, size) of all requests, as they came.
    :faults: called in turn with each Request before it is answered.
    :gate: while cleared, requests wait (no longer than their deadlines).
    """

    blobs: dict[Digest, bytes]
    name: str = "memory:test"
    requests: list[tuple[int, int]] = field(default_factory=list)
    faults: list[Callable[[Request], None]] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    running: int = 0
    running_max: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.gate.set()

    def read_range(self, digest: Digest, offset: int, size: int, deadline: float) -> MemoryStream:
        with self.lock:
            self.requests.append((offset, size))
            number = len(self.requests) - 1
            self.running += 1
            self.running_max = max(self.running, self.running_max)
        try:
            if not self.gate.wait(max(0.0, deadline - time.monotonic())):
                raise DeadlineError("memory: nobody answered in time")
            if digest not in self.blobs:
                raise NotFoundError(f"memory: no blob {digest.short}")
            blob = self.blobs[digest]
            if offset + size > len(blob):
                raise SourceError("memory: range beyond the blob", transient=False)
            request = Request(number, offset, size, deadline, blob[offset : offset + size])
            for fault in self.faults:
                fault(request)
            return MemoryStream(request)
        finally:
            with self.lock:
                self.running -= 1
