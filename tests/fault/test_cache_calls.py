"""
The N-th system call of the cache fails, or is its last: for each N, over opening, writing, checkpoints, scrubbing and
dropping damage. Counted over all of it: wrong bytes, which are none.

Killed: what was written is there afterwards, and right. Failing, once or for good, with any error: nothing but a
CacheError leaves the cache, whatever is said to be present is right, and when the fault is gone it works as before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
from typing import TYPE_CHECKING, Self

import pytest

from lazyfs.cache import device as device_module
from lazyfs.cache import files, health, scrub
from lazyfs.cache.store import CachedDevice, CacheDir
from lazyfs.errors import CacheError
from lazyfs.image.digest import Digest
from tests.diskkit import CuttingOs, FailingOs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHUNK, COUNT = 64 * 1024, 12
BOOT, LATER_BOOT = b"a" * 16, b"b" * 16
DIGEST = Digest.of(b"calls")
CALLS_MAX = 400
DATA = [random.Random(index).randbytes(CHUNK) for index in range(COUNT)]
MODULES = (files, device_module, scrub)


def open_device(cache: CacheDir) -> CachedDevice:
    return cache.device(DIGEST, CHUNK, COUNT * CHUNK)


def present(cached: CachedDevice) -> set[int]:
    """Which chunks are there; they must be right."""
    found = set()
    for index in range(COUNT):
        data = cached.read_if_present(index * CHUNK, CHUNK)
        assert data in (None, DATA[index]), "wrong bytes"
        if data is not None:
            found.add(index)
    return found


def work(path: Path, written: set[int]) -> None:
    """Open, write, checkpoint, look for damage, drop some, write again. What is claimed is noted after the call."""
    with CacheDir.open(path, boot_id=BOOT) as cache, contextlib.ExitStack() as stack:
        cached = open_device(cache)
        stack.callback(cached.release)
        for index in range(6):
            if cached.write(index, DATA[index]):
                written.add(index)
        cached.checkpoint()
        scrub.scrub_piece(cache, DIGEST.hex, 0, 0)
        cached.verify(2, lambda *_: b"")    # as if the disk gave something else
        written -= {2}
        for index in range(2, 9):
            if cached.write(index, DATA[index]):
                written.add(index)
        cached.checkpoint()


@contextlib.contextmanager
def patched(monkeypatch: pytest.MonkeyPatch, fake: object) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for module in MODULES:
            patch.setattr(module, "os", fake)
        yield


# --- killed -----------------------------------------------------------------------------------------------------------


def killed_at(calls: int, path: Path) -> tuple[bool, set[int]]:
    """Do the work in a process that is killed at its Nth call; whether it was, and what it had said was written."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        for module in MODULES:
            module.os = CuttingOs(calls, kill=True)  # type: ignore[attr-defined]

        class Telling(set[int]):
            def add(self, index: int) -> None:
                os.write(writing, bytes([index]))
                super().add(index)

            def __isub__(self, gone: object) -> Self:
                os.write(writing, b"\xff")
                return self

        with contextlib.suppress(BaseException):
            work(path, Telling())
            os._exit(0)
        os._exit(1)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as told:
        said = told.read()
    assert status in {0, 9}, status
    before, dropped, after = said.partition(b"\xff")
    return status == 9, set(before) - ({2} if dropped else set()) | set(after)


def test_killed_at_any_call_what_was_written_is_there_and_right(tmp_path):
    for calls in range(CALLS_MAX):
        path = tmp_path / str(calls)
        killed, said = killed_at(calls, path)
        for boot_id in (BOOT, LATER_BOOT):
            with CacheDir.open(path, boot_id=boot_id) as cache:
                cached = open_device(cache)
                found = present(cached)
                if boot_id is BOOT:
                    # dropped, or written, and killed before it could say so
                    assert said - {2} <= found, (calls, said, found)
                    assert len(found - said) <= 1
                assert all(cached.verify(index) for index in found)
                cached.release()
        if not killed:
            assert calls > 30
            assert said == set(range(9))
            return
    raise AssertionError("the work made more calls than expected")


# --- failing ----------------------------------------------------------------------------------------------------------


FAULTS = [(errno.EIO, False), (errno.EIO, True), (errno.ENOSPC, True), (errno.EROFS, True), (errno.EMFILE, False)]


@pytest.mark.parametrize(("number", "lasting"), FAULTS,
                         ids=[f"{errno.errorcode[number]}-{'for-good' if lasting else 'once'}"
                              for number, lasting in FAULTS])
def test_whichever_call_fails_nothing_is_wrong_and_it_recovers(tmp_path, monkeypatch, number, lasting):
    monkeypatch.setattr(health, "WRITE_PAUSE_FIRST_S", 0.0)
    monkeypatch.setattr(health, "WRITE_PAUSE_MAX_S", 0.0)
    monkeypatch.setattr(health, "SYNC_PAUSE_FIRST_S", 0.0)
    monkeypatch.setattr(health, "SYNC_PAUSE_MAX_S", 0.0)
    for calls in range(CALLS_MAX):
        path = tmp_path / str(calls)
        CacheDir.open(path, boot_id=BOOT).close()
        fake = FailingOs(calls, number, lasting=lasting)
        with patched(monkeypatch, fake), contextlib.suppress(CacheError):
            work(path, set())
        for boot_id in (LATER_BOOT, BOOT):
            with CacheDir.open(path, boot_id=boot_id) as cache:
                cached = open_device(cache)
                present(cached)
                assert all(cached.write(index, DATA[index]) for index in range(COUNT))
                assert present(cached) == set(range(COUNT))
                assert cached.checkpoint()
                cached.release()
        shutil.rmtree(path)
        if not fake.failed:
            assert calls > 30
            return
    raise AssertionError("the work made more calls than expected")


def test_a_device_goes_on_after_a_fault_while_it_is_open(tmp_path, monkeypatch):
    """Not only after a restart: the same object stores again."""
    monkeypatch.setattr(health, "WRITE_PAUSE_FIRST_S", 0.0)
    monkeypatch.setattr(health, "SYNC_PAUSE_FIRST_S", 0.0)
    for calls in range(40):
        with CacheDir.open(tmp_path / str(calls), boot_id=BOOT) as cache:
            cached = open_device(cache)
            fake = FailingOs(calls, errno.EIO)
            with patched(monkeypatch, fake):
                for index in range(6):
                    cached.write(index, DATA[index])
                cached.checkpoint()
                present(cached)
            for _ in range(2):    # the first one may have to make a new data file
                for index in range(COUNT):
                    cached.write(index, DATA[index])
            assert present(cached) == set(range(COUNT))
            assert cached.make_durable()
            assert cache.health.describe()["trouble"] == []
            cached.release()
        with CacheDir.open(tmp_path / str(calls), boot_id=LATER_BOOT) as cache:
            cached = open_device(cache)
            assert present(cached) == set(range(COUNT))
            cached.release()
