"""
Chunks in, blob out: a thread pool compresses and digests, the caller's thread writes in order.

A *run* of neighbouring chunks is one task, so that handing it over costs little beside the work in it (compression
and BLAKE3 release the GIL). The layer's own thread adds runs and, when its window is full, writes the oldest finished
one: no writer thread, bounded memory, and an order that does not depend on the number of threads.

With codec lz4 runs come in *groups*, whose first run finds out by trial how all of them are compressed
(converter.encode). The others are held until the next group's first run is handed over, so that its outcome is there
when they are taken up, and no thread waits.

Who calls: converter.layer, converter.hot (and converter.device through the Sink protocol). Layer: converter.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from converter.encode import Encoded, Encoding, encode_run, encode_trial
from lazyfs import limits
from lazyfs.errors import BugError, UnsupportedError
from lazyfs.image.codec import Codec, decompress
from lazyfs.image.digest import Digest, chunk_digest
from lazyfs.image.table import ROW, ROW_BYTES, Rows

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO, Self

RUN_BYTES = 2 * limits.MIB      # 8 chunks of 256 KiB: about 6 ms of zstd, a thousand times what the hand-over costs
RUNS_PER_JOB = 6                # one being compressed, the others waiting: an archive's small files come in bursts
WRITEBACK_BYTES = 32 * limits.MIB
RUN_COUNT_MAX = 40              # of all layers together: with their results about 160 MiB
_ROW = struct.Struct("<QIHBB32s")   # image.table.ROW
assert _ROW.size == ROW_BYTES
assert RUN_BYTES % limits.CHUNK_SIZE_MAX_BYTES == 0


@dataclass(slots=True)
class _Run:
    """A run on its way. `result` is None while it is held."""

    buffer: bytearray
    size: int
    result: Future[Encoded] | None = None

    def encoded(self) -> Encoded:
        if self.result is None:
            raise BugError("a run that nobody compresses is waited for")
        return self.result.result()


class CompressionPool:
    """The threads that all layers of a conversion share."""

    def __init__(self, jobs: int, layers_at_once: int) -> None:
        """`layers_at_once`: how many windows share the memory budget."""
        self._executor = ThreadPoolExecutor(jobs, thread_name_prefix="compress")
        self.window = max(2, min(jobs * RUNS_PER_JOB + 2, RUN_COUNT_MAX) // layers_at_once)

    def submit(self, run: memoryview, encoding: Encoding, trial: Future[Encoded] | None) -> Future[Encoded]:
        """`trial`: the result of its group's first run, submitted before; None: it is that run."""
        if trial is None:
            return self._executor.submit(encode_trial, run, encoding)
        return self._executor.submit(encode_run, run, encoding, trial)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


class BlobFile:
    """A blob being written: its size and digest grow with it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._started_size = 0   # what the disk was told to begin with
        self.blob_size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes as they are."""
        self._file.write(data)
        self._sha256.update(data)
        self.blob_size += len(data)
        if self.blob_size - self._started_size >= WRITEBACK_BYTES:
            self._start_writeback()

    def _start_writeback(self) -> None:
        """Let the disk work while we compress: the sync at the end then waits for the last few megabytes only."""
        self._file.flush()
        length = self.blob_size - self._started_size
        os.posix_fadvise(self._file.fileno(), self._started_size, length, os.POSIX_FADV_DONTNEED)
        self._started_size = self.blob_size

    def pread(self, size: int, offset: int) -> bytes:
        """What was written there."""
        self._file.flush()
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) != size:
            raise BugError(f"the blob lacks bytes {offset} to {offset + size}, which were written")
        return data

    def digest(self) -> Digest:
        """Of everything written so far."""
        return Digest("sha256:" + self._sha256.hexdigest())


class BlobWriter(BlobFile):
    """Writes one layer blob's chunks and remembers their rows. Use from one thread."""

    def __init__(self, pool: CompressionPool, file: BinaryIO, encoding: Encoding) -> None:
        super().__init__(file)
        self._pool = pool
        self._encoding = encoding
        self._pending: deque[_Run | int] = deque()
        self._group_count = 0                       # runs of the group so far
        self._trial: Future[Encoded] | None = None  # of the group
        self._held: list[_Run] = []                 # the group's others
        self._free: list[bytearray] = []
        self._rows = bytearray()

    def take_buffer(self) -> bytearray:
        """RUN_BYTES of memory with any content, to be filled and given to add_run()."""
        return self._free.pop() if self._free else bytearray(RUN_BYTES)

    def add_run(self, buffer: bytearray, size: int) -> None:
        """Store the first `size` bytes as the next chunks; a multiple of the chunk size, but for the device's end."""
        self._check_count(size // self._encoding.chunk_size)
        run = _Run(buffer, size)
        self._pending.append(run)
        if self._group_count == 0:
            trial = run.result = self._pool.submit(memoryview(buffer)[:size], self._encoding, None)
            self._release()
            self._trial = trial
        else:
            self._held.append(run)
        self._group_count = (self._group_count + 1) % self._encoding.group_runs
        self._write_full()

    def add_zero_chunks(self, count: int) -> None:
        """The next `count` whole chunks are zeros."""
        self._check_count(count)
        self._pending.append(count)
        self._write_full()

    def read_back(self, offset: int, size: int) -> Iterator[bytes | memoryview]:
        """Bytes of the device that were added before, in order; decoded from what was stored."""
        while self._pending:
            self._write_oldest()
        chunk_size = self._encoding.chunk_size
        for index in range(offset // chunk_size, -(-(offset + size) // chunk_size)):
            blob_offset, stored_size, _, codec, _, _ = _ROW.unpack_from(self._rows, index * ROW_BYTES)
            data = decompress(self.pread(stored_size, blob_offset), Codec(codec), chunk_size)
            begin = index * chunk_size
            yield data[max(0, offset - begin) : offset + size - begin]

    def finish(self) -> Rows:
        """Wait for all chunks; returns their rows."""
        while self._pending:
            self._write_oldest()
        self._free.clear()
        return np.frombuffer(bytes(self._rows), dtype=ROW)

    def abandon(self) -> None:
        """Take no more results (the layer failed). After finish() nothing is left to do."""
        for item in self._pending:
            if not isinstance(item, int) and item.result is not None:
                item.result.cancel()
        self._pending.clear()
        self._held.clear()

    def _release(self) -> None:
        """Hand over what is held."""
        for run in self._held:
            run.result = self._pool.submit(memoryview(run.buffer)[: run.size], self._encoding, self._trial)
        self._held.clear()

    def _write_full(self) -> None:
        while len(self._pending) >= self._pool.window:
            self._write_oldest()

    def _write_oldest(self) -> None:
        item = self._pending.popleft()
        if isinstance(item, int):
            zeros = bytes(self._encoding.chunk_size)
            self._rows += _ROW.pack(0, 0, 0, Codec.ZERO, 0, chunk_digest(zeros)) * item
            return
        if item.result is None:
            self._release()
        for chunk in item.encoded().chunks:
            offset = self.blob_size if len(chunk.data) else 0
            self._rows += _ROW.pack(offset, len(chunk.data), 0, chunk.codec, 0, chunk.digest)
            self.write(chunk.data)
        self._free.append(item.buffer)   # only now: with codec none the stored bytes are the buffer's

    def _check_count(self, added: int) -> None:
        if len(self._rows) // ROW_BYTES + added > limits.CHUNK_COUNT_MAX:
            raise UnsupportedError(f"more than {limits.CHUNK_COUNT_MAX} chunks in one layer",
                                   hint="a larger --chunk-size makes fewer")
