"""The ten operations in random order against a model that is a dict, with restarts in between."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from snapshotter.failures import (
    SnapshotExistsError,
    SnapshotInvalidError,
    SnapshotMissingError,
    SnapshotStateError,
)
from snapshotter.lazyhook import LayerKind
from snapshotter.model import LABEL_REF, Kind
from tests.snapkit import blob_labels, bootstrap_labels, lowers_of, opened, upper_of

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="snapshots belong to root")
NAMES = st.sampled_from(["a", "b", "c", "d", "e", "f"])
PARENTS = st.one_of(st.just(""), NAMES, st.sampled_from(["ref1", "ref2"]))
LABELS = st.dictionaries(st.sampled_from(["x", "y", "dotted.key"]), st.sampled_from(["", "1", "2"]), max_size=2)
REFS = st.sampled_from(["ref1", "ref2"])


@dataclass
class Entry:
    parent: str
    kind: Kind
    labels: dict[str, str]
    layer: LayerKind = LayerKind.ORDINARY
    files: int = 0
    upper: Path | None = None
    extracting: bool = field(default=False)


class SnapshotMachine(RuleBasedStateMachine):
    """`model`: what should be there."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.stack = contextlib.ExitStack()
        self.snapshots, self.hook = self.stack.enter_context(opened(self.directory))
        (self.hook.images / "image").mkdir()
        self.model: dict[str, Entry] = {}

    def teardown(self) -> None:
        self.stack.close()
        shutil.rmtree(self.directory)

    @contextlib.contextmanager
    def expecting(self, error: type[Exception] | None) -> Iterator[None]:
        if error is None:
            yield
        else:
            with pytest.raises(error):
                yield

    def chain(self, name: str) -> list[str]:
        found = []
        while name:
            found.append(name)
            name = self.model[name].parent
        return found

    def beginning(self, key: str, parent: str, labels: dict[str, str]) -> type[Exception] | None:
        """How Prepare and View must refuse, if they must."""
        if parent and parent not in self.model:
            return SnapshotMissingError
        if parent and self.model[parent].kind is not Kind.COMMITTED:
            return SnapshotInvalidError
        for name in self.chain(parent):
            if self.model[name].layer is LayerKind.LAZY_BOOTSTRAP:
                break
            if self.model[name].layer is LayerKind.LAZY_BLOB and LABEL_REF not in labels:
                return SnapshotStateError
        return SnapshotExistsError if key in self.model else None

    def lowers(self, parent: str) -> int:
        """How many directories are below, lazy ones as one."""
        count = 0
        for name in self.chain(parent):
            if self.model[name].layer is LayerKind.LAZY_BOOTSTRAP:
                return count + 1
            count += self.model[name].layer is LayerKind.ORDINARY
        return count

    @rule(key=NAMES, parent=PARENTS, labels=LABELS, image=st.booleans())
    def prepare(self, key: str, parent: str, labels: dict[str, str], image: bool) -> None:
        if image:
            labels = {**labels, **bootstrap_labels("sha256:x", "image")}
        with self.expecting(self.beginning(key, parent, labels)):
            mounts = self.snapshots.prepare(key, parent, labels)
            below = self.lowers(parent)
            assert len(lowers_of(mounts)) == below if below else mounts[0].type == "bind"
            self.model[key] = Entry(parent, Kind.ACTIVE, labels, upper=upper_of(mounts))
            if image:
                self.model[key].layer = LayerKind.LAZY_BOOTSTRAP

    @rule(ref=REFS, parent=PARENTS, key=NAMES)
    def prepare_blob(self, ref: str, parent: str, key: str) -> None:
        labels = blob_labels(ref)
        if parent and (parent not in self.model or self.model[parent].kind is not Kind.COMMITTED):
            with self.expecting(self.beginning(key, parent, labels)):
                self.snapshots.prepare(key, parent, labels)
            return
        there = {info.name for info in self.snapshots.find()}
        with pytest.raises((SnapshotExistsError, SnapshotStateError)) as raised:
            self.snapshots.prepare(key, parent, labels)
        found = self.snapshots.find([f'labels."{LABEL_REF}"=="{ref}",parent=="{parent}",kind==committed'])
        found = [info for info in found if info.name not in there or self.model[info.name].layer is LayerKind.LAZY_BLOB]
        if raised.type is SnapshotStateError:   # the same chain id on another parent: no chain has that
            assert ref in there
            return
        (info,) = found
        self.model.setdefault(info.name, Entry(parent, Kind.COMMITTED, labels, LayerKind.LAZY_BLOB))

    @rule(key=NAMES, parent=PARENTS, labels=LABELS)
    def view(self, key: str, parent: str, labels: dict[str, str]) -> None:
        with self.expecting(self.beginning(key, parent, labels)):
            self.snapshots.view(key, parent, labels)
            self.model[key] = Entry(parent, Kind.VIEW, labels)

    @rule(key=NAMES)
    def write(self, key: str) -> None:
        entry = self.model.get(key)
        if entry and entry.kind is Kind.ACTIVE and entry.upper:
            (entry.upper / f"file{entry.files}").write_text("x")
            entry.files += 1

    @rule(name=NAMES, key=NAMES, labels=LABELS, parent=st.one_of(st.just(""), PARENTS))
    def commit(self, name: str, key: str, labels: dict[str, str], parent: str) -> None:
        old = self.model.get(key)
        error: type[Exception] | None = None
        if old is None:
            error = SnapshotMissingError
        elif old.kind is not Kind.ACTIVE:
            error = SnapshotStateError
        elif name in self.model:
            error = SnapshotExistsError
        elif parent and old.parent and parent != old.parent:
            error = SnapshotInvalidError
        elif (parent or old.parent) and (parent or old.parent) not in self.model:
            error = SnapshotMissingError
        elif parent and self.model[parent].kind is not Kind.COMMITTED:
            error = SnapshotInvalidError
        with self.expecting(error):
            self.snapshots.commit(name, key, labels, parent)
            assert old is not None
            del self.model[key]
            self.model[name] = Entry(old.parent or parent, Kind.COMMITTED, labels, old.layer, old.files)

    @rule(name=st.one_of(NAMES, REFS))
    def remove(self, name: str) -> None:
        error: type[Exception] | None = None
        if name not in self.model:
            error = SnapshotMissingError
        elif any(entry.parent == name for entry in self.model.values()):
            error = SnapshotStateError
        with self.expecting(error):
            self.snapshots.remove(name)
            del self.model[name]

    @rule(name=NAMES, labels=LABELS, paths=st.lists(
        st.sampled_from(["labels", "labels.x", "labels.dotted.key", "parent"]), max_size=2))
    def update(self, name: str, labels: dict[str, str], paths: list[str]) -> None:
        error = SnapshotMissingError if name not in self.model else SnapshotInvalidError if "parent" in paths else None
        with self.expecting(error):
            self.snapshots.update(name, labels, paths)
            new = dict(self.model[name].labels) if paths else dict(labels)
            for path in paths:
                key = path.removeprefix("labels.")
                new = dict(labels) if path == "labels" else {**new, key: labels.get(key, "")}
            self.model[name].labels = new

    @rule(name=NAMES)
    def mounts(self, name: str) -> None:
        entry = self.model.get(name)
        if entry is None or entry.kind is Kind.COMMITTED:
            with pytest.raises(SnapshotMissingError if entry is None else SnapshotStateError):
                self.snapshots.mounts(name)
            return
        error = self.beginning("free name", entry.parent, entry.labels)
        with self.expecting(error):
            assert self.snapshots.mounts(name) == self.snapshots.mounts(name)

    @rule()
    def cleanup(self) -> None:
        (self.directory / "root" / "snapshots" / "1000000" / "fs").mkdir(parents=True, exist_ok=True)
        self.snapshots.cleanup()

    @rule()
    def restart(self) -> None:
        self.stack.close()
        hook = self.hook
        self.snapshots, self.hook = self.stack.enter_context(opened(self.directory))
        self.hook.forgotten = hook.forgotten

    @invariant()
    def agrees(self) -> None:
        found = {info.name: info for info in self.snapshots.find()}
        assert {name: (info.parent, info.kind, dict(info.labels)) for name, info in found.items()} == {
            name: (entry.parent, entry.kind, {key: text for key, text in entry.labels.items() if text})
            for name, entry in self.model.items()}
        for name, entry in self.model.items():
            assert self.snapshots.stat(name) == found[name]
            if entry.kind is not Kind.VIEW and entry.layer is not LayerKind.LAZY_BOOTSTRAP:
                assert self.snapshots.usage(name).inodes == entry.files + 1


SnapshotMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSnapshots = SnapshotMachine.TestCase
