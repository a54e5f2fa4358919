"""
LayerStream: a compressed layer as one checked stream of its uncompressed bytes.

Called by converter, which puts a TarReader on it. Two threads work ahead, because the libraries do all of it outside
of the interpreter lock: one reads and decompresses, one hashes both sides. What is between them is bounded (some
blocks of 512 KiB), and they end when the stream does, fails, is closed or is forgotten. The layer's bytes are checked
against the manifest's promise at the end; until finish() has returned, nothing that was read may be relied on.
Sources: OCI image-spec v1.1 media-types.md, layer.md, config.md ("DiffID").
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from contextlib import contextmanager, suppress
from queue import Empty, Full, Queue
from typing import TYPE_CHECKING, Protocol, Self

from converter.inflate import MAGIC_BYTES, READ_BYTES, Compression, blocks, detect
from lazyfs.errors import BugError, FormatError, IntegrityError, LazyfsError, UnsupportedError
from lazyfs.image.digest import Digest
from lazyfs.limits import LAYER_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

_READY_COUNT = 6                # blocks waiting for read(): enough that neither side waits for the other
_HASHING_COUNT = 4              # pieces waiting to be hashed
_SMALL_BYTES = READ_BYTES       # blocks below it (of many small members) are handed over together
_JOIN_TIMEOUT_S = 1.0           # close() waits so long; a thread in a network read ends at that read's own deadline
_DOCKER_PLAIN = ".diff.tar"     # Docker's type without a suffix says nothing about compression (containerd: "unknown")


class RawLayer(Protocol):
    """A layer's blob as it is stored; what a LayerStream needs of a place's ByteStream."""

    def read(self, size: int) -> bytes: ...

    def close(self) -> None: ...

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def expected_compression(media_type: str) -> Compression | None:
    """
    What a layer's media type says; None: nothing ("" for archives that state no type).

    Raises:
        UnsupportedError: not a media type of layers.

    """
    if media_type.endswith(("+gzip", ".tar.gzip")):
        return Compression.GZIP
    if media_type.endswith(("+zstd", ".tar.zstd")):
        return Compression.ZSTD
    if not media_type or media_type.endswith(_DOCKER_PLAIN):
        return None
    if media_type.endswith(".tar"):
        return Compression.PLAIN
    raise UnsupportedError(f"media type {media_type[:100]!r} is not one of a layer", hint="see `skopeo inspect --raw`")


class _Pump:
    """
    The two threads and all they share. Holds no reference to the LayerStream, so that one which is dropped goes away
    and stops them.
    """

    def __init__(self, stream: RawLayer, expected: Compression | None, size: int) -> None:
        self.ready: Queue[bytes | BaseException | None] = Queue(_READY_COUNT)   # None: the end
        self.stopping = threading.Event()
        self.compressed = hashlib.sha256()
        self.uncompressed = hashlib.sha256()
        self.received = 0              # compressed bytes so far
        self.thread = threading.Thread(target=self._run, name="layer-read", daemon=True)
        self._stream = stream
        self._expected = expected
        self._size = size
        self._hashing: Queue[tuple[bool, bytes] | None] = Queue(_HASHING_COUNT)
        self._plain = False
        self._head = b""

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Make both threads end soon. From any thread, any number of times."""
        self.stopping.set()
        with suppress(Empty):
            while True:      # there is room again for a put() that waits; after it, the flag is seen
                self.ready.get_nowait()
        with suppress(Full):
            self.ready.put_nowait(None)     # whoever waits in read()

    # --- thread "layer-read" ----------------------------------------------------------------------------------------
    def _run(self) -> None:
        result: BaseException | None = None
        hasher = threading.Thread(target=self._hash, name="layer-hash", daemon=True)
        try:
            with self._stream:
                hasher.start()
                try:
                    self._decompress()
                    self._drain()
                except FormatError as error:
                    self._drain()      # so that finish() or blame() can tell a damaged blob from a badly made one
                    result = error
        except BaseException as error:  # noqa: BLE001  # whatever it is, it is read()'s to raise
            result = error
        finally:
            if hasher.ident is not None:
                self._hashing.put(None)
                hasher.join()
            self._put(result)

    def _decompress(self) -> None:
        while len(self._head) < MAGIC_BYTES:
            piece = self._receive(READ_BYTES)
            if not piece:
                break
            self._head += piece
        compression = self._check_compression()
        self._plain = compression is Compression.PLAIN
        total = 0
        for block in _gathered(blocks(compression, self._read)):
            total += len(block)
            if total > LAYER_BYTES_MAX:
                raise FormatError(f"it has more than {LAYER_BYTES_MAX} bytes uncompressed")
            if not self._plain:
                self._hashing.put((False, block))
            self._put(block)
            if self.stopping.is_set():
                return

    def _check_compression(self) -> Compression:
        found = detect(self._head)
        if self._expected is not None and found is not self._expected:
            raise FormatError(f"its media type says {self._expected.value}, its first bytes say {found.value}")
        return found

    def _read(self, size: int) -> bytes:
        """Compressed bytes for the decompressor, the head first."""
        if self._head:
            head, self._head = self._head, b""
            return head
        return self._receive(size)

    def _receive(self, size: int) -> bytes:
        if self.stopping.is_set():
            return b""
        data = self._stream.read(size)
        self.received += len(data)
        if self.received > self._size:
            raise IntegrityError(f"more bytes came than the {self._size} the manifest promises")
        if data:
            self._hashing.put((True, data))
        return data

    def _drain(self) -> None:
        while self._receive(READ_BYTES):
            pass

    def _put(self, item: bytes | BaseException | None) -> None:
        if not self.stopping.is_set():
            self.ready.put(item)

    # --- thread "layer-hash" ----------------------------------------------------------------------------------------
    def _hash(self) -> None:
        while (item := self._hashing.get()) is not None:
            if not self.stopping.is_set():
                (self.compressed if item[0] else self.uncompressed).update(item[1])

    def diff_id(self) -> Digest:
        """After the end: the digest of the uncompressed bytes."""
        return Digest("sha256:" + (self.compressed if self._plain else self.uncompressed).hexdigest())


