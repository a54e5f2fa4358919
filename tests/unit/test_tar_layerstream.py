"""LayerStream: every compression, every kind of damage, and that its threads always end."""

from __future__ import annotations

import gc
import gzip
import hashlib
import io
import struct
import threading
import time
import zlib
from typing import Self

import pytest
import zstandard

from converter.layerstream import LayerStream
from lazyfs.errors import BugError, FormatError, IntegrityError, SourceError, UnsupportedError
from lazyfs.image.digest import Digest

OCI = "application/vnd.oci.image.layer.v1.tar"
DATA = bytes(range(256)) * 12_000 + bytes(1_000_000) + hashlib.sha256(b"x").digest() * 50_000


class Blob:
    """A ByteStream over bytes; `step`: gives at most so many at once; `error`: raised at the end."""

    def __init__(self, data: bytes, step: int = 1 << 20, error: Exception | None = None) -> None:
        self._stream = io.BytesIO(data)
        self._step = step
        self._error = error
        self.is_closed = False

    def read(self, size: int) -> bytes:
        data = self._stream.read(min(size, self._step))
        if not data and self._error is not None:
            raise self._error
        return data

    def close(self) -> None:
        self.is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture(autouse=True)
def _no_thread_left():
    yield
    gc.collect()
    end = time.monotonic() + 10
    while left := [thread.name for thread in threading.enumerate() if thread.name.startswith("layer-")]:
        assert time.monotonic() < end, left
        time.sleep(0.01)


def open_layer(blob: bytes, media_type: str = OCI + "+gzip", **options: object) -> LayerStream:
    promised = options.pop("promised", blob)
    assert isinstance(promised, bytes)
    digest = Digest.of(promised)
    return LayerStream(Blob(blob, **options), media_type, size=len(promised), digest=digest, name="layer L")


def read_all(layer: LayerStream, step: int = 1 << 16) -> bytes:
    parts = []
    while part := layer.read(step):
        assert len(part) <= step
        parts.append(part)
    return b"".join(parts)


def members(*parts: bytes) -> bytes:
    return b"".join(gzip.compress(part, 6, mtime=0) for part in parts)


def gzip_with_all_fields(data: bytes) -> bytes:
    head = b"\x1f\x8b\x08\x1e" + bytes(6) + struct.pack("<H", 60_000) + bytes(60_000) + b"n" * 5000 + b"\0" + b"c\0"
    head += struct.pack("<H", zlib.crc32(head) & 0xFFFF)
    body = zlib.compressobj(6, zlib.DEFLATED, -15)
    return head + body.compress(data) + body.flush() + struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF)


def zstd(data: bytes, **options: object) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def zstd_streamed(data: bytes) -> bytes:
    """A frame that does not state its size, in many blocks."""
    out = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    parts = [out.compress(data[i : i + 70_000]) + out.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
             for i in range(0, len(data), 70_000)]
    return b"".join(parts) + out.flush()


def skippable(size: int) -> bytes:
    return b"\x5a\x2a\x4d\x18" + struct.pack("<I", size) + bytes(size)


GOOD = {
    "gzip": (members(DATA), OCI + "+gzip"),
    "gzip, docker": (members(DATA), "application/vnd.docker.image.rootfs.diff.tar.gzip"),
    "gzip, members": (members(b"", DATA[:5], b"", DATA[5:3_000_000], DATA[3_000_000:], b""), OCI + "+gzip"),
    "gzip, stored": (gzip.compress(DATA, 0), OCI + "+gzip"),
    "gzip, all fields": (gzip_with_all_fields(DATA), OCI + "+gzip"),
    "gzip, zeros after it": (members(DATA) + bytes(700_000), OCI + "+gzip"),
    "zstd": (zstd(DATA), OCI + "+zstd"),
    "zstd, docker": (zstd(DATA), "application/vnd.docker.image.rootfs.diff.tar.zstd"),
    "zstd, checksum": (zstd(DATA, level=19, write_checksum=True), OCI + "+zstd"),
    "zstd, streamed": (zstd_streamed(DATA), OCI + "+zstd"),
    "zstd, frames": (skippable(3) + zstd(DATA[:9]) + skippable(900_000) + zstd(b"") + zstd(DATA[9:]) + skippable(0),
                     OCI + "+zstd"),
    "plain": (DATA, OCI),
    "plain, docker": (DATA, "application/vnd.docker.image.rootfs.diff.tar"),
    "gzip said to be plain, docker": (members(DATA), "application/vnd.docker.image.rootfs.diff.tar"),
    "no media type": (members(DATA), ""),
    "nondistributable": (zstd(DATA), "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"),
}


