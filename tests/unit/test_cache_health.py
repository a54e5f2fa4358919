"""Trouble with the cache's disk: when it is tried again, what is said; and checksums of what lies on it."""

from __future__ import annotations

import errno
import os
import random
from itertools import pairwise

import pytest

from lazyfs.cache import files
from lazyfs.cache.health import Trouble
from lazyfs.cache.store import CachedDevice, CacheDir
from lazyfs.image.digest import Digest

CHUNK = 64 * 1024
BOOT, LATER_BOOT = b"a" * 16, b"b" * 16
DIGEST = Digest.of(b"device")
CHUNKS = [random.Random(i).randbytes(CHUNK if i < 9 else 4096) for i in range(10)]
SIZE = 9 * CHUNK + 4096


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def full(number: int = errno.EIO) -> OSError:
    return OSError(number, os.strerror(number))


def device(cache: CacheDir) -> CachedDevice:
    return cache.device(DIGEST, CHUNK, SIZE)


# --- when it is tried again -------------------------------------------------------------------------------------------


def test_after_a_failure_one_try_a_pause_and_pauses_grow_to_their_bound():
    clock = Clock()
    trouble = Trouble("storing", 1.0, 30.0, clock)
    assert trouble.may_try()
    tries: list[float] = []
    for _ in range(2000):
        if trouble.may_try():
            tries.append(clock.now_s - 1000)
            trouble.failed(full())
        clock.now_s += 0.125
    pauses = [round(later - sooner) for sooner, later in pairwise(tries)]
    assert pauses[:5] == [1, 2, 4, 8, 16]
    assert set(pauses[5:]) == {30}
    trouble.worked()
    assert trouble.describe() is None
    assert all(trouble.may_try() for _ in range(10))
    trouble.failed(full())
    clock.now_s += 1.0
    assert trouble.may_try(), "the first pause is short again"


def test_while_one_tries_the_others_wait_for_what_it_finds():
    clock = Clock()
    trouble = Trouble("storing", 1.0, 30.0, clock)
    trouble.failed(full())
    clock.now_s += 1.0
    assert [trouble.may_try() for _ in range(3)] == [True, False, False]


def test_failures_that_come_together_are_one():
    clock = Clock()
    trouble = Trouble("storing", 1.0, 30.0, clock)
    for _ in range(8):
        trouble.failed(full())
    clock.now_s += 1.0
    assert trouble.may_try()


def test_it_is_said_once_when_it_begins_and_once_when_it_ends(caplog):
    trouble = Trouble("cache /c: storing", 1.0, 30.0, Clock())
    for _ in range(5):
        trouble.failed(full(errno.EROFS))
    found = trouble.describe()
    assert found is not None
    assert (found["what"], found["why"], found["refused"]) == ("cache /c: storing", "Read-only file system", 0)
    assert found["since"] > 1_600_000_000
    assert not trouble.may_try()
    trouble.worked()
    assert [record.getMessage() for record in caplog.records] == [
        "cache /c: storing fails: Read-only file system; tried again from time to time",
        "cache /c: storing works again after 0 s; 1 times it was not tried",
    ]


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EDQUOT, errno.ENOSPC])
def test_a_disk_that_fails_is_not_asked_for_every_chunk_and_is_used_again(tmp_path, monkeypatch, number):
    """EDQUOT and its like by injection: not each kernel has quotas."""
    asked: list[int] = []

    def refuse(*_: object) -> None:
        asked.append(1)
        raise full(number)

    with CacheDir.open(tmp_path / "cache") as cache:
        clock = Clock()
        cache.health.writing = Trouble("storing", 1.0, 30.0, clock)
        cached = device(cache)
        wanted: list[int] = []
        cache.space.on_short = lambda: wanted.append(1)
        with monkeypatch.context() as patch:
            patch.setattr(files, "pwrite_all", refuse)
            assert not any(cached.write(index % 9, CHUNKS[index % 9]) for index in range(90))
            assert len(asked) == 1
            assert bool(wanted) == (number in (errno.ENOSPC, errno.EDQUOT)), "somebody can make room"
            assert cache.health.describe()["trouble"][0]["why"] == os.strerror(number)
            assert cache.health.statistics.chunks_not_stored == 90
            assert cache.space.used_bytes == 0
        assert not cached.write(3, CHUNKS[3])
        clock.now_s += 1.0
        assert cached.write(3, CHUNKS[3])
        assert cached.write(4, CHUNKS[4])
        assert cache.health.describe()["trouble"] == []
        assert cached.read(3 * CHUNK, CHUNK) == CHUNKS[3]
        cached.release()


