"""
The cache against a model, through kills, power cuts and damage.

The power cut keeps of each file's unsynced writes an arbitrary part: chunks written since the last checkpoint may read
as zeros, directory entries may be the old ones. Never is a chunk present whose bytes are not right, and never is one
lost that a checkpoint had (unless something was damaged).
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lazyfs.cache.store import CacheDir
from lazyfs.image.digest import Digest

CHUNK = 64 * 1024
COUNT = 6
DIGEST = Digest.of(b"model")
SIZE = (COUNT - 1) * CHUNK + 8192
ZERO = 2    # this chunk is all zeros
DATA = [
    bytes(CHUNK) if index == ZERO else random.Random(index).randbytes(CHUNK if index < COUNT - 1 else 8192)
    for index in range(COUNT)
]
indexes = st.integers(0, COUNT - 1)


class CacheMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.top = Path(tempfile.mkdtemp(prefix="lazyfs-model-"))
        self.boot = 0
        self.written: set[int] = set()      # in this boot's page cache
        self.durable: set[int] = set()      # named by a checkpoint
        self.open()

    def open(self) -> None:
        self.cache = CacheDir.open(self.top / "cache", boot_id=self.boot.to_bytes(16, "big"))
        self.cached = self.cache.device(DIGEST, CHUNK, SIZE)

    def stop(self) -> None:
        """As SIGKILL does: files are closed, nothing else happens."""
        self.cached.release()
        self.cache.close()

    @property
    def folder(self) -> Path:
        return self.top / "cache" / "v1" / DIGEST.hex

    @rule(index=indexes)
    def write(self, index: int) -> None:
        if index == ZERO:
            self.cached.mark_zeros([index])
        else:
            assert self.cached.write(index, DATA[index])
        self.written.add(index)

    @rule()
    def checkpoint(self) -> None:
        assert self.cached.checkpoint()
        self.durable = set(self.written)

    @rule()
    def kill_and_restart(self) -> None:
        self.stop()
        self.open()
        assert self.present() == self.written

    @rule(lost=st.sets(indexes), keep_live=st.booleans())
    def power_cut(self, lost: set[int], keep_live: bool) -> None:
        self.stop()
        data_path = next(self.folder.glob("data.*"))
        with data_path.open("r+b") as file:
            for index in lost - self.durable:
                file.seek(index * CHUNK)
                file.write(bytes(len(DATA[index])))
        if not keep_live:
            (self.folder / "live").write_bytes(b"")
        self.boot += 1
        self.open()
        assert self.present() == self.durable
        self.written = set(self.durable)

    @precondition(lambda self: self.written)
    @rule(name=st.sampled_from(["live", "checkpoint"]), position=st.integers(0, 10_000), bit=st.integers(0, 7),
          reboot=st.booleans())  # fmt: skip
    def damage_a_record(self, name: str, position: int, bit: int, reboot: bool) -> None:
        self.stop()
        file = self.folder / name
        if name == "live":
            position %= 84    # its body is trusted within a boot, as the data file is
        if file.exists():
            data = bytearray(file.read_bytes())
            data[position % len(data)] ^= 1 << bit
            file.write_bytes(data)
        self.boot += reboot
        self.open()
        found = self.present()
        if name == "live" or reboot:
            assert found in (set(), self.durable)
        else:
            assert found == self.written
        self.durable &= found
        self.written = found
        if name == "checkpoint" and not reboot:
            self.durable = set()

    @rule(size=st.integers(0, SIZE + CHUNK))
    def data_file_changes_its_size(self, size: int) -> None:
        self.stop()
        os.truncate(next(self.folder.glob("data.*")), size)
        self.open()
        if size != SIZE:
            assert self.present() == set()
            self.written, self.durable = set(), set()

    @rule(old=st.booleans())
    def another_data_file(self, old: bool) -> None:
        """Directory entries come back in another order: the records are those of a data file that is gone."""
        self.stop()
        path = next(self.folder.glob("data.*"))
        path.rename(path.with_name("data.0123456789abcdef"))
        if old:
            path.with_name("data.fedcba9876543210").write_bytes(bytes(SIZE))
        self.open()
        assert self.present() == set()
        self.written, self.durable = set(), set()

    def present(self) -> set[int]:
        return {index for index in range(COUNT) if self.cached.present(index, index)}

    @invariant()
    def what_is_present_is_right(self) -> None:
        if not hasattr(self, "cached"):
            return
        for index in self.present():
            assert self.cached.read_if_present(index * CHUNK, len(DATA[index])) == DATA[index]
        assert self.cached.complete == (len(self.present()) == COUNT)

    @rule(offset=st.integers(0, SIZE - 1), size=st.integers(1, 3 * CHUNK))
    def read_anything(self, offset: int, size: int) -> None:
        size = min(size, SIZE - offset)
        found = self.cached.read_if_present(offset, size)
        wanted = set(range(offset // CHUNK, (offset + size - 1) // CHUNK + 1))
        assert found == (b"".join(DATA)[offset : offset + size] if wanted <= self.written else None)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.stop()
            shutil.rmtree(self.top)


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestCacheModel = CacheMachine.TestCase
