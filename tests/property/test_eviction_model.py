"""
A cache directory with several devices and images against a model, through use, eviction, kills and restarts.

The model knows what was written and who uses what. After any order of steps: a device has all that was written to it
since it was evicted last, or, after eviction, nothing; what is in use is never evicted; used space is counted right.
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

from lazyfs.cache import evict, inventory
from lazyfs.cache.inventory import ImageRecord
from lazyfs.cache.plan import choose
from lazyfs.cache.store import CachedDevice, CacheDir
from lazyfs.image.digest import Digest
from tests.diskkit import CuttingOs, PowerCutError

CHUNK, COUNT = 64 * 1024, 3
DIGESTS = [Digest.of(f"device {number}".encode()) for number in range(4)]
IMAGES = {Digest.of(b"first"): DIGESTS[:2], Digest.of(b"second"): DIGESTS[1:]}
devices = st.sampled_from(DIGESTS)


def chunk(digest: Digest, index: int) -> bytes:
    return random.Random(f"{digest}{index}").randbytes(CHUNK)


class EvictionMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.top = Path(tempfile.mkdtemp(prefix="lazyfs-evict-"))
        self.written: dict[Digest, set[int]] = {}
        self.open: dict[Digest, CachedDevice] = {}
        self.mounted: set[Digest] = set()
        self.known: set[Digest] = set()
        self.clock = 1000
        self.begin()

    def begin(self) -> None:
        self.cache = CacheDir.open(self.top / "cache", boot_id=bytes(16))

    @property
    def path(self) -> Path:
        return self.top / "cache"

    @rule(digest=devices)
    def use(self, digest: Digest) -> None:
        if digest not in self.open:
            self.open[digest] = self.cache.device(digest, CHUNK, COUNT * CHUNK)
            self.written.setdefault(digest, set())

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.open)))
        self.open.pop(digest).release()
        self.clock += 1
        os.utime(self.path / "v1" / digest.hex, (self.clock, self.clock))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), index=st.integers(0, COUNT - 1), checkpoint=st.booleans())
    def write(self, data: st.DataObject, index: int, checkpoint: bool) -> None:
        digest = data.draw(st.sampled_from(sorted(self.open)))
        assert self.open[digest].write(index, chunk(digest, index))
        self.written[digest].add(index)
        if checkpoint:
            assert self.open[digest].checkpoint()

    @rule(image=st.sampled_from(sorted(IMAGES)), mounted=st.booleans())
    def keep_image(self, image: Digest, mounted: bool) -> None:
        for name in (f"bootstraps/{image.hex}.zst", f"images/{image.hex}.erofs"):
            (self.path / name).parent.mkdir(exist_ok=True)
            (self.path / name).write_bytes(bytes(6000))
        ImageRecord(str(image), tuple(one.hex for one in IMAGES[image])).write(self.path, image)
        self.known.add(image)
        self.mounted = self.mounted | {image} if mounted else self.mounted - {image}

    @rule(wanted=st.integers(0, 20 * CHUNK), cut=st.one_of(st.none(), st.integers(0, 25)))
    def tidy(self, wanted: int, cut: int | None) -> None:
        found = inventory.take(self.path)
        plan = choose(*found.candidates(self.cache.in_use(), {one.hex for one in self.mounted}), wanted)
        if cut is not None:
            evict.os = CuttingOs(cut)  # type: ignore[assignment, attr-defined]
        try:
            evict.take_away(self.cache, plan)
            evict.take_away_images(self.path, plan.images)
            evict.clean(self.path)
        except PowerCutError:
            self.restart()
        finally:
            evict.os = os  # type: ignore[attr-defined]
        there = inventory.take(self.path)
        for digest in list(self.written):
            if digest.hex not in there.devices:
                assert digest.hex in plan.devices
                del self.written[digest]
        assert cut is not None or not {one.hex for one in self.written} & set(plan.devices)
        for image in list(self.known):
            if image.hex not in there.images or not there.images[image.hex].record.image:
                assert image.hex in plan.images
                self.known.discard(image)

    @rule()
    def restart(self) -> None:
        """As after SIGKILL: what was open is not any more."""
        for cached in self.open.values():
            cached.release()
        self.open.clear()
        self.cache.close()
        self.begin()

    @invariant()
    def nothing_in_use_is_gone_and_all_that_is_there_is_right(self) -> None:
        if not hasattr(self, "cache"):
            return
        found = inventory.take(self.path)
        assert set(found.devices) == {digest.hex for digest in self.written}
        assert {digest.hex for digest in self.open} <= set(found.devices)
        for digest, cached in self.open.items():
            assert set(range(COUNT)) - set(cached.missing(0, COUNT - 1)) == self.written[digest]
            for index in self.written[digest]:
                assert cached.read_if_present(index * CHUNK, CHUNK) == chunk(digest, index)
        for digest, chunks in self.written.items():
            share = inventory.present_share(self.path, digest.hex, bytes(16))
            assert share == len(chunks) / COUNT
        data_bytes = sum(len(chunks) for chunks in self.written.values()) * CHUNK
        assert data_bytes <= found.use.size_bytes

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.restart()
            self.mounted.clear()
            everything = choose(*inventory.take(self.path).candidates((), ()), wanted=1 << 60)
            evict.take_away(self.cache, everything)
            evict.take_away_images(self.path, everything.images)
            evict.clean(self.path)
            left = [one for one in self.path.rglob("*") if one.is_file() and one.name != "lock"]
            self.cache.close()
            shutil.rmtree(self.top)
            assert not left


EvictionMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestEvictionModel = EvictionMachine.TestCase
