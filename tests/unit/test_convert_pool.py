"""The blob writer: what was written can be read back, whatever its codec."""

from __future__ import annotations

import io
import random
from typing import TYPE_CHECKING

import pytest

from converter.device import DeviceWriter
from converter.encode import Encoding
from converter.pool import RUN_BYTES, BlobWriter, CompressionPool
from lazyfs import limits
from lazyfs.image.codec import Codec

if TYPE_CHECKING:
    from pathlib import Path

RNG = random.Random(3)
LARGE = {
    "random": RNG.randbytes(5 * limits.MIB + 77),
    "text": b"the same words again and again " * 200_000,
    "holes of zeros": RNG.randbytes(limits.MIB) + bytes(3 * limits.MIB) + RNG.randbytes(limits.MIB + 5),
}


@pytest.mark.parametrize("codec", [Codec.ZSTD, Codec.LZ4, Codec.NONE])
def test_what_was_added_is_read_back(tmp_path: Path, codec: Codec) -> None:
    chunk = limits.CHUNK_SIZE_MIN_BYTES
    content = LARGE["random"][:RUN_BYTES] + bytes(3 * chunk) + LARGE["text"][:RUN_BYTES]
    with (tmp_path / "blob").open("x+b") as file, CompressionPool(2, 1) as pool:
        writer = BlobWriter(pool, file, Encoding(codec, 3, chunk))
        for start, count in ((0, 0), (RUN_BYTES, 3), (RUN_BYTES + 3 * chunk, 0)):
            if count:
                writer.add_zero_chunks(count)
                continue
            buffer = writer.take_buffer()
            buffer[:] = content[start : start + RUN_BYTES]
            writer.add_run(buffer, RUN_BYTES)
        places = ((0, len(content)), (1, 10), (chunk - 1, 2), (RUN_BYTES - 5, 4 * chunk), (len(content) - 3, 3))
        for offset, size in places:
            assert b"".join(writer.read_back(offset, size)) == content[offset : offset + size]
        writer.finish()


@pytest.mark.parametrize("kind", LARGE)
def test_a_large_file_that_comes_again_is_stored_once(tmp_path: Path, kind: str) -> None:
    """Also one that differs in its last byte only, and one whose end is not handed over yet."""
    data = LARGE[kind]
    other = data[:-1] + bytes([data[-1] ^ 1])
    with (tmp_path / "blob").open("x+b") as file, CompressionPool(2, 1) as pool:
        writer = BlobWriter(pool, file, Encoding(Codec.ZSTD, 3, limits.CHUNK_SIZE_MIN_BYTES))
        device = DeviceWriter(writer, limits.CHUNK_SIZE_MIN_BYTES, tmp_path)
        maps = [device.add_file(len(one), ((0, len(one)),), io.BytesIO(one).read) for one in (data, other, data, other)]
        device.finish()
        writer.finish()
    assert maps[0] == maps[2] != maps[1] == maps[3]
    assert device.shared_bytes == 2 * len(data)
    assert [path.name for path in tmp_path.iterdir()] == ["blob"]