@pytest.mark.parametrize("step", [1 << 20, 10_007])
@pytest.mark.parametrize("name", GOOD)
def test_bytes_and_diff_id(name: str, step: int) -> None:
    blob, media_type = GOOD[name]
    layer = open_layer(blob, media_type, step=step)
    assert read_all(layer) == DATA
    assert layer.finish() == Digest.of(DATA)
    assert layer.read(10) == b""


@pytest.mark.parametrize("name", ["gzip", "zstd, frames", "gzip, all fields", "plain"])
def test_byte_by_byte(name: str) -> None:
    blob, media_type = GOOD[name]
    small = {"gzip": members(b"abc", b"", b"de"), "zstd, frames": zstd(b"abc") + skippable(2) + zstd_streamed(b"de"),
             "gzip, all fields": gzip_with_all_fields(b"abcde"), "plain": b"abcde"}[name]
    assert len(small) < len(blob)
    layer = open_layer(small, media_type, step=1)
    assert read_all(layer, 1) == b"abcde"
    assert layer.finish() == Digest.of(b"abcde")


@pytest.mark.parametrize("read", [0, 1, 3_000_000])
@pytest.mark.parametrize("name", ["gzip", "zstd", "plain"])
def test_finish_reads_the_rest(name: str, read: int) -> None:
    blob, media_type = GOOD[name]
    layer = open_layer(blob, media_type)
    left = read
    while left:
        left -= len(layer.read(left))
    assert layer.finish() == Digest.of(DATA)


def test_empty_layers() -> None:
    assert open_layer(b"", OCI).finish() == Digest.of(b"")
    assert open_layer(members(b"")).finish() == Digest.of(b"")
    assert open_layer(zstd(b""), OCI + "+zstd").finish() == Digest.of(b"")


