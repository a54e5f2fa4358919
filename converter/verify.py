"""
Reads every blob of a lazy image from end to end and checks every stored chunk in it.

A chunk is known from the blob's own table (in its tail), from the image's tables (in the bootstrap), or both; each
distinct one is decoded and its digest compared; and the whole blob's digest, too. The hot blob comes first, so that its
blocks can be compared with the layers' (converter.verifyhot). One thread reads in order, others decode. Memory: a few
batches of BATCH_BYTES, and some 300 bytes for each chunk of a blob.

Layer: converter. Who calls: converter.compare.
"""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converter.reuse import read_tail
from converter.verifyhot import HotSums
from lazyfs import limits
from lazyfs.errors import FormatError, IntegrityError, NotFoundError
from lazyfs.image.blob import FOOTER_BYTES, parse_footer, parse_tail
from lazyfs.image.codec import Codec, decompress
from lazyfs.image.digest import Digest, chunk_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from converter.differences import Differences
    from lazyfs.image.manifest import LayerBlob
    from lazyfs.image.model import LayerEntry
    from lazyfs.image.table import ChunkTable
    from lazyfs.registry.lazy import LazyImage
    from lazyfs.registry.place import ByteStream, ImageSource

BATCH_BYTES = 4 * limits.MIB     # stored bytes that one task decodes
_BATCHES_AHEAD = 2               # for each thread


@dataclass(frozen=True, slots=True, order=True)
class StoredChunk:
    """Where a chunk is in its blob and what must come out of it. `size`: uncompressed bytes."""

    offset: int
    stored_size: int
    codec: Codec
    size: int
    digest: bytes


def verify_blobs(
    image: LazyImage, source: ImageSource, differences: Differences, *, jobs: int, on_bytes: Callable[[int], None]
) -> tuple[int, dict[Digest, list[LayerEntry]]]:
    """
    Check all chunks of all blobs. `on_bytes` is told of stored bytes as they are read.

    Returns: how many chunks, and the entries that the layers' blobs record (of those whose tail is sound).

    Raises:
        SourceError: a blob could not be read (that it is not there is a difference, not an error).

    """
    part = image.bootstrap.hot
    tables = [device.table for device in image.bootstrap.devices]
    sums = None if part is None else HotSums(part, tables)
    layers = {blob.digest: blob for blob in image.lazy.layers}
    entries: dict[Digest, list[LayerEntry]] = {}
    count = 0
    with ThreadPoolExecutor(jobs, thread_name_prefix="verify") as pool:
        verifier = _Verifier(pool, jobs, differences, on_bytes, sums)
        for index, blob in sorted(enumerate(image.bootstrap.blobs), key=lambda one: not one[1].hot):
            known = [part.table] if blob.hot and part is not None else tables
            chunks = {chunk for table in known for chunk in stored_chunks(table, index)}
            layer = layers.get(blob.digest)
            if layer is not None:
                tail = _read_tail(source, layer, differences)
                if tail is not None:
                    chunks |= set(stored_chunks(tail[0], 0))
                    entries[blob.digest] = tail[1]
                    _compare_tables(image, layer, tail[0], differences)
            count += len(chunks)
            verifier.verify(source, blob.digest, blob.size, sorted(chunks), hot=blob.hot)
    if sums is not None:
        verifier.tell_strange("hot blob", sums.compare_zeros())
    if verifier.failures:
        raise verifier.failures[0]
    return count, entries


def stored_chunks(table: ChunkTable, blob_index: int) -> Iterator[StoredChunk]:
    """The chunks of a table that are stored in one blob (chunks of zeros are stored nowhere)."""
    rows = table.rows
    wanted = ((rows["blob_index"] == blob_index) & (rows["codec"] != Codec.ZERO)).nonzero()[0]
    for index in wanted.tolist():
        row = rows[index]
        yield StoredChunk(
            int(row["blob_offset"]), int(row["stored_size"]), Codec(int(row["codec"])), table.chunk_bytes(index),
            bytes(row["digest"]),
        )


def _read_tail(
    source: ImageSource, layer: LayerBlob, differences: Differences
) -> tuple[ChunkTable, list[LayerEntry]] | None:
    try:
        return parse_tail(read_tail(source, layer), layer.size)
    except (FormatError, IntegrityError, NotFoundError) as error:
        differences.add("chunk", f"blob {layer.digest.short}: its tail cannot be used: {error}")
        return None


def _compare_tables(image: LazyImage, layer: LayerBlob, own: ChunkTable, differences: Differences) -> None:
    """A blob's own table and the bootstrap's must speak of the same device, whatever the codec and place."""
    for index, (device, blob) in enumerate(zip(image.bootstrap.devices, image.lazy.layers, strict=True)):
        if blob.digest == layer.digest and device.digest != own.device_digest():
            differences.add("chunk", f"blob {layer.digest.short}: its own table is not that of device {index}")


