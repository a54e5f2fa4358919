"""Sixteen threads do anything to a few names: nobody sees another error than a refusal, and all agrees afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import SnapshotError
from snapshotter.model import Kind
from tests.snapkit import blob_labels, bootstrap_labels, opened, upper_of

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.core import Snapshots

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="snapshots belong to root")
NAMES = ("a", "b", "c", "d", "e", "f", "ref1", "ref2")


def work(snapshots: Snapshots, seed: int, problems: list[BaseException]) -> None:
    chance = random.Random(seed)
    for _ in range(100):
        name, other, parent = chance.choice(NAMES), chance.choice(NAMES), chance.choice(("", *NAMES))
        calls = (
            lambda name=name, parent=parent: snapshots.prepare(name, parent, {}),
            lambda name=name, parent=parent: snapshots.prepare(name, parent, blob_labels("ref1")),
            lambda name=name, parent=parent: snapshots.prepare(name, parent, bootstrap_labels("x", "image")),
            lambda name=name, parent=parent: snapshots.view(name, parent, {}),
            lambda name=name, other=other: snapshots.commit(other, name, {}),
            lambda name=name: snapshots.remove(name),
            lambda name=name: snapshots.usage(name),
            snapshots.cleanup,
        )
        try:
            with contextlib.suppress(SnapshotError):
                chance.choice(calls)()
        except BaseException as error:
            problems.append(error)
            raise


def test_anything_at_once(tmp_path: Path) -> None:
    with opened(tmp_path) as (snapshots, hook):
        (hook.images / "image").mkdir()
        problems: list[BaseException] = []
        threads = [threading.Thread(target=work, args=(snapshots, seed, problems)) for seed in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not problems
        snapshots.cleanup()
        there = {int(path.name) for path in (tmp_path / "root" / "snapshots").iterdir()}
        assert there == snapshots._records.ids()
        for info in snapshots.find(["kind==active"]):
            assert info.kind is Kind.ACTIVE
            assert upper_of(snapshots.mounts(info.name)).is_dir()
        left = sorted(snapshots.find(), key=lambda info: len(snapshots._records.chain(info.name)), reverse=True)
        for info in left:   # leaves first, as containerd does
            snapshots.remove(info.name)
        assert not hook.mounted, "every image was let go"
        snapshots.cleanup()
        assert list((tmp_path / "root" / "snapshots").iterdir()) == []
