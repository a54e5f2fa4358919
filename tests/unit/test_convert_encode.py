"""Codec lz4 stores groups of chunks as zstd where that pays, the same way whatever the threads do."""

from __future__ import annotations

import random
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING

import pytest

from converter import encode
from converter.encode import GROUP_RUNS, TRIAL_BYTES, Encoding
from converter.pool import RUN_BYTES, BlobWriter, CompressionPool
from lazyfs import limits
from lazyfs.image.codec import Codec, compress, decompress

if TYPE_CHECKING:
    from pathlib import Path

RNG = random.Random(5)
# 32 different bytes in no order: an entropy coder drops three bits of eight, lz4 finds next to nothing.
CODES = RNG.randbytes(RUN_BYTES).translate(bytes(range(32)) * 8)
# Noise that comes again within lz4's window: nothing to gain for an entropy coder.
ECHOES = RNG.randbytes(16 * limits.KIB) * (RUN_BYTES // (16 * limits.KIB))
CHUNK = 256 * limits.KIB
LZ4 = Encoding(Codec.LZ4, 1, CHUNK)


def write(path: Path, runs: list[bytes], encoding: Encoding = LZ4, *, jobs: int = 2, at_once: int = 1) -> list[int]:
    """Write runs as a device (b"": a chunk of zeros), read it back; the codecs of all chunks."""
    path.unlink(missing_ok=True)
    with path.open("x+b") as file, CompressionPool(jobs, at_once) as pool:
        writer = BlobWriter(pool, file, encoding)
        for run in runs:
            if run:
                buffer = writer.take_buffer()
                buffer[: len(run)] = run
                writer.add_run(buffer, len(run))
            else:
                writer.add_zero_chunks(1)
        rows = writer.finish()
        whole = b"".join(run or bytes(encoding.chunk_size) for run in runs)
        whole = whole[: len(whole) // encoding.chunk_size * encoding.chunk_size]    # a device's end is not read back
        assert b"".join(writer.read_back(0, len(whole))) == whole
    codecs: list[int] = rows["codec"].tolist()
    return codecs


def test_a_groups_first_bytes_decide_for_all_of_it(tmp_path: Path) -> None:
    mixed = CODES[:TRIAL_BYTES] + ECHOES[TRIAL_BYTES:]
    runs = [CODES] * GROUP_RUNS + [ECHOES] * GROUP_RUNS + [mixed, *[ECHOES] * (GROUP_RUNS - 1)] + [ECHOES, CODES]
    codecs = write(tmp_path / "blob", runs)
    in_group = GROUP_RUNS * RUN_BYTES // CHUNK
    assert codecs[:in_group] == [Codec.ZSTD] * in_group
    assert codecs[in_group : 2 * in_group] == [Codec.LZ4] * in_group
    assert codecs[2 * in_group : 3 * in_group] == [Codec.ZSTD] * in_group
    assert Codec.ZSTD not in codecs[3 * in_group :]


def test_zstd_and_none_are_never_mixed(tmp_path: Path) -> None:
    runs = [ECHOES, CODES] * GROUP_RUNS
    assert set(write(tmp_path / "blob", runs, Encoding(Codec.ZSTD, 3, CHUNK))) == {Codec.ZSTD}
    assert set(write(tmp_path / "blob", runs, Encoding(Codec.NONE, 0, CHUNK))) == {Codec.NONE}


def test_what_cannot_be_compressed_or_is_zero_stays_what_it_is(tmp_path: Path) -> None:
    noise = random.Random(6).randbytes(RUN_BYTES)
    codecs = write(tmp_path / "blob", [noise, bytes(RUN_BYTES), b"", noise[: RUN_BYTES // 2 + 4096]])
    in_run = RUN_BYTES // CHUNK
    assert codecs == ([Codec.NONE] * in_run + [Codec.ZERO] * (in_run + 1) + [Codec.NONE] * (in_run // 2 + 1))


def test_threads_and_windows_change_nothing(tmp_path: Path) -> None:
    """Also runs of other sizes, and zeros between them, that lie differently in a window."""
    runs = [CODES, b"", ECHOES, CODES[:CHUNK], *[ECHOES] * GROUP_RUNS, b"", b"", CODES, CODES[: CHUNK + 4096]]
    first = None
    for jobs, at_once in ((1, 1), (2, 8), (16, 1)):
        path = tmp_path / f"{jobs}-{at_once}"
        write(path, runs, jobs=jobs, at_once=at_once)
        first = first or path.read_bytes()
        assert path.read_bytes() == first


def test_a_trial_that_fails_ends_the_others_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> tuple[Codec, bytes]:
        raise MemoryError

    monkeypatch.setattr(encode, "compress", fails)
    with (tmp_path / "blob").open("x+b") as file, CompressionPool(2, 1) as pool:
        writer = BlobWriter(pool, file, LZ4)
        for _ in range(GROUP_RUNS):
            writer.add_run(bytearray(CODES), RUN_BYTES)
        for _ in range(2):      # the one that tried, and one that was to follow it
            with pytest.raises(MemoryError):
                writer.finish()
        writer.abandon()


def test_a_writer_is_abandoned_while_runs_wait(tmp_path: Path) -> None:
    """Leaving the pool waits for its threads: it would hang if one waited for a trial that never runs."""
    with (tmp_path / "blob").open("x+b") as file, CompressionPool(1, 1) as pool:
        writer = BlobWriter(pool, file, LZ4)
        for _ in range(GROUP_RUNS + 1):
            writer.add_run(bytearray(CODES), RUN_BYTES)
        writer.abandon()
        assert len(writer.finish()) * CHUNK < (GROUP_RUNS + 1) * RUN_BYTES


def test_a_run_whose_trial_was_cancelled_does_not_wait(tmp_path: Path) -> None:
    with CompressionPool(1, 1) as pool:
        busy = [pool.submit(memoryview(CODES), LZ4, None) for _ in range(3)]
        trial = busy[-1]
        assert trial.cancel()
        later = pool.submit(memoryview(CODES), LZ4, trial)
        with pytest.raises(CancelledError):
            later.result(timeout=30)


@pytest.mark.parametrize("size", [4096, 256 * limits.KIB, 256 * limits.KIB + 4096, limits.MIB])
@pytest.mark.parametrize("level", [1, 3, 9])
def test_zstd_chunks_of_every_size_come_back(size: int, level: int) -> None:
    data = CODES[:size]
    codec, stored = compress(data, Codec.ZSTD, level)
    assert codec is Codec.ZSTD
    assert decompress(stored, codec, size) == data
