"""Hot blobs of random devices and extents: what comes out is the blocks in order, however the layers store them."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converter import hot, parallel
from converter.encode import Encoding
from converter.hot import HOT_CHUNK_BYTES, SMALL_BYTES_MAX, hot_encoding, write_hot_blob
from converter.reuse import LayerContent
from lazyfs import limits
from lazyfs.errors import IntegrityError
from lazyfs.image.blob import FOOTER_BYTES, parse_footer
from lazyfs.image.codec import Codec, compress, decompress
from lazyfs.image.digest import Digest, chunk_digest
from lazyfs.image.hot import EXTENT, pack_hot, parse_hot
from lazyfs.image.manifest import LayerBlob
from tests.formatkit import make_blob

BLOCK = limits.BLOCK_SIZE_BYTES
NONE = Digest.of(b"")


def layer_of(device: bytes, codec: Codec) -> tuple[LayerContent, bytes]:
    blob, table, tail = make_blob(device, [], codec)
    described = LayerBlob(Digest.of(blob), len(blob), NONE, NONE, "", Digest.of(tail), len(tail))
    return LayerContent(described, table, []), blob


@st.composite
def images(draw: st.DrawFn) -> tuple[list[bytes], list[tuple[int, int, int]]]:
    """(devices, disjoint extents in any order); a block is zeros, one letter or noise."""
    devices, extents = [], []
    for number in range(draw(st.integers(1, 3))):
        kinds = draw(st.lists(st.sampled_from("0ax"), min_size=1, max_size=50))
        rng = np.random.default_rng(draw(st.integers(0, 9)))
        devices.append(b"".join({"0": bytes(BLOCK), "a": b"a" * BLOCK, "x": rng.bytes(BLOCK)}[kind] for kind in kinds))
        borders = sorted(draw(st.sets(st.integers(0, len(kinds)), max_size=8)))
        extents += [(low, number, high - low) for low, high in zip(borders[::2], borders[1::2], strict=False)]
    return devices, draw(st.permutations(extents))


@given(images(), st.sampled_from([Codec.NONE, Codec.LZ4, Codec.ZSTD]), st.sampled_from([Codec.LZ4, Codec.ZSTD]))
@settings(max_examples=60, deadline=None)
def test_what_comes_out(
    image: tuple[list[bytes], list[tuple[int, int, int]]], stored_as: Codec, hot_codec: Codec
) -> None:
    devices, wanted = image
    if not wanted:
        return
    made = [layer_of(device, stored_as) for device in devices]
    blobs = {layer.blob.digest: blob for layer, blob in made}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "hot"
        blob, part = write_hot_blob(
            np.array(wanted, dtype=EXTENT), [layer for layer, _ in made], Encoding(hot_codec, 3, 1 << 16), 2,
            hot_index=7, read=lambda digest, offset, size: blobs[digest][offset : offset + size], path=path)
        data = path.read_bytes()
        assert [one.name for one in Path(directory).iterdir()] == ["hot"]
    assert (Digest.of(data), len(data)) == (blob.digest, blob.size)
    footer = parse_footer(data[-FOOTER_BYTES:], len(data))
    table = part.table
    assert (footer.hot, footer.device_size, footer.chunk_count) == (True, table.device_size, table.chunk_count)
    content = b""
    for index, row in enumerate(table.rows):
        stored = data[int(row["blob_offset"]) :][: int(row["stored_size"])]
        chunk = bytes(decompress(stored, Codec(int(row["codec"])), table.chunk_bytes(index)))
        assert chunk_digest(chunk) == bytes(row["digest"])
        content += chunk
    assert content == b"".join(
        devices[device][first * BLOCK : (first + count) * BLOCK] for first, device, count in wanted)
    packed = pack_hot(part)
    assert pack_hot(parse_hot(packed, [len(device) for device in devices], [0] * 7 + [len(data)], 7)) == packed


def test_a_device_of_several_chunks(tmp_path: Path) -> None:
    device = np.random.default_rng(1).bytes(2 * HOT_CHUNK_BYTES + 5 * BLOCK)
    layer, blob = layer_of(device, Codec.NONE)
    _, part = write_hot_blob(np.array([(1, 0, len(device) // BLOCK - 1)], dtype=EXTENT), [layer],
                             Encoding(Codec.ZSTD, 1, 1 << 16), 2, hot_index=1,
                             read=lambda _, offset, size: blob[offset : offset + size], path=tmp_path / "hot")
    assert [bytes(row["digest"]) for row in part.table.rows] == [
        chunk_digest(device[at : at + HOT_CHUNK_BYTES]) for at in range(BLOCK, len(device), HOT_CHUNK_BYTES)]


@pytest.mark.parametrize(("level", "of_large"), [(3, 6), (12, 12)])
def test_a_small_hot_part_is_compressed_as_well_as_can_be(tmp_path: Path, level: int, of_large: int) -> None:
    device = b"".join(number.to_bytes(2, "big") * (number % 7) for number in range(40_000))
    device = device[: len(device) // BLOCK * BLOCK]
    layer, blob = layer_of(device, Codec.NONE)
    encoding = Encoding(Codec.ZSTD, level, 1 << 16)
    _, part = write_hot_blob(np.array([(0, 0, len(device) // BLOCK)], dtype=EXTENT), [layer], encoding, 1, hot_index=1,
                             read=lambda _, offset, size: blob[offset : offset + size], path=tmp_path / "hot")
    assert int(part.table.rows["stored_size"][0]) == len(compress(device, Codec.ZSTD, 19)[1])
    assert hot_encoding(encoding, SMALL_BYTES_MAX + 1).level == of_large
    assert hot_encoding(Encoding(Codec.LZ4, 2, 1 << 16), SMALL_BYTES_MAX).level == 2


@pytest.mark.parametrize("damage", ["flipped", "short"])
def test_a_damaged_layer_leaves_nothing(tmp_path: Path, damage: str) -> None:
    layer, blob = layer_of(b"abcd" * BLOCK, Codec.NONE)

    def read(_: Digest, offset: int, size: int) -> bytes:
        data = blob[offset : offset + size]
        return data[:-1] if damage == "short" else b"?" + data[1:]

    with pytest.raises(IntegrityError):
        write_hot_blob(np.array([(0, 0, 1)], dtype=EXTENT), [layer], Encoding(Codec.ZSTD, 1, 1 << 16), 2, hot_index=1,
                       read=read, path=tmp_path / "hot")
    assert not list(tmp_path.iterdir())


def test_a_read_that_comes_back_after_all_was_given_up_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, blob = layer_of(np.random.default_rng(1).bytes(48 * BLOCK), Codec.NONE)
    hangs, goes_on = threading.Event(), threading.Event()
    written: list[object] = []
    readers: list[threading.Thread] = []
    monkeypatch.setattr(hot, "_pwrite", lambda *words: written.append(words))
    monkeypatch.setattr(parallel, "STOP_WAIT_S", 0.0)

    def read(_: Digest, offset: int, size: int) -> bytes:
        if offset:
            assert hangs.wait(20)
            raise IntegrityError("the other one")
        readers.append(threading.current_thread())
        hangs.set()
        assert goes_on.wait(20)
        return blob[offset : offset + size]

    with pytest.raises(IntegrityError, match="the other one"):
        write_hot_blob(np.array([(0, 0, 1), (40, 0, 1)], dtype=EXTENT), [layer], Encoding(Codec.ZSTD, 1, 1 << 16), 2,
                       hot_index=1, read=read, path=tmp_path / "hot")
    goes_on.set()
    readers[0].join(20)
    assert not readers[0].is_alive()
    assert not written
