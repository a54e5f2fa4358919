"""
Decompress a layer's blob in order: gzip (several members), zstd (several frames, skippable ones) or plain.

Called by converter.layerstream, in its thread. Generators of blocks (bytes, never empty, at most 512 KiB), from a
function that reads compressed bytes. Memory is bounded whatever the bytes say: each step asks for at most one block.
There is no limit on the ratio: a layer may well hold a terabyte of zeros. FormatError on anything that is not its
format from the first to the last byte. Sources: RFC 1952, RFC 8878.
"""

from __future__ import annotations

import enum
import zlib
from typing import TYPE_CHECKING

import zstandard
from isal import igzip_lib

from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.limits import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Read = Callable[[int], bytes]    # up to so many compressed bytes, b"" at the end

# Compressed bytes at once, and of what comes out: the fastest for igzip of 64 KiB to 1 MiB each, measured (larger
# blocks make the allocator map and unmap them: 40,000 page faults and 1 s of system time for 1.4 GB).
READ_BYTES = 256 * KIB
BLOCK_BYTES = 512 * KIB
ZSTD_WINDOW_BYTES_MAX = 128 * MIB      # as the zstd command allows without --long=31
_GZIP_STEP_BYTES_MIN = 4 * KIB  # what a new gzip member is given first: what it leaves is copied
_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_HEADER_BYTES = 10
_GZIP_DEFLATE = 8
_GZIP_HEADER_CRC, _GZIP_EXTRA, _GZIP_NAME, _GZIP_COMMENT, _GZIP_RESERVED = 0x02, 0x04, 0x08, 0x10, 0xE0
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
        return _gzip(_Feed(read, compression))
    if compression is Compression.ZSTD:
        return _zstd(_Feed(read, compression))
    return iter(lambda: read(BLOCK_BYTES), b"")


class _Feed:
    """Compressed bytes that can be looked at before they are used."""

    def __init__(self, read: Read, kind: Compression) -> None:
        self._read = read
        self._kind = kind
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
            raise FormatError(f"the {self._kind.value} stream ends early")

    def take(self, count: int) -> bytes:
        self.need(count)
        self.position += count
        return self.data[self.position - count : self.position]

    def skip(self, count: int) -> None:
        """Pass over `count` bytes, however many, without keeping them."""
        while count:
            self.need(1)
            step = min(count, len(self.data) - self.position)
            self.position += step
            count -= step

    def put_back(self, unused: bytes) -> None:
        """Undo the use of the last bytes; nearly always they still lie before `position`, and nothing is copied."""
        start = self.position - len(unused)
        if start >= 0 and self.data[start : self.position] == unused:
            self.position = start
        else:
            self.data = unused + self.data[self.position :]
            self.position = 0


def _gzip(feed: _Feed) -> Iterator[bytes]:
    """Members one after another; zeros may follow the last (tapes, and gzip(1) allows it)."""
    is_first = True
    while feed.has(1):
        if feed.data[feed.position] == 0 and not is_first:
            while feed.has(1):
                if feed.data.count(0, feed.position) != len(feed.data) - feed.position:
                    raise FormatError("something that is not gzip follows a gzip stream")
                feed.position = len(feed.data)
            return
        _gzip_header(feed, is_first=is_first)
        yield from _gzip_member(feed)
        is_first = False


def _gzip_header(feed: _Feed, *, is_first: bool) -> None:
    """Pass over a member's header. Not left to igzip, which misreads one of several fields that comes in pieces."""
    head = feed.take(_GZIP_HEADER_BYTES)
    if head[:2] != _GZIP_MAGIC:
        raise FormatError("the stream is not gzip" if is_first else "something that is not gzip follows a gzip stream")
    flags = head[3]
    if head[2] != _GZIP_DEFLATE or flags & _GZIP_RESERVED:
        raise FormatError(f"a gzip header with method {head[2]} and flags {flags:#x}")
    crc = zlib.crc32(head)
    if flags & _GZIP_EXTRA:
        raw_size = feed.take(2)
        crc = zlib.crc32(feed.take(int.from_bytes(raw_size, "little")), zlib.crc32(raw_size, crc))
    for flag in (_GZIP_NAME, _GZIP_COMMENT):
        end = 0
        while flags & flag and not end:
            feed.need(1)
            end = feed.data.find(0, feed.position) + 1
            crc = zlib.crc32(feed.take((end or len(feed.data)) - feed.position), crc)
    if flags & _GZIP_HEADER_CRC and int.from_bytes(feed.take(2), "little") != crc & 0xFFFF:
        raise FormatError("a gzip header's checksum is wrong")


def _gzip_member(feed: _Feed) -> Iterator[bytes]:
    """
    One member's data; its checksum and size are checked.

    It hands back what it did not use, so it gets little at first: no work that grows with the square of the number
    of members.
    """
    member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP_NO_HDR_VER)
    step = _GZIP_STEP_BYTES_MIN
    while not member.eof:
        piece = memoryview(b"")
        if member.needs_input:
            feed.need(1)
            piece = memoryview(feed.data)[feed.position : feed.position + step]
            feed.position += len(piece)
            step = min(2 * step, READ_BYTES)
        try:
            block = member.decompress(piece, BLOCK_BYTES)
        except _IGZIP_ERROR as error:
            raise FormatError(f"the gzip stream is damaged ({error})") from error
        if block:
            yield block
    feed.put_back(member.unused_data)


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
    One frame. Its blocks are counted here, so that a step never decompresses more than four of 128 KiB: the library
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
