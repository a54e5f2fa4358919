"""Scrubbing and sampled reads: damage at rest is found, dropped for good, and fetched again."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from lazyfs.cache import inventory, scrub
from lazyfs.cache.inventory import ImageRecord
from lazyfs.cache.store import CacheDir
from lazyfs.fetch.engine import Fetcher, FetchLimits
from lazyfs.image.digest import Digest
from tests.fetchkit import CHUNK, MemorySource, make_sample

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fetchkit import Sample

BOOT, LATER_BOOT = b"a" * 16, b"b" * 16


def fill(path: Path, sample: Sample, indexes: range, *, boot_id: bytes = BOOT) -> None:
    with CacheDir.open(path, boot_id=boot_id) as cache:
        cached = cache.device(sample.digest, sample.table.chunk_size, sample.table.device_size)
        for index in indexes:
            assert cached.write(index, sample.chunk(index))
        assert cached.checkpoint()
        cached.release()


def data_file(path: Path, sample: Sample) -> Path:
    return next((path / "v1" / sample.digest.hex).glob("data.*"))


def spoil(path: Path, sample: Sample, *indexes: int) -> None:
    with data_file(path, sample).open("r+b") as file:
        for index in indexes:
            file.seek(index * CHUNK + 1234)
            file.write(b"rotten")


def look_through(cache: CacheDir, sample: Sample) -> tuple[int, list[int]]:
    """Bytes compared, and damaged chunks."""
    checked, damaged, first, count = 0, list[int](), 0, 1
    while first < count:
        piece = scrub.scrub_piece(cache, sample.digest.hex, first, 0)
        first, count = piece.next, piece.count
        checked += piece.checked_bytes
        damaged += piece.damaged
    return checked, damaged


# --- scrub ------------------------------------------------------------------------------------------------------------


def test_a_scrub_finds_exactly_what_is_damaged_and_drops_it_for_good(tmp_path):
    sample = make_sample(16, zeros=(3,))
    fill(tmp_path, sample, range(16))
    spoil(tmp_path, sample, 5, 15)
    with CacheDir.open(tmp_path, boot_id=BOOT) as cache:
        assert look_through(cache, sample) == (len(sample.data), [5, 15])
        assert cache.in_use() == set()
        assert look_through(cache, sample) == (len(sample.data) - CHUNK - 4096, [])
    for boot_id in (BOOT, LATER_BOOT):    # a power cut does not bring it back
        with CacheDir.open(tmp_path, boot_id=boot_id) as cache:
            cached = cache.device(sample.digest, CHUNK, len(sample.data))
            assert cached.missing(0, 15) == [5, 15]
            cached.release()


def test_a_scrub_ends_its_piece_in_time_and_goes_on_where_it_was(tmp_path, monkeypatch):
    sample = make_sample(16)
    fill(tmp_path, sample, range(16))
    monkeypatch.setattr(scrub, "PIECE_BYTES_MAX", 4 * CHUNK)
    with CacheDir.open(tmp_path, boot_id=BOOT) as cache:
        pieces = [scrub.scrub_piece(cache, sample.digest.hex, first, 0) for first in (0, 4, 12)]
        assert [(piece.next, piece.count, piece.checked_bytes) for piece in pieces] == [
            (4, 16, 4 * CHUNK), (8, 16, 4 * CHUNK), (16, 16, 3 * CHUNK + 4096)]
        stopped = scrub.scrub_piece(cache, sample.digest.hex, 0, 0, lambda: True)
        assert stopped.next == 1


def test_a_scrub_keeps_to_its_rate(tmp_path):
    sample = make_sample(16)
    fill(tmp_path, sample, range(16))
    with CacheDir.open(tmp_path, boot_id=BOOT) as cache:
        began = time.monotonic()
        piece = scrub.scrub_piece(cache, sample.digest.hex, 0, 4 * CHUNK)
        took_s = time.monotonic() - began
    assert piece.checked_bytes <= 4 * CHUNK * took_s + CHUNK
    assert piece.next < 16


def test_what_is_not_there_any_more_or_was_never_is_nothing_to_scrub(tmp_path):
    sample = make_sample(4)
    with CacheDir.open(tmp_path, boot_id=BOOT) as cache:
        assert scrub.scrub_piece(cache, sample.digest.hex, 0, 0) == scrub.Piece(0, 0, 0, ())
        assert inventory.device_names(tmp_path) == []
    fill(tmp_path, sample, range(0))
    with CacheDir.open(tmp_path, boot_id=BOOT) as cache:
        assert scrub.scrub_piece(cache, sample.digest.hex, 0, 0).count == 0


def test_looking_is_no_use_of_a_device(tmp_path):
    """Else the least recently used would be whatever was looked through first."""
    sample = make_sample(4)
    fill(tmp_path, sample, range(4))
    directory = tmp_path / "v1" / sample.digest.hex
    with CacheDir.open(tmp_path, boot_id=BOOT) as cache:
        look_through(cache, sample)    # it leaves its own mark in the directory, once
        os.utime(directory, (1000, 1000))
        cached = cache.existing_device(sample.digest.hex)
        assert cached is not None
        cache.checkpoint()
        cached.release()
        assert directory.stat().st_mtime == 1000
        user = cache.device(sample.digest, CHUNK, len(sample.data))
        assert directory.stat().st_mtime > 1000
        user.release()


def test_a_device_is_due_when_it_was_not_looked_through_for_so_long(tmp_path):
    samples = [make_sample(4, seed=seed) for seed in range(3)]
    for sample in samples:
        fill(tmp_path, sample, range(4))
    names = [sample.digest.hex for sample in samples]
    now = time.time()
    assert scrub.due(tmp_path, 3600, now) == [], "just written"
    os.utime(data_file(tmp_path, samples[1]), (now - 4000, now - 4000))
    os.utime(data_file(tmp_path, samples[2]), (now - 9000, now - 9000))
    assert scrub.due(tmp_path, 3600, now) == [names[2], names[1]]
    with CacheDir.open(tmp_path, boot_id=BOOT) as cache:
        look_through(cache, samples[2])
    assert scrub.due(tmp_path, 3600, now) == [names[1]]
    assert len(scrub.due(tmp_path, 3600, now + 4000)) == 3
    at = scrub.last_scrub(tmp_path, names[2])
    assert at is not None
    assert abs(at - now) < 60
    assert len(scrub.due(tmp_path, 3600, now - 400 * 86400)) == 3, "a clock that was wrong once keeps nothing away"


NO_RECORDS = [b"", b"x", b"[]", b"{}", b'{"at": "x"}', b'{"at": null}', b'{"at": NaN}', b"\xff", b"[" * 4096]


@pytest.mark.parametrize("text", NO_RECORDS)
def test_a_record_of_a_scrub_that_is_damaged_is_none(tmp_path, text):
    sample = make_sample(4)
    fill(tmp_path, sample, range(4))
    (tmp_path / "v1" / sample.digest.hex / "scrubbed").write_bytes(text)
    assert scrub.last_scrub(tmp_path, sample.digest.hex) is None
    assert scrub.due(tmp_path, 3600, time.time() + 7200) == [sample.digest.hex]


def test_the_mark_of_a_scrub_outlives_the_next_start(tmp_path):
    sample = make_sample(4)
    fill(tmp_path, sample, range(4))
    with CacheDir.open(tmp_path, boot_id=BOOT) as cache:
        look_through(cache, sample)
    fill(tmp_path, sample, range(4), boot_id=LATER_BOOT)
    assert scrub.last_scrub(tmp_path, sample.digest.hex) is not None


def test_what_is_named_is_an_image_or_a_digest(tmp_path):
    samples = [make_sample(4, seed=seed) for seed in range(3)]
    for sample in samples:
        fill(tmp_path, sample, range(4))
    names = [sample.digest.hex for sample in samples]
    bootstrap = Digest.of(b"bootstrap")
    ImageRecord("app:1", tuple(names[:2])).write(tmp_path, bootstrap)
    found = inventory.take(tmp_path)
    assert found.named_devices("app:1") == found.named_devices(bootstrap.text) == sorted(names[:2])
    assert found.named_devices(names[2]) == [names[2]]
    assert found.named_devices("app:2") is None


# --- sampled reads ----------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_sampled_read_of_a_damaged_chunk_gives_the_right_bytes(tmp_path):
    sample = make_sample(16)
    fill(tmp_path, sample, range(12))
    spoil(tmp_path, sample, 2, 7, 14)
    source = MemorySource({sample.blob: sample.stored})
    with CacheDir.open(tmp_path, boot_id=BOOT) as cache:
        cache.health.verify_every = 1
        device = sample.device(cache, source)
        async with Fetcher(FetchLimits()) as fetcher:
            for _ in range(2):
                for offset in range(0, len(sample.data), 16 * 1024):
                    size = min(16 * 1024, len(sample.data) - offset)
                    data = await fetcher.read(device, offset, size, deadline=time.monotonic() + 20)
                    assert data == sample.data[offset : offset + size]
        assert cache.health.statistics.chunks_damaged == 2
        assert cache.health.statistics.chunks_verified == 10, "each once; what was just fetched is not doubted"
        assert device.cached.complete
        device.cached.release()


@pytest.mark.trio
async def test_one_of_so_many_first_reads_is_a_sample(tmp_path):
    sample = make_sample(64)
    fill(tmp_path, sample, range(64))
    source = MemorySource({sample.blob: sample.stored})
    with CacheDir.open(tmp_path, boot_id=BOOT) as cache:
        for every, expected in ((0, 0), (16, 4), (64, 1)):
            cache.health.verify_every, before = every, cache.health.statistics.chunks_verified
            device = sample.device(cache, source)
            async with Fetcher(FetchLimits()) as fetcher:
                for index in range(64):
                    await fetcher.read(device, index * CHUNK, 4096, deadline=time.monotonic() + 20)
            assert cache.health.statistics.chunks_verified - before == expected
            device.cached.release()
    assert source.requests == []
