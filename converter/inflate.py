"""
Decompress a layer's blob in order: gzip (several members), zstd (several frames, skippable ones) or plain.

Called by converter.layerstream, in its thread. Generators of blocks (bytes, never empty, at most about 1 MiB), from a
function that reads compressed bytes. Memory is bounded whatever the bytes say: each step asks for at most one block.
There is no limit on the ratio: a layer may well hold a terabyte of zeros. FormatError on anything that is not its
format from the first to the last byte. Sources: RFC 1952, RFC 8878.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import zstandard
from isal import igzip_lib

from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.limits import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Read = Callable[[int], bytes]    # up to so many compressed bytes, b"" at the end

# Compressed bytes at once; with blocks of 1 MiB the fastest for igzip (of 64 KiB to 1 MiB each, measured).
READ_BYTES = 256 * KIB
BLOCK_BYTES = 1 * MIB          # what a step decompresses at most
ZSTD_WINDOW_BYTES_MAX = 128 * MIB      # as the zstd command allows without --long=31
_GZIP_STEP_BYTES_MIN = 4 * KIB  # what a new gzip member is given first: what it leaves is copied
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPABLE_MAGIC = b"\x2a\x4d\x18"     # after a first byte of 0x50 .. 0x5f
_ZSTD_HEADER_BYTES_MAX = 18
_ZSTD_BLOCK_BYTES_MAX = 128 * KIB
_ZSTD_RLE, _ZSTD_RESERVED = 1, 3
MAGIC_BYTES = 4
_IGZIP_ERROR: type[Exception] = igzip_lib.IsalError  # type: ignore[assignment]  # its stub calls the class an instance


class Compression(enum.Enum):
    PLAIN = "plain"
    GZIP = "gzip"
    ZSTD = "zstd"


def detect(head: bytes) -> Compression:
    """The compression of a blob that begins with these bytes (four, if it has so many)."""
    if head[:2] == _GZIP_MAGIC:
        return Compression.GZIP
    if head[:4] == _ZSTD_MAGIC or _is_skippable(head[:4]):
        return Compression.ZSTD
    return Compression.PLAIN


def blocks(compression: Compression, read: Read) -> Iterator[bytes]:
    """
    Decompress all that `read` gives.

    Raises:
        FormatError: the stream is damaged, ends early, or something else follows it.

    """
    if compression is Compression.GZIP:
        return _gzip(read)
    if compression is Compression.ZSTD:
        return _zstd(_Feed(read))
    return iter(lambda: read(BLOCK_BYTES), b"")


def _gzip(read: Read) -> Iterator[bytes]:
    """
    Members one after another; zeros may follow the last (tapes, and gzip(1) allows it).

    A finished member hands back what it did not use, so a new one gets little at first: no work that grows with the
    square of the number of members.
    """
    data = memoryview(b"")
    while True:
        data = data or memoryview(read(READ_BYTES))
        if not data:
            return
        if data[0] == 0:
            _only_zeros(data, read)
            return
        member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        step = _GZIP_STEP_BYTES_MIN
        while not member.eof:
            piece = memoryview(b"")
            if member.needs_input:
                data = data or memoryview(read(READ_BYTES))
                if not data:
                    raise FormatError("the gzip stream ends early")
                piece, data = data[:step], data[step:]
                step = min(2 * step, READ_BYTES)
            try:
                block = member.decompress(piece, BLOCK_BYTES)
            except _IGZIP_ERROR as error:
                raise FormatError(f"the gzip stream is damaged ({error})") from error
            if block:
                yield block
        if member.unused_data:
            data = _put_back(member.unused_data, data)


def _put_back(unused: bytes, data: memoryview) -> memoryview:
    """`unused` and then `data`: nearly always it lies right before it in the same buffer, and nothing is copied."""
    whole = memoryview(data.obj)
    start = len(whole) - len(data) - len(unused)
    if start >= 0 and whole[start : start + len(unused)] == unused:
        return whole[start:]
    return memoryview(unused + data.tobytes())


def _only_zeros(data: memoryview, read: Read) -> None:
    while data:
        if bytes(data).strip(b"\0"):
            raise FormatError("something that is not gzip follows a gzip stream")
        data = memoryview(read(READ_BYTES))


class _Feed:
    """Compressed bytes that can be looked at before they are used."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self.data = b""
        self.position = 0

    def has(self, count: int) -> bool:
        """Make at least `count` bytes available after `position`; False: the stream ends before."""
        while len(self.data) - self.position < count:
            more = self._read(READ_BYTES)
            if not more:
                return False
            self.data = self.data[self.position :] + more
            self.position = 0
        return True

    def need(self, count: int) -> None:
        if not self.has(count):
            raise FormatError("the zstd stream ends early")

    def skip(self, count: int) -> None:
        """Pass over `count` bytes, however many, without keeping them."""
        while count:
            self.need(1)
            step = min(count, len(self.data) - self.position)
            self.position += step
            count -= step