def _gathered(source: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes with small blocks joined: handing one over costs as much as decompressing some KiB."""
    small: list[bytes] = []
    size = 0
    for block in source:
        small.append(block)
        size += len(block)
        if size >= _SMALL_BYTES:
            yield small[0] if len(small) == 1 else b"".join(small)
            small, size = [], 0
    if small:
        yield b"".join(small)


class LayerStream:
    """
    Binary reader over a compressed layer. Use as a context manager, or call close(); both also close `stream`.

    Args:
        stream: the blob, from its start. Belongs to this object from now on.
        media_type: the compression it states must be the one the bytes have.
        size: of the compressed blob, as the manifest promises.
        digest: of the compressed blob, likewise.
        name: of the layer, for messages.

    Raises:
        UnsupportedError: the media type is not a layer's.

    """

    def __init__(self, stream: RawLayer, media_type: str, *, size: int, digest: Digest, name: str) -> None:
        self._name = name
        self._size = size
        self._digest = digest
        try:
            expected = expected_compression(media_type)
        except UnsupportedError as error:
            stream.close()
            raise UnsupportedError(f"{name}: {error}", hint=error.hint) from error
        self._block = b""
        self._position = 0
        self._ended = False
        self._error: BaseException | None = None
        self._pump = _Pump(stream, expected, size)
        self._stop = weakref.finalize(self, self._pump.stop)
        self._stop.atexit = False      # daemon threads: nothing to wait for
        self._pump.start()

    def read(self, size: int) -> bytes:
        """
        Up to `size` uncompressed bytes, at least one; b"" only at the end.

        Raises:
            FormatError: the compressed stream is damaged, ends early, or is not what the media type says.
            IntegrityError: as FormatError, but the blob is not the promised one either; or it is too long.
            SourceError: the blob did not arrive.

        """
        if self._position == len(self._block) and (size <= 0 or not self._next()):
            return b""
        start, end = self._position, self._position + size
        block = self._block
        if start == 0 and end >= len(block):
            self._position = len(block)
            return block
        self._position = min(end, len(block))
        return block[start:end]

    def finish(self) -> Digest:
        """
        Read what is left, check the blob against the manifest's promise, close.

        Returns:
            diff_id: the digest of all uncompressed bytes.

        Raises:
            IntegrityError: the blob's size or digest is not the promised one.
            FormatError, SourceError: as read().

        """
        with self:
            while self._next():
                pass
            broken = self._broken_promise()
            if broken is not None:
                raise broken
            return self._pump.diff_id()

    def blame(self, error: FormatError) -> LazyfsError:
        """
        The true cause of a FormatError met in this stream's bytes: `error`, unless the blob is not the promised one.

        Reads what is left of the blob, and closes.
        """
        with self:
            try:
                while self._next():
                    pass
            except LazyfsError as other:
                return error if isinstance(other, (FormatError, BugError)) else other
            return self._broken_promise() or error

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """What is done with the stream's bytes: a FormatError leaves it as blame() says."""
        try:
            yield
        except FormatError as error:
            cause = self.blame(error)     # a damaged blob is told from a badly made one
            if cause is error:
                error.hint = error.hint or "the layer was made wrongly, not damaged on the way: build and push it again"
                raise
            raise cause from error

    def close(self) -> None:
        """Stop reading. Idempotent."""
        self._block, self._position = b"", 0
        self._stop()
        self._pump.thread.join(_JOIN_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next(self) -> bool:
        """Get the next block; False at the end."""
        if self._error is not None:
            raise self._error
        if self._ended:
            return False
        item = self._pump.ready.get() if not self._pump.stopping.is_set() else None
        if self._pump.stopping.is_set():
            raise BugError(f"{self._name}: read after close")
        if isinstance(item, bytes):
            self._block, self._position = item, 0
            return True
        self._block, self._position, self._ended = b"", 0, True
        if item is not None:
            self._error = self._explain(item)
            raise self._error
        return False

    def _explain(self, error: BaseException) -> BaseException:
        if isinstance(error, FormatError):
            broken = self._broken_promise()
            if broken is not None:
                return broken
            named: LazyfsError = type(error)(f"{self._name}: {error}", hint=error.hint)
        elif isinstance(error, IntegrityError):
            named = IntegrityError(f"{self._name}: {error}", hint=error.hint)
        else:
            return error
        named.__cause__ = error
        return named

    def _broken_promise(self) -> IntegrityError | None:
        """After the end: how the blob differs from what the manifest says, if it does."""
        pump = self._pump
        if pump.received != self._size:
            return IntegrityError(f"{self._name}: {pump.received} bytes came, the manifest promises {self._size}")
        found = "sha256:" + pump.compressed.hexdigest()
        if found != self._digest.text:
            return IntegrityError(
                f"{self._name}: its digest is {found}, the manifest promises {self._digest}",
                hint="the blob is damaged where it is stored or on the way; push it again",
            )
        return None
