"""The ten operations one by one: what containerd relies on, and lazy images over plain directories."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import BusyError, HostError, UsageError
from snapshotter import core
from snapshotter.core import Snapshots
from snapshotter.failures import (
    SnapshotExistsError,
    SnapshotInvalidError,
    SnapshotMissingError,
    SnapshotStateError,
    SnapshotUnavailableError,
)
from snapshotter.model import LABEL_BYTES_MAX, LABEL_GID_MAPPING, LABEL_REF, LABEL_UID_MAPPING, Kind, Usage
from tests.snapkit import (
    PlainImages,
    blob_labels,
    bootstrap_labels,
    commit_layer,
    lowers_of,
    opened,
    upper_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from snapshotter.lazyhook import LazyLayer

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="snapshots belong to root")


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[Snapshots, PlainImages]]:
    with opened(tmp_path) as pair:
        yield pair


@pytest.fixture
def snapshots(both: tuple[Snapshots, PlainImages]) -> Snapshots:
    return both[0]


def test_mount_shapes_are_those_of_overlayfs(snapshots: Snapshots) -> None:
    (first,) = snapshots.prepare("a", "", {})
    assert (first.type, first.options) == ("bind", ("rw", "rbind"))
    snapshots.commit("one", "a", {})
    (second,) = snapshots.prepare("b", "one", {})
    own = Path(first.source).parent.parent / "2"
    assert second.type == second.source == "overlay"
    assert second.options[:3] == (f"workdir={own}/work", f"upperdir={own}/fs", f"lowerdir={first.source}")
    snapshots.commit("two", "b", {})
    (view,) = snapshots.view("c", "one", {})
    assert (view.type, view.source, view.options) == ("bind", first.source, ("ro", "rbind"))
    deep = snapshots.view("d", "two", {})
    assert lowers_of(deep) == [f"{own}/fs", first.source]
    assert not any(option.startswith(("upperdir=", "workdir=")) for option in deep[0].options)
    assert snapshots.mounts("d") == deep
    (empty,) = snapshots.view("e", "", {})
    assert (empty.type, empty.options) == ("bind", ("ro", "rbind"))


def test_an_overlay_has_index_off_where_the_kernel_knows_it(snapshots: Snapshots) -> None:
    commit_layer(snapshots, "one")
    (mount,) = snapshots.prepare("b", "one", {})
    known = Path("/sys/module/overlay/parameters/index").exists()
    assert ("index=off" in mount.options) == known
    assert "userxattr" not in mount.options


def test_a_new_directory_has_the_owner_of_what_is_below(snapshots: Snapshots) -> None:
    mounts = snapshots.prepare("a", "", {})
    os.chown(upper_of(mounts), 12, 34)
    snapshots.commit("one", "a", {})
    status = upper_of(snapshots.prepare("b", "one", {})).stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (12, 34, 0o755)


def test_directories_have_their_modes_whatever_the_umask(snapshots: Snapshots) -> None:
    previous = os.umask(0o077)
    try:
        upper = upper_of(snapshots.prepare("a", "", {}))
    finally:
        os.umask(previous)
    modes = {path.name: path.stat().st_mode & 0o7777 for path in upper.parent.iterdir()}
    assert modes == {"fs": 0o755, "work": 0o711}


def test_names_that_are_taken(snapshots: Snapshots) -> None:
    commit_layer(snapshots, "one")
    snapshots.prepare("a", "one", {})
    for begin in (snapshots.prepare, snapshots.view):
        for taken in ("a", "one"):
            with pytest.raises(SnapshotExistsError):
                begin(taken, "one", {})
    with pytest.raises(SnapshotExistsError):
        snapshots.commit("one", "a", {})
    with pytest.raises(SnapshotExistsError):
        snapshots.commit("a", "a", {})
    with pytest.raises(SnapshotInvalidError):
        snapshots.prepare("", "", {})
    assert snapshots.stat("a").kind is Kind.ACTIVE


def test_parents_must_be_there_and_committed(snapshots: Snapshots) -> None:
    snapshots.prepare("a", "", {})
    with pytest.raises(SnapshotInvalidError):
        snapshots.prepare("b", "a", {})
    with pytest.raises(SnapshotMissingError):
        snapshots.view("b", "nothing", {})
    commit_layer(snapshots, "one")
    commit_layer(snapshots, "two", "one")
    snapshots.prepare("c", "one", {})
    with pytest.raises(SnapshotInvalidError, match="it cannot be put on"):
        snapshots.commit("three", "c", {}, "two")


def test_commit_gives_a_parent_to_one_without(snapshots: Snapshots) -> None:
    commit_layer(snapshots, "one")
    snapshots.prepare("a", "", {})
    snapshots.commit("two", "a", {}, "one")
    assert snapshots.stat("two").parent == "one"
    assert len(lowers_of(snapshots.prepare("b", "two", {}))) == 2
    with pytest.raises(SnapshotStateError):
        snapshots.remove("one")


def test_commit_replaces_labels_and_frees_the_key(snapshots: Snapshots) -> None:
    snapshots.prepare("a", "", {"old": "1", "empty": ""})
    assert snapshots.stat("a").labels == {"old": "1"}
    snapshots.commit("one", "a", {"new": "2"})
    found = snapshots.stat("one")
    assert (found.labels, found.kind) == ({"new": "2"}, Kind.COMMITTED)
    for call in (snapshots.stat, snapshots.mounts, snapshots.remove, snapshots.usage):
        with pytest.raises(SnapshotMissingError):
            call("a")
    with pytest.raises(SnapshotStateError):
        snapshots.commit("two", "one", {})
    with pytest.raises(SnapshotStateError):
        snapshots.mounts("one")


def test_views_are_not_committed(snapshots: Snapshots) -> None:
    commit_layer(snapshots, "one")
    snapshots.view("v", "one", {})
    with pytest.raises(SnapshotStateError):
        snapshots.commit("two", "v", {})


def test_remove_needs_no_children_and_takes_the_directory(snapshots: Snapshots) -> None:
    commit_layer(snapshots, "one", files={"a": "b"})
    upper = upper_of(snapshots.prepare("a", "one", {}))
    with pytest.raises(SnapshotStateError):
        snapshots.remove("one")
    snapshots.remove("a")
    snapshots.cleanup()   # or a thread, a moment later
    assert not upper.parent.exists()
    snapshots.remove("one")
    snapshots.cleanup()
    assert list(upper.parent.parent.iterdir()) == []


def test_update_changes_what_the_mask_names(snapshots: Snapshots) -> None:
    snapshots.prepare("a", "", {"x": "1", "y": "2"})
    before = snapshots.stat("a")
    changed = snapshots.update("a", {"x": "9", "y": "9"}, ["labels.x"])
    assert changed == snapshots.stat("a")
    assert changed.labels == {"x": "9", "y": "2"}
    assert (changed.created, changed.updated > before.updated) == (before.created, True)
    assert snapshots.update("a", {}, ["labels.x"]).labels == {"y": "2"}
    assert snapshots.update("a", {"dotted.key": "1"}, ["labels.dotted.key"]).labels == {"y": "2", "dotted.key": "1"}
    assert snapshots.update("a", {"z": "3"}, ["labels"]).labels == {"z": "3"}
    assert snapshots.update("a", {"w": "4"}).labels == {"w": "4"}
    for path in ("name", "parent", "kind", "labels.", "nothing"):
        with pytest.raises(SnapshotInvalidError):
            snapshots.update("a", {}, [path])
    with pytest.raises(SnapshotMissingError):
        snapshots.update("b", {})


def test_labels_have_at_most_4096_bytes(snapshots: Snapshots) -> None:
    fits, long = {"key": "v" * (LABEL_BYTES_MAX - 3)}, {"key": "é" * 2047}
    snapshots.prepare("a", "", fits)
    for call in (lambda: snapshots.prepare("b", "", long), lambda: snapshots.view("b", "", long),
                 lambda: snapshots.commit("b", "a", long), lambda: snapshots.update("a", long)):
        with pytest.raises(SnapshotInvalidError, match="4097 bytes"):
            call()
    assert snapshots.stat("a").labels == fits


def test_usage_counts_blocks_and_each_inode_once(snapshots: Snapshots) -> None:
    upper = upper_of(snapshots.prepare("a", "", {}))
    upper.joinpath("big").write_bytes(b"x" * 100_000)
    upper.joinpath("dir").mkdir()
    os.link(upper / "big", upper / "dir" / "same")
    with (upper / "hole").open("wb") as file:
        file.truncate(1 << 30)
    (upper / "link").symlink_to("/etc/passwd")
    paths = [upper, upper / "big", upper / "dir", upper / "hole", upper / "link"]
    expected = Usage(sum(path.lstat().st_blocks for path in paths) * 512, len(paths))
    assert snapshots.usage("a") == expected
    snapshots.commit("one", "a", {})
    upper.joinpath("later").write_text("not counted again")
    assert snapshots.usage("one") == expected
    snapshots.view("v", "one", {})
    assert snapshots.usage("v") == Usage(0, 0)


def test_mapped_ids_own_the_new_directory(snapshots: Snapshots) -> None:
    labels = {LABEL_UID_MAPPING: "0:1000:65536", LABEL_GID_MAPPING: "5:7:1,0:2000:65536"}
    mounts = snapshots.prepare("a", "", labels)
    status = upper_of(mounts).stat()
    assert (status.st_uid, status.st_gid) == (1000, 2000)
    assert mounts[0].options == ("uidmap=0:1000:65536", "gidmap=5:7:1,0:2000:65536", "rw", "rbind")
    for wrong in ("0:1000", "1:1000:5", "0:-1:5", "x:1:1", "0:4294967295:1"):
        with pytest.raises(SnapshotInvalidError):
            snapshots.prepare("b", "", {LABEL_UID_MAPPING: wrong})


def test_namespaces_are_part_of_the_key(snapshots: Snapshots) -> None:
    snapshots.prepare("default/1/a", "", {})
    snapshots.prepare("k8s.io/1/a", "", {})
    assert [info.name for info in snapshots.find()] == ["default/1/a", "k8s.io/1/a"]


# --- lazy images ---------------------------------------------------------------------------------------------------

def test_a_lazy_blob_is_there_at_once(snapshots: Snapshots) -> None:
    for _ in range(2):
        with pytest.raises(SnapshotExistsError, match="nothing to download"):
            snapshots.prepare("default/1/extract-1 sha256:a", "", blob_labels("sha256:a"))
    found = snapshots.find(['labels."containerd.io/snapshot.ref"=="sha256:a",parent==""'])
    assert [(info.name, info.kind) for info in found] == [("sha256:a", Kind.COMMITTED)]
    with pytest.raises(SnapshotExistsError):
        snapshots.prepare("k8s.io/7/extract-2 sha256:b", "sha256:a", blob_labels("sha256:b"))
    assert snapshots.stat("sha256:b").parent == "sha256:a"
    assert len(snapshots.find()) == 2, "the keys themselves are no snapshots"


def test_a_lazy_blob_on_an_ordinary_layer_is_one_for_each_parent(snapshots: Snapshots) -> None:
    for namespace in ("default", "k8s.io"):
        commit_layer(snapshots, f"{namespace}/1/sha256:base")
        with pytest.raises(SnapshotExistsError):
            snapshots.prepare(f"{namespace}/2/x", f"{namespace}/1/sha256:base", blob_labels("sha256:a"))
        (first,) = snapshots.find([f'labels."{LABEL_REF}"=="sha256:a",parent=="{namespace}/1/sha256:base"'])
        with pytest.raises(SnapshotExistsError):
            snapshots.prepare(f"{namespace}/3/x", first.name, blob_labels("sha256:b"))
        (second,) = snapshots.find([f'labels."{LABEL_REF}"=="sha256:b",parent=="{first.name}"'])
        assert second.kind is Kind.COMMITTED
    assert len({info.name for info in snapshots.find()}) == 6


def lazy_image(both: tuple[Snapshots, PlainImages], name: str = "image") -> str:
    """Unpack one as containerd does; returns the name of its top."""
    snapshots, hook = both
    (hook.images / name).mkdir()
    (hook.images / name / "hello").write_text("from the image")
    parent = ""
    for ref in ("sha256:1", "sha256:2"):
        with pytest.raises(SnapshotExistsError):
            snapshots.prepare(f"ns/{name}{ref}", parent, blob_labels(ref))
        parent = ref
    mounts = snapshots.prepare(f"ns/{name}", parent, bootstrap_labels("sha256:3", name))
    assert mounts[0].type == "bind", "only the small layer's own directory: nothing is below yet"
    upper_of(mounts).joinpath("image.json").write_text("{}")
    snapshots.commit(f"ns/9/{name}", f"ns/{name}", bootstrap_labels("sha256:3", name))
    assert not hook.mounted, "unpacking mounts nothing"
    return f"ns/9/{name}"


def test_a_container_has_the_image_below(both: tuple[Snapshots, PlainImages]) -> None:
    snapshots, hook = both
    top = lazy_image(both)
    mounts = snapshots.prepare("container", top, {})
    assert lowers_of(mounts) == [str(hook.images / "image")]
    (view,) = snapshots.view("view", top, {})
    assert (view.type, view.source) == ("bind", str(hook.images / "image"))
    hook.mounted.clear()   # the machine was restarted
    assert snapshots.mounts("container") == mounts
    assert hook.mounted


def test_ordinary_layers_stand_on_a_lazy_image(both: tuple[Snapshots, PlainImages]) -> None:
    snapshots, hook = both
    commit_layer(snapshots, "above", lazy_image(both), labels={LABEL_REF: "sha256:4"})
    mounts = snapshots.prepare("container", "above", {})
    assert lowers_of(mounts)[1:] == [str(hook.images / "image")]
    assert len(lowers_of(mounts)) == 2


def test_what_a_layer_is_stays_when_its_labels_change(both: tuple[Snapshots, PlainImages]) -> None:
    snapshots, hook = both
    top = lazy_image(both)
    snapshots.update(top, {"mine": "1"})
    assert lowers_of(snapshots.prepare("container", top, {})) == [str(hook.images / "image")]


def test_no_daemon_means_unavailable_and_leaves_nothing(both: tuple[Snapshots, PlainImages]) -> None:
    snapshots, hook = both
    top = lazy_image(both)
    hook.down = True
    with pytest.raises(SnapshotUnavailableError, match="the daemon does not answer"):
        snapshots.prepare("container", top, {})
    with pytest.raises(SnapshotMissingError):
        snapshots.stat("container")
    commit_layer(snapshots, "ordinary")
    snapshots.prepare("other", "ordinary", {})
    assert snapshots.usage(top).inodes == 2, "its own directory and file"


def test_a_container_on_blobs_alone_is_refused(both: tuple[Snapshots, PlainImages]) -> None:
    snapshots, _ = both
    lazy_image(both)
    with pytest.raises(SnapshotStateError, match="no bootstrap"):
        snapshots.prepare("container", "sha256:2", {})


def test_usage_of_a_lazy_image_counts_its_cached_data(both: tuple[Snapshots, PlainImages]) -> None:
    snapshots, hook = both
    top = lazy_image(both)
    hook.down = True
    alone = snapshots.usage(top)
    hook.down = False
    assert snapshots.usage(top).size_bytes > alone.size_bytes
    assert snapshots.usage("sha256:1").inodes == 1


def test_a_removed_lazy_image_is_let_go_even_if_the_daemon_was_away(both: tuple[Snapshots, PlainImages]) -> None:
    snapshots, hook = both
    top = lazy_image(both)
    snapshots.prepare("container", top, {})
    (number,) = hook.mounted
    with pytest.raises(SnapshotStateError):
        snapshots.remove(top)
    snapshots.remove("container")
    hook.down = True
    snapshots.remove(top)
    assert hook.mounted
    hook.down = False
    snapshots.cleanup()
    assert (hook.mounted, hook.forgotten) == ({}, [number])
    snapshots.cleanup()
    assert hook.forgotten == [number], "once is enough"
    for ref in ("sha256:2", "sha256:1"):
        snapshots.remove(ref)
    assert not snapshots.find()


def test_an_image_that_is_removed_while_it_is_mounted_does_not_stay(both: tuple[Snapshots, PlainImages]) -> None:
    snapshots, hook = both
    top = lazy_image(both)
    mount = hook.ensure_mounted

    def removed_before(bootstrap: LazyLayer) -> Path:
        hook.ensure_mounted = mount
        snapshots.remove(top)
        return mount(bootstrap)

    hook.ensure_mounted = removed_before   # another request of containerd, at the worst moment
    with pytest.raises(SnapshotMissingError, match="removed meanwhile"):
        snapshots.prepare("container", top, {})
    assert hook.mounted == {}


def test_a_parent_that_is_removed_in_the_middle_is_missing_not_damaged(
    both: tuple[Snapshots, PlainImages], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots, _ = both
    snapshots.prepare("extract", "", {})
    snapshots.commit("layer", "extract", {})
    look = core.owner_of

    def removed_before(directory: Path) -> tuple[int, int]:
        snapshots.remove("layer")
        snapshots.cleanup()   # or a thread, a moment later
        return look(directory)

    monkeypatch.setattr(core, "owner_of", removed_before)   # another request of containerd, at the worst moment
    with pytest.raises(SnapshotMissingError, match="layer was removed meanwhile"):
        snapshots.prepare("container", "layer", {})


# --- the root -------------------------------------------------------------------------------------------------------

def test_a_root_has_one_snapshotter(tmp_path: Path) -> None:
    with opened(tmp_path) as (_, hook), pytest.raises(BusyError):
        Snapshots.open(tmp_path / "root", hook)


def test_a_root_keeps_everything_over_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path) as (snapshots, _):
        commit_layer(snapshots, "one", labels={"a": "b"})
        mounts = snapshots.prepare("c", "one", {})
        snapshots.remove("c")
        before = snapshots.find()
    with opened(tmp_path) as (snapshots, _):
        assert snapshots.find() == before
        assert upper_of(snapshots.prepare("d", "one", {})) != upper_of(mounts), "numbers are not given twice"


def test_a_root_that_overlayfs_cannot_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        Snapshots.open(tmp_path / "a:b", PlainImages(tmp_path))


def test_records_of_a_later_version_or_damaged_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    connection = sqlite3.connect(tmp_path / "root" / "metadata.db")
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(HostError, match="later lazyfs"):
        Snapshots.open(tmp_path / "root", PlainImages(tmp_path))
    (tmp_path / "root" / "metadata.db").write_bytes(b"no database at all, but long enough to be looked at" * 100)
    with pytest.raises(HostError):
        Snapshots.open(tmp_path / "root", PlainImages(tmp_path))