def test_a_disk_that_cannot_be_read_is_not_written_to_at_once_so_that_memory_serves(tmp_path):
    with CacheDir.open(tmp_path / "cache") as cache:
        cache.health.writing = Trouble("storing", 1.0, 30.0, Clock())
        cached = device(cache)
        assert cached.write(1, CHUNKS[1])
        number, elsewhere = cached.fd, os.open(tmp_path, os.O_RDONLY)   # EISDIR: an error of the disk's kind
        kept = os.dup(number)
        os.dup2(elsewhere, number)
        try:
            assert cached.read_if_present(CHUNK, CHUNK) is None
        finally:
            os.dup2(kept, number)
            os.close(kept)
            os.close(elsewhere)
        assert not cached.present(1, 1)
        assert not cached.write(1, CHUNKS[1])
        assert cache.health.statistics.chunks_unreadable == 1
        cached.release()


# --- checksums --------------------------------------------------------------------------------------------------------


def spoil(cached: CachedDevice, index: int) -> None:
    with cached.data_path.open("r+b") as file:
        file.seek(index * CHUNK + 77)
        byte = file.read(1)
        file.seek(index * CHUNK + 77)
        file.write(bytes([byte[0] ^ 0x10]))


def test_a_chunk_with_other_bytes_than_were_stored_is_found_forgotten_and_taken_again(tmp_path):
    with CacheDir.open(tmp_path / "cache", boot_id=BOOT) as cache:
        cached = device(cache)
        for index in (1, 2, 9):
            assert cached.write(index, memoryview(CHUNKS[index]))
        cached.mark_zeros([4])
        assert [cached.verify(index) for index in (1, 2, 4, 9, 0)] == [True, True, True, True, None]
        for index in (2, 4, 9):
            spoil(cached, index)
        assert [cached.verify(index) for index in (1, 2, 4, 9)] == [True, False, False, False]
        assert [cached.present(index, index) for index in (1, 2, 4, 9)] == [True, False, False, False]
        assert cache.health.statistics.chunks_damaged == 3
        assert cached.write(2, CHUNKS[2])
        assert cached.verify(2) is True
        assert cached.checkpoint()
        cached.release()
    for boot_id in (BOOT, LATER_BOOT):
        with CacheDir.open(tmp_path / "cache", boot_id=boot_id) as cache:
            cached = device(cache)
            assert cached.presence() == bytes([0, 1, 1, 0, 0, 0, 0, 0, 0, 0])
            assert [cached.verify(index) for index in (1, 2, 9)] == [True, True, None]
            cached.release()


def test_what_was_found_damaged_is_not_in_the_next_checkpoint_even_if_nothing_else_changed(tmp_path):
    with CacheDir.open(tmp_path / "cache", boot_id=BOOT) as cache:
        cached = device(cache)
        for index in (1, 2):
            assert cached.write(index, CHUNKS[index])
        assert cached.checkpoint()
        spoil(cached, 1)
        assert cached.verify(1) is False
        assert cached.checkpoint()
        assert cached.write(1, CHUNKS[1])
        assert cached.checkpoint()
        assert cached.counters.checkpoints == 3
        assert cached.checkpoint()
        assert cached.counters.checkpoints == 3
        spoil(cached, 2)
        assert cached.verify(2) is False
        assert cached.checkpoint()
        cached.release()
    with CacheDir.open(tmp_path / "cache", boot_id=LATER_BOOT) as cache:
        cached = device(cache)
        assert [cached.verify(index) for index in (1, 2)] == [True, None]
        cached.release()


def test_a_cut_file_and_a_disk_that_does_not_read_are_damage_too(tmp_path):
    def fails(fd: int, size: int, offset: int) -> bytes:
        raise full()

    with CacheDir.open(tmp_path / "cache") as cache:
        cached = device(cache)
        for index in (1, 8):
            assert cached.write(index, CHUNKS[index])
        os.truncate(cached.data_path, 8 * CHUNK + 5)
        assert cached.verify(8) is False
        assert cached.verify(1, fails) is False
        assert cached.present_count == 0
        cached.release()