def _is_skippable(magic: bytes) -> bool:
    return magic[1:] == _SKIPPABLE_MAGIC and magic[0] & 0xF0 == 0x50


def _zstd(feed: _Feed) -> Iterator[bytes]:
    """Frames one after another."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX)
    while feed.has(1):
        feed.need(MAGIC_BYTES)
        magic = feed.data[feed.position : feed.position + MAGIC_BYTES]
        if _is_skippable(magic):
            feed.need(8)
            size = int.from_bytes(feed.data[feed.position + 4 : feed.position + 8], "little")
            feed.skip(8 + size)
        elif magic == _ZSTD_MAGIC:
            yield from _zstd_frame(feed, decompressor)
        else:
            raise FormatError("something that is not zstd follows a zstd frame")


def _zstd_frame(feed: _Feed, decompressor: zstandard.ZstdDecompressor) -> Iterator[bytes]:
    """
    One frame. Its blocks are counted here, so that a step never decompresses more than eight of 128 KiB: the library
    has no other way to bound the output, and does not tell a frame that ends early from a whole one.
    """
    feed.has(_ZSTD_HEADER_BYTES_MAX)
    try:
        head = feed.data[feed.position : feed.position + _ZSTD_HEADER_BYTES_MAX]
        header_size = zstandard.frame_header_size(head)
        parameters = zstandard.get_frame_parameters(head)
    except zstandard.ZstdError as error:
        raise FormatError(f"a zstd frame's header is damaged or ends early ({error})") from error
    if parameters.dict_id:
        raise UnsupportedError("a zstd frame that needs a dictionary")
    if parameters.window_size > ZSTD_WINDOW_BYTES_MAX:
        raise UnsupportedError(
            f"a zstd frame with a window of {parameters.window_size} bytes, at most {ZSTD_WINDOW_BYTES_MAX} are allowed"
        )
    frame = decompressor.decompressobj(write_size=_ZSTD_BLOCK_BYTES_MAX)
    pending = header_size      # bytes from feed.position on that belong to the frame and wait to be decompressed
    count = 0
    last = False
    while not last:
        feed.need(pending + 3)
        start = feed.position + pending
        block = int.from_bytes(feed.data[start : start + 3], "little")
        last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
        if kind == _ZSTD_RESERVED or size > _ZSTD_BLOCK_BYTES_MAX:
            raise FormatError("a zstd block's header is damaged")
        pending += 3 + (1 if kind == _ZSTD_RLE else size)
        count += 1
        if last:
            pending += 4 if parameters.has_checksum else 0
        feed.need(pending)
        if last or count == BLOCK_BYTES // _ZSTD_BLOCK_BYTES_MAX or pending >= READ_BYTES // 2:
            data = memoryview(feed.data)[feed.position : feed.position + pending]
            try:
                out = frame.decompress(data)
            except zstandard.ZstdError as error:
                raise FormatError(f"the zstd stream is damaged ({error})") from error
            if out:
                yield out
            feed.position += pending
            pending = count = 0
    if not frame.eof or frame.unused_data:
        raise FormatError("a zstd frame does not end where its blocks do")