FLIPPED = bytearray(members(DATA))
FLIPPED[len(FLIPPED) // 2] ^= 4
BAD = {
    "gzip cut": (members(DATA)[:-1], OCI + "+gzip", "ends early"),
    "gzip cut in its header": (b"\x1f\x8b\x08", OCI + "+gzip", "ends early"),
    "gzip cut in the second header": (members(DATA, b"x")[: len(members(DATA)) + 5], OCI + "+gzip", "ends early"),
    "gzip flipped": (bytes(FLIPPED), OCI + "+gzip", "gzip"),
    "gzip checksum": (members(DATA)[:-8] + bytes(4) + members(DATA)[-4:], OCI + "+gzip", "damaged"),
    "gzip, garbage after": (members(DATA) + b"garbage" * 2, OCI + "+gzip", "follows"),
    "gzip, a little garbage after": (members(DATA) + b"\x1f", OCI + "+gzip", "ends early"),
    "gzip, reserved flag": (b"\x1f\x8b\x08\x80" + members(DATA)[4:], OCI + "+gzip", "flags 0x80"),
    "gzip, other method": (b"\x1f\x8b\x07" + members(DATA)[3:], OCI + "+gzip", "method 7"),
    "gzip, header checksum": (b"\x1f\x8b\x08\x02" + members(DATA)[4:], OCI + "+gzip", "header's checksum"),
    "gzip, endless name": (b"\x1f\x8b\x08\x08" + b"n" * 3_000_000, OCI + "+gzip", "ends early"),
    "gzip, garbage after zeros": (members(DATA) + bytes(300_000) + b"garbage", OCI + "+gzip", "follows"),
    "gzip with zstd bytes": (zstd(DATA), OCI + "+gzip", "says gzip, its first bytes say zstd"),
    "gzip with plain bytes": (DATA, OCI + "+gzip", "says gzip, its first bytes say plain"),
    "gzip with nothing": (b"", OCI + "+gzip", "says gzip"),
    "plain with gzip bytes": (members(DATA), OCI, "says plain"),
    "zstd cut": (zstd(DATA)[:-1], OCI + "+zstd", "ends early"),
    "zstd cut in its magic": (zstd(DATA) + b"\x28\xb5", OCI + "+zstd", "ends early"),
    "zstd cut in its header": (zstd(DATA)[:5], OCI + "+zstd", "early"),
    "zstd cut at a block": (zstd_streamed(DATA)[:-7], OCI + "+zstd", "ends early"),
    "zstd checksum": (zstd(DATA, write_checksum=True)[:-1] + b"\0", OCI + "+zstd", "damaged"),
    "zstd, garbage after": (zstd(DATA) + b"garbage", OCI + "+zstd", "follows"),
    "zstd, skippable frame cut": (skippable(100)[:-1], OCI + "+zstd", "ends early"),
    "zstd, reserved block": (zstd(DATA)[:9] + b"\xff\xff\xff" + bytes(100), OCI + "+zstd", "damaged|header|early"),
    "zstd, window of 1 GiB": (b"\x28\xb5\x2f\xfd\x00" + bytes([20 << 3]) + b"\1\0\0", OCI + "+zstd", "window"),
    "zstd, dictionary": (b"\x28\xb5\x2f\xfd\x01\x58\x07" + b"\1\0\0", OCI + "+zstd", "dictionary"),
}


@pytest.mark.parametrize("name", BAD)
def test_damage(name: str) -> None:
    blob, media_type, message = BAD[name]
    layer = open_layer(blob, media_type)
    with pytest.raises(FormatError, match=f"^layer L: .*({message})"):
        read_all(layer)
    with pytest.raises(FormatError):   # and it stays so
        layer.finish()


@pytest.mark.parametrize("name", ["gzip", "zstd", "plain"])
def test_broken_promises(name: str) -> None:
    blob, media_type = GOOD[name]
    other = bytes([*blob[:-1], blob[-1] ^ 1])
    for promised in (other, blob + b"x", blob[:-1]):
        layer = open_layer(blob, media_type, promised=promised)
        with pytest.raises(IntegrityError, match=r"^layer L: .*promises"):
            layer.finish()


@pytest.mark.parametrize("name", ["gzip", "zstd"])
def test_damaged_on_the_way_is_no_format_error(name: str) -> None:
    """The blob that was promised is fine: the message must not call it badly made."""
    blob, media_type = GOOD[name]
    for damaged in (blob[: len(blob) // 2], b"\0" * 100 + blob[100:], blob[:-9] + bytes(9)):
        layer = open_layer(damaged, media_type, promised=blob)
        with pytest.raises(IntegrityError, match="promises"):
            read_all(layer)
    layer = open_layer(b"x" + DATA[1:], OCI, promised=DATA)
    layer.read(512)
    assert isinstance(layer.blame(FormatError("header checksum")), IntegrityError)


def test_blame_keeps_a_true_format_error() -> None:
    error = FormatError("header checksum")
    layer = open_layer(members(DATA))
    layer.read(512)
    assert layer.blame(error) is error
    assert layer.blame(error) is error


def test_other_media_types() -> None:
    for media_type in ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "application/vnd.in-toto+json", "x"):
        with pytest.raises(UnsupportedError, match=r"^layer L: media type"):
            open_layer(members(DATA), media_type)


def test_errors_of_the_source_come_through() -> None:
    layer = open_layer(GOOD["gzip"][0][:90_000 // 8], promised=GOOD["gzip"][0], error=SourceError("gone"))
    with pytest.raises(SourceError, match="gone"):
        read_all(layer)
    with pytest.raises(SourceError, match="gone"):
        layer.finish()


def test_closing_early_ends_the_threads_and_closes_the_blob() -> None:
    stream = Blob(DATA * 20)
    with LayerStream(stream, OCI, size=len(DATA) * 20, digest=Digest.of(b""), name="layer L") as layer:
        assert layer.read(10) == DATA[:10]
    assert stream.is_closed
    with pytest.raises(BugError, match="after close"):
        layer.read(1)
    layer.close()


def test_forgetting_it_ends_the_threads() -> None:
    layer = open_layer(DATA * 20, OCI)
    layer.read(1)
    del layer       # the fixture waits for the threads


def test_closing_in_another_thread_ends_a_waiting_read() -> None:
    class Slow(Blob):
        def read(self, size: int) -> bytes:
            time.sleep(0.3)
            return super().read(min(size, 1))

    layer = LayerStream(Slow(DATA), OCI, size=len(DATA), digest=Digest.of(DATA), name="layer L")
    timer = threading.Timer(0.1, layer.close)
    timer.start()
    with pytest.raises(BugError):
        layer.read(1)
    timer.join()


def test_many_tiny_members_take_linear_time() -> None:
    blob = members(b"x") * 30_000
    started = time.process_time()
    assert read_all(open_layer(blob)) == b"x" * 30_000
    assert time.process_time() - started < 20       # quadratic work would take minutes
