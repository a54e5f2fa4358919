"""
Large answers of trackers, compressed: zstd frames one after the other (RFC 8878, 3.1), together the answer. Pure.

Layer: peers. Who calls: tracker.views packs, peers.trackerclient unpacks. A view of 10,000 members has 600 KiB as JSON,
a seventh of that packed, and a cluster that starts an image asks for it 10,000 times: so a view is a frame of its own,
made once, and what differs from member to member are small frames around it.
"""

from __future__ import annotations

from typing import Final

import zstandard

from lazyfs import limits
from lazyfs.errors import FormatError

ENCODING: Final = "zstd"         # of Accept-Encoding and Content-Encoding
PACK_BYTES_MIN: Final = 16 * 1024    # below, the time is worth more than the bytes
_LEVEL: Final = 1                # 600 KiB: 2 ms
_WINDOW_BYTES_MAX: Final = 8 * limits.MIB    # what RFC 8878 wants decoders to have


def pack(data: bytes) -> bytes:
    """One frame."""
    return zstandard.ZstdCompressor(level=_LEVEL).compress(data)


def unpack(data: bytes, size_max: int) -> bytes:
    """All frames. Raises FormatError: they are damaged, or hold more than `size_max` bytes."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES_MAX)
    try:
        with decompressor.stream_reader(data, read_across_frames=True) as reader:
            found = reader.read(size_max + 1)
    except zstandard.ZstdError as error:
        raise FormatError(f"damaged zstd frames: {error}") from error
    if len(found) > size_max:
        raise FormatError(f"zstd frames of more than {size_max} bytes")
    return found
