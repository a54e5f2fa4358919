"""Lazy images that are mounted before a container wants them, and rest when none uses them any more."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import HostError
from snapshotter import ahead
from snapshotter.ahead import Ahead
from snapshotter.failures import SnapshotExistsError
from tests.snapkit import blob_labels, bootstrap_labels, commit_layer, lowers_of, opened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from snapshotter.core import Snapshots
    from snapshotter.lazyhook import LazyLayer
    from tests.snapkit import PlainImages

WAIT_S = 20.0


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[Snapshots, PlainImages]]:
    with opened(tmp_path / "a") as (snapshots, hook):
        hook.eager = True
        yield snapshots, hook


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def pulled(both: tuple[Snapshots, PlainImages]) -> str:
    """Unpacked as containerd does; returns the name of its top."""
    snapshots, hook = both
    (hook.images / "image").mkdir()
    with pytest.raises(SnapshotExistsError):
        snapshots.prepare("ns/1", "", blob_labels("sha256:1"))
    commit_layer(snapshots, "top", "sha256:1", {"image.json": "{}"}, bootstrap_labels("sha256:2", "image"))
    return "top"


class Gate:
    """Holds the mounts of a hook until it is opened."""

    def __init__(self, hook: PlainImages) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self._mount = hook.ensure_mounted
        hook.ensure_mounted = self  # type: ignore[method-assign]

    def __call__(self, bootstrap: LazyLayer) -> Path:
        self.reached.set()
        assert self.open.wait(WAIT_S)
        return self._mount(bootstrap)


def test_a_commit_of_a_bootstrap_has_the_image_mounted(both: tuple[Snapshots, PlainImages]) -> None:
    snapshots, hook = both
    commit_layer(snapshots, "ordinary")
    top = pulled(both)
    wait(lambda: hook.mounted)
    assert len(hook.mounted) == 1, "and nothing else is"
    assert lowers_of(snapshots.prepare("container", top, {})) == [str(hook.images / "image")]


def test_the_commit_does_not_wait_for_it_nor_the_removal(both: tuple[Snapshots, PlainImages]) -> None:
    snapshots, hook = both
    gate = Gate(hook)
    top = pulled(both)
    assert gate.reached.wait(WAIT_S)
    snapshots.remove(top)   # its goodbye comes before the mount
    before = len(hook.forgotten)
    gate.open.set()
    wait(lambda: len(hook.forgotten) > before)
    assert hook.mounted == {}, "what is mounted too late is let go"


def test_a_daemon_that_is_down_harms_neither_pull_nor_the_next_image(both: tuple[Snapshots, PlainImages]) -> None:
    snapshots, hook = both
    hook.down = True
    top = pulled(both)
    hook.down = False
    commit_layer(snapshots, "other", "", {}, bootstrap_labels("sha256:4", "image"))
    wait(lambda: hook.mounted)
    assert lowers_of(snapshots.prepare("container", top, {})) == [str(hook.images / "image")]


def test_an_image_rests_when_its_last_container_is_gone(both: tuple[Snapshots, PlainImages]) -> None:
    snapshots, hook = both
    top = pulled(both)
    (number,) = (record.id for record in snapshots._records.all() if record.info.name == top)
    commit_layer(snapshots, "above", top)
    snapshots.prepare("first", "above", {})
    snapshots.view("second", top, {})
    commit_layer(snapshots, "ordinary")
    snapshots.prepare("elsewhere", "ordinary", {})
    for name in ("elsewhere", "first"):
        snapshots.remove(name)
    commit_layer(snapshots, "other", "", {}, bootstrap_labels("sha256:9", "image"))
    wait(lambda: len(hook.mounted) == 2)     # all before it in the queue is done
    assert hook.resting == [], "the second is still there"
    snapshots.remove("second")
    wait(lambda: hook.resting == [number])
    snapshots.prepare("third", "above", {})
    assert snapshots._records.in_use([number])


def test_the_end_does_not_wait_for_what_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "CLOSE_S", 0.05)
    with opened(tmp_path / "a") as (snapshots, hook):
        hook.eager = True
        gate = Gate(hook)
        pulled((snapshots, hook))
        assert gate.reached.wait(WAIT_S)
        begin = time.monotonic()
    assert time.monotonic() - begin < WAIT_S / 2
    gate.open.set()
    wait(lambda: hook.mounted and not any(thread.name == "ahead" for thread in threading.enumerate()))


def test_work_is_done_in_order_and_what_has_no_room_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "WAITING_MAX", 3)
    worker = Ahead()
    begun, go, done = threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        go.wait(WAIT_S)
        raise HostError("expected")

    worker.soon("first", first)
    assert begun.wait(WAIT_S)
    for number in range(5):
        worker.soon(str(number), lambda number=number: done.append(number))
    go.set()
    wait(lambda: len(done) == 3)
    worker.close()
    worker.soon("late", lambda: done.append(9))
    worker.close()
    assert done == [0, 1, 2]
