"""
Codecs of stored chunks: none, lz4 (block), zstd (one frame). Exact sizes in, exact sizes out.

Decoding is bounded by the size the table promises, whatever the compressed bytes say (lz4: `uncompressed_size`;
zstd: the frame must state exactly that size, for the library ignores `max_output_size` when it states one).
A chunk that does not shrink is stored as it is; a chunk of zeros is not stored at all.
"""

from __future__ import annotations

import enum
import threading

import lz4.block
import zstandard

from lazyfs import limits
from lazyfs.errors import FormatError


class Codec(enum.IntEnum):
    """Values are those of a chunk table's row."""

    ZERO = 0    # all zeros; nothing stored
    NONE = 1    # stored as it is
    LZ4 = 2     # lz4 block without its size
    ZSTD = 3    # one zstd frame that states its content size


LEVEL_DEFAULTS = {Codec.NONE: 0, Codec.LZ4: 2, Codec.ZSTD: 3}   # by measurement, docs/design.md
LEVEL_RANGES = {Codec.NONE: (0, 0), Codec.LZ4: (1, 12), Codec.ZSTD: (1, 19)}
_LZ4_FAST_LEVEL = 1              # level 1 is lz4's fast mode, from 2 on the high-compression mode
# zstd's own tables of level 3 (2^17 and 2^16 entries for inputs above 256 KiB) do not fit into the 512 KiB of
# second-level cache that a core often has; 2^16 and 2^15 do: a tenth less time, 0.8 % more bytes.
_ZSTD_TUNED_LEVEL = 3
_ZSTD_TUNED_ABOVE_BYTES = 256 * limits.KIB
_local = threading.local()


def compress(data: bytes | memoryview, codec: Codec, level: int) -> tuple[Codec, bytes | memoryview]:
    """Compress one chunk. Returns the codec really used and the stored bytes (b"" for zeros)."""
    if not any_nonzero(data):
        return Codec.ZERO, b""
    if codec is Codec.LZ4:
        if level <= _LZ4_FAST_LEVEL:
            stored: bytes = lz4.block.compress(data, store_size=False)
        else:
            stored = lz4.block.compress(data, mode="high_compression", compression=level, store_size=False)
    elif codec is Codec.ZSTD:
        stored = _zstd_compressor(level, len(data)).compress(data)
    else:
        return Codec.NONE, data
    return (codec, stored) if len(stored) < len(data) else (Codec.NONE, data)


def decompress(stored: bytes | memoryview, codec: Codec, size: int) -> bytes | memoryview:
    """
    Decode a stored chunk into exactly `size` bytes.

    Raises:
        FormatError: the bytes are not what `codec` makes of `size` bytes.

    """
    if codec is Codec.ZSTD:
        return _decompress_zstd(stored, size)
    if codec is Codec.LZ4:
        try:
            data: bytes = lz4.block.decompress(stored, uncompressed_size=size)
        except (lz4.block.LZ4BlockError, ValueError) as error:
            raise FormatError(f"damaged lz4 chunk of {len(stored)} bytes") from error
        if len(data) != size:
            raise FormatError(f"lz4 chunk holds {len(data)} bytes, expected {size}")
        return data
    if codec is Codec.NONE:
        if len(stored) != size:
            raise FormatError(f"stored chunk holds {len(stored)} bytes, expected {size}")
        return stored
    if len(stored):
        raise FormatError("a chunk of zeros must not be stored")
    return bytes(size)


def any_nonzero(data: bytes | memoryview) -> bool:
    """Whether a chunk has a byte other than zero (nearly always told by its first bytes)."""
    head = bytes(data[:64])
    return head.count(0) != len(head) or bytes(data).count(0) != len(data)


def _zstd_compressor(level: int, size: int) -> zstandard.ZstdCompressor:
    """This thread's compressor for chunks of that size."""
    compressors: dict[tuple[int, bool], zstandard.ZstdCompressor] = _local.__dict__.setdefault("compressors", {})
    is_tuned = level == _ZSTD_TUNED_LEVEL and size > _ZSTD_TUNED_ABOVE_BYTES
    compressor = compressors.get((level, is_tuned))
    if compressor is None:
        if is_tuned:
            compressor = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters.from_level(
                level, source_size=limits.CHUNK_SIZE_MAX_BYTES, hash_log=16, chain_log=15,
                write_checksum=False, write_content_size=True,
            ))
        else:
            compressor = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True)
        compressors[level, is_tuned] = compressor
    return compressor


def _decompress_zstd(stored: bytes | memoryview, size: int) -> bytes:
    try:
        parameters = zstandard.get_frame_parameters(stored)
        if parameters.content_size != size:
            raise FormatError(f"zstd chunk states {parameters.content_size} bytes, expected {size}")
        decompressor = _local.__dict__.get("decompressor")
        if decompressor is None:
            decompressor = _local.decompressor = zstandard.ZstdDecompressor()
        data: bytes = decompressor.decompress(stored, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"damaged zstd chunk of {len(stored)} bytes") from error
    if len(data) != size:
        raise FormatError(f"zstd chunk holds {len(data)} bytes, expected {size}")
    return data
