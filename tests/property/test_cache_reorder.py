"""
The cache on a disk that loses and reorders whatever was not synced (tests.crashkit): any work, a power cut after any
call, any of the states that it may leave. No chunk is present whose bytes are not right, none is lost that a checkpoint
had; and each has its checksum.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.cache import evict
from lazyfs.cache.store import CacheDir
from lazyfs.image.digest import Digest
from tests.crashkit import Recorder

CHUNK, COUNT = 64 * 1024, 4
BOOT, LATER_BOOT = b"a" * 16, b"b" * 16
DIGEST = Digest.of(b"reorder")
DATA = [random.Random(index).randbytes(CHUNK) for index in range(COUNT)]
STEPS = st.one_of(
    st.tuples(st.just("write"), st.integers(0, COUNT - 1)),
    st.tuples(st.sampled_from(["checkpoint"] * 5 + ["restart", "evict", "drop"]), st.just(0)),
    st.tuples(st.just("damage"), st.integers(0, COUNT - 1)),
)


class Work:
    """Does steps; `promised`: (calls made, what must be there from then on)."""

    def __init__(self, path: Path, recorder: Recorder) -> None:
        self.path, self.recorder = path, recorder
        self.promised: list[tuple[int, set[int]]] = [(0, set())]
        self.written: set[int] = set()
        self.open()

    def open(self) -> None:
        self.cache = CacheDir.open(self.path, boot_id=BOOT)
        self.cached = self.cache.device(DIGEST, CHUNK, COUNT * CHUNK)

    def close(self) -> None:
        self.cached.release()
        self.cache.close()

    def promise(self, chunks: set[int]) -> None:
        self.promised.append((len(self.recorder.calls), set(chunks)))

    def step(self, name: str, index: int) -> None:
        kept = self.promised[-1][1]
        if name == "write":
            assert self.cached.write(index, DATA[index])
            self.written.add(index)
        elif name == "checkpoint":
            assert self.cached.checkpoint()
            self.promise(self.written)
        elif name == "damage":
            self.promise(kept - {index})
            self.cached.verify(index, lambda *_: b"")
            self.written.discard(index)
        elif name == "restart":
            self.close()
            self.open()
            assert self.cached.present_count == len(self.written)
        elif name == "drop":
            self.promise(set())
            self.cached._drop(OSError(5, "as if"))
            self.written = set()
        else:
            self.promise(set())
            self.cached.release()
            assert self.cache.discard(DIGEST.hex)
            evict.clean(self.path)
            self.written = set()
            self.cached = self.cache.device(DIGEST, CHUNK, COUNT * CHUNK)
        if name == "drop":
            self.cached._health.syncing.worked()    # no pause: it is a model's disk


def look(path: Path) -> tuple[set[int], bool]:
    """Which chunks are present after the power cut, and whether all of these are right, and summed so."""
    with CacheDir.open(path, boot_id=LATER_BOOT) as cache:
        cached = cache.device(DIGEST, CHUNK, COUNT * CHUNK)
        found = {index for index in range(COUNT) if cached.present(index, index)}
        right = all(cached.read(index * CHUNK, CHUNK) == DATA[index] and cached.verify(index) for index in found)
        cached.release()
    return found, right


def run(steps: list[tuple[str, int]], cut: int, seed: int) -> tuple[set[int], set[int], bool]:
    """Promised, present, right. `cut`: so many calls before the last one, modulo their number."""
    top = Path(tempfile.mkdtemp(prefix="lazyfs-reorder-"))
    try:
        CacheDir.open(top / "cache", boot_id=BOOT).close()
        with Recorder(top / "cache") as recorder:
            work = Work(top / "cache", recorder)
            try:
                for name, index in steps:
                    work.step(name, index)
            finally:
                work.close()
        calls = len(recorder.calls) - cut % (len(recorder.calls) + 1)
        recorder.crash(calls, random.Random(seed), top / "after")
        made = [at for at, _ in work.promised if at <= calls]
        promised = next(chunks for at, chunks in reversed(work.promised) if at == made[-1])
        found, right = look(top / "after")
        return promised, found, right
    finally:
        shutil.rmtree(top)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, min_size=2, max_size=10), st.integers(0, 30), st.integers(0, 1 << 30))
def test_whatever_a_power_cut_leaves_of_what_was_not_synced_no_byte_is_wrong(steps, cut, seed):
    promised, found, right = run(steps, cut, seed)
    assert right, "wrong bytes, or a wrong sum"
    assert promised <= found, "a checkpoint had it"


def test_the_model_finds_a_checkpoint_that_is_written_before_its_data():
    """Else the test above would prove nothing."""
    steps = [("write", 0), ("write", 1), ("checkpoint", 0), ("write", 2), ("checkpoint", 0)]
    outcomes = [run_without_data_sync(steps, seed) for seed in range(30)]
    assert not all(outcomes)


def run_without_data_sync(steps: list[tuple[str, int]], seed: int) -> bool:
    """As `run`, of a cache that forgets to sync its data: whether all is right."""
    original = Recorder._sync

    def forgets(recorder: Recorder, fd: int) -> None:
        if not Path(f"/proc/self/fd/{fd}").readlink().name.startswith("data."):
            original(recorder, fd)

    Recorder._sync = forgets  # type: ignore[method-assign]
    try:
        return run(steps, 0, seed)[2]
    finally:
        Recorder._sync = original  # type: ignore[method-assign]