class _Verifier:
    """One thread reads, the pool's decode; a semaphore bounds what is between them."""

    def __init__(
        self, pool: ThreadPoolExecutor, jobs: int, differences: Differences, on_bytes: Callable[[int], None],
        sums: HotSums | None,
    ) -> None:
        self._pool = pool
        self._sums = sums
        self._slot_count = jobs * _BATCHES_AHEAD
        self._slots = threading.Semaphore(self._slot_count)
        self._differences = differences
        self._on_bytes = on_bytes
        self.failures: list[BaseException] = []     # not of the blobs: ours

    def verify(self, source: ImageSource, digest: Digest, size: int, chunks: list[StoredChunk], *, hot: bool) -> None:
        """`chunks`: sorted by offset; they may share bytes."""
        name = f"{'hot ' if hot else ''}blob {digest.short}"
        try:
            with source.open_blob(digest, size) as stream:
                reader = _Reader(stream, self._on_bytes)
                for batch, base, data in reader.batches(chunks):
                    self._submit(name, batch, base, data, hot=hot)
                footer = reader.finish()
        except (NotFoundError, IntegrityError) as error:
            self._differences.add("chunk", f"{name}: {error}")
            return
        if reader.position != size:
            self._differences.add("chunk", f"{name}: holds {reader.position} bytes, expected {size}")
        elif reader.digest() != digest:
            self._differences.add("chunk", f"{name}: its bytes have the digest {reader.digest().short}")
        else:
            self._check_footer(name, footer, size, hot=hot)
        if hot:
            self._drain()    # before any layer is compared with it

    def tell_strange(self, name: str, count: int) -> None:
        """Hot blocks that the layers do not have."""
        if count:
            self._differences.add("chunk", f"{name}: {count} hot blocks hold other bytes than their layers")

    def _drain(self) -> None:
        """Wait until everything that was submitted is done."""
        for _ in range(self._slot_count):
            self._slots.acquire()
        self._slots.release(self._slot_count)

    def _check_footer(self, name: str, footer: bytes, size: int, *, hot: bool) -> None:
        try:
            if parse_footer(footer, size).hot != hot:
                self._differences.add("chunk", f"{name}: its footer says otherwise about being hot")
        except FormatError as error:
            self._differences.add("chunk", f"{name}: {error}")

    def _submit(self, name: str, batch: list[StoredChunk], base: int, data: bytes, *, hot: bool) -> None:
        self._slots.acquire()
        future = self._pool.submit(_check_batch, batch, base, data, self._sums, hot=hot)

        def done(_: object) -> None:
            self._slots.release()
            failure = future.exception()
            if failure is not None:
                self.failures.append(failure)
                return
            problems, strange = future.result()
            for problem in problems:
                self._differences.add("chunk", f"{name}: {problem}")
            self.tell_strange(name, strange)

        future.add_done_callback(done)


class _Reader:
    """A blob's bytes in order, cut into batches of chunks; hashes all of them."""

    def __init__(self, stream: ByteStream, on_bytes: Callable[[int], None]) -> None:
        self._stream = stream
        self._on_bytes = on_bytes
        self._hash = hashlib.sha256()
        self._buffer = bytearray()
        self._base = 0               # offset in the blob of the buffer's first byte
        self.position = 0            # bytes read

    def batches(self, chunks: Iterable[StoredChunk]) -> Iterator[tuple[list[StoredChunk], int, bytes]]:
        """Chunks, the offset in the blob of the bytes that come with them, and those bytes (fewer at a cut end)."""
        batch: list[StoredChunk] = []
        end = 0
        for chunk in chunks:
            if batch and max(end, chunk.offset + chunk.stored_size) - batch[0].offset > BATCH_BYTES:
                yield batch, batch[0].offset, self._take(batch[0].offset, end)
                batch = []
            batch.append(chunk)
            end = max(end, chunk.offset + chunk.stored_size)
        if batch:
            yield batch, batch[0].offset, self._take(batch[0].offset, end)

    def finish(self) -> bytes:
        """Read the rest; returns the blob's last FOOTER_BYTES bytes."""
        while self._read():
            del self._buffer[: max(len(self._buffer) - FOOTER_BYTES, 0)]
        return bytes(self._buffer[-FOOTER_BYTES:])

    def digest(self) -> Digest:
        return Digest("sha256:" + self._hash.hexdigest())

    def _take(self, start: int, end: int) -> bytes:
        """Bytes [start, end). `start` never goes back, so what is before it can go."""
        while self.position < end and self._read():
            skipped = min(start - self._base, len(self._buffer))
            if skipped > 0:
                del self._buffer[:skipped]
                self._base += skipped
        return bytes(self._buffer[max(start - self._base, 0) : end - self._base])

    def _read(self) -> bool:
        data = self._stream.read(limits.MIB)
        self._hash.update(data)
        self._buffer += data
        self.position += len(data)
        self._on_bytes(len(data))
        return bool(data)


def _check_batch(
    batch: list[StoredChunk], base: int, data: bytes, sums: HotSums | None, *, hot: bool
) -> tuple[list[str], int]:
    """What is wrong, and how many hot blocks are not those of these chunks of a layer."""
    problems, strange = [], 0
    view = memoryview(data)
    for chunk in batch:
        start = chunk.offset - base
        try:
            decoded = _decode(chunk, view[start : start + chunk.stored_size])
        except FormatError as error:
            problems.append(f"chunk at byte {chunk.offset}: {error}")
            continue
        if sums is not None and hot:
            sums.take(chunk.digest, decoded)
        elif sums is not None:
            strange += sums.compare(chunk.digest, decoded)
    return problems, strange


def _decode(chunk: StoredChunk, stored: memoryview) -> bytes | memoryview:
    """A stored chunk's content. Raises FormatError: what is wrong with it."""
    if len(stored) != chunk.stored_size:
        raise FormatError(f"{len(stored)} of {chunk.stored_size} bytes are there")
    data = decompress(stored, chunk.codec, chunk.size)
    if chunk_digest(data) != chunk.digest:
        raise FormatError("its digest is another")
    return data
