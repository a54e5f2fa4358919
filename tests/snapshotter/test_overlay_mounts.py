"""What core answers, mounted on a real kernel: layers merge, 128 of them, and ids are mapped."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import HostError
from lazyfs.fs import mountapi
from snapshotter import idmap
from snapshotter.failures import SnapshotUnavailableError
from snapshotter.model import LABEL_GID_MAPPING, LABEL_UID_MAPPING, Kind
from tests.snapkit import bootstrap_labels, commit_layer, lowers_of, mounted, opened, require_overlay, upper_of

if TYPE_CHECKING:
    from pathlib import Path

MAPPING = {LABEL_UID_MAPPING: "0:100000:65536", LABEL_GID_MAPPING: "0:200000:65536"}


@pytest.fixture(autouse=True)
def _needs() -> None:
    require_overlay()


def require_id_mapping(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("unshare(1) is missing")
    probe = tmp_path / "probe"
    probe.mkdir()
    try:
        idmap.mapped([probe], tmp_path / "probe-copy", "0:1:1", "0:1:1")
    except HostError as error:
        pytest.skip(f"ids cannot be mapped here: {error}")
    finally:
        idmap.release(tmp_path / "probe-copy")


def test_layers_merge_and_writes_go_to_the_top(tmp_path: Path) -> None:
    with opened(tmp_path) as (snapshots, _):
        commit_layer(snapshots, "one", files={"a": "1", "b": "1"})
        commit_layer(snapshots, "two", "one", {"b": "2"})
        mounts = snapshots.prepare("c", "two", {})
        with mounted(mounts, tmp_path / "mnt") as target:
            assert {path.name: path.read_text() for path in target.iterdir()} == {"a": "1", "b": "2"}
            (target / "a").unlink()
            (target / "new").write_text("x")
        assert sorted(path.name for path in upper_of(mounts).iterdir()) == ["a", "new"], "a whiteout, and the file"
        snapshots.commit("three", "c", {})
        with mounted(snapshots.view("v", "three", {}), tmp_path / "mnt") as target:
            assert sorted(path.name for path in target.iterdir()) == ["b", "new"]
            with pytest.raises(OSError, match="Read-only"):
                (target / "more").write_text("x")
        lowest = snapshots.view("w", "one", {})
        with mounted(lowest, tmp_path / "mnt") as target, pytest.raises(OSError, match="Read-only"):
            (target / "more").write_text("x")


def test_128_layers(tmp_path: Path) -> None:
    with opened(tmp_path) as (snapshots, _):
        parent = ""
        for number in range(128):
            commit_layer(snapshots, f"layer{number}", parent, {f"f{number}": str(number)})
            parent = f"layer{number}"
        mounts = snapshots.prepare("c", parent, {})
        assert len(lowers_of(mounts)) == 128
        with mounted(mounts, tmp_path / "mnt") as target:
            assert len(list(target.iterdir())) == 128


def test_a_lazy_image_is_mapped_for_a_user_namespace(tmp_path: Path) -> None:
    require_id_mapping(tmp_path)
    with opened(tmp_path) as (snapshots, hook):
        tree = hook.images / "image"
        tree.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", str(tree)], check=True)   # a mount of its own, as a real one
        try:
            for name, owner in (("of-root", 0), ("of-user", 1000)):
                (tree / name).write_text(name)
                os.chown(tree / name, owner, owner)
            commit_layer(snapshots, "lazy", labels=bootstrap_labels("sha256:1", "image"))
            commit_layer(snapshots, "above", "lazy", {"ordinary": "x"})
            mounts = snapshots.prepare("c", "above", MAPPING)
            assert not any("uidmap" in option for option in mounts[0].options), "containerd is not to map again"
            assert snapshots.mounts("c") == mounts
            with mounted(mounts, tmp_path / "mnt") as target:
                found = {path.name: (path.stat().st_uid, path.stat().st_gid) for path in target.iterdir()}
                assert found == {"of-root": (100000, 200000), "of-user": (101000, 201000), "ordinary": (100000, 200000)}
                assert (target.stat().st_uid, target.stat().st_gid) == (100000, 200000)
                os.chown(target / "of-user", 100005, 200005)   # a copy up, as root of the container could ask for
                assert (target / "of-user").read_text() == "of-user"
            for lower in lowers_of(mounts):   # a reboot
                mountapi.unmount(lower)
            assert snapshots.mounts("c") == mounts
            with mounted(mounts, tmp_path / "mnt") as target:
                assert (target / "of-root").stat().st_uid == 100000
            snapshots.remove("c")
            assert not [entry for entry in mountapi.mounts() if "/mapped/" in entry.target]
            assert list((tmp_path / "root" / "mapped").iterdir()) == []
        finally:
            subprocess.run(["umount", str(tree)], check=True)


def test_ids_of_an_ordinary_image_are_left_to_containerd(tmp_path: Path) -> None:
    with opened(tmp_path) as (snapshots, _):
        commit_layer(snapshots, "one")
        mounts = snapshots.prepare("c", "one", MAPPING)
        assert mounts[0].options[:2] == ("uidmap=0:100000:65536", "gidmap=0:200000:65536")
        assert upper_of(mounts).stat().st_uid == 100000


def test_a_mapping_that_the_kernel_refuses_leaves_nothing(tmp_path: Path) -> None:
    require_id_mapping(tmp_path)
    with opened(tmp_path) as (snapshots, hook):
        (hook.images / "image").mkdir()
        commit_layer(snapshots, "lazy", labels=bootstrap_labels("sha256:1", "image"))
        overlapping = {LABEL_UID_MAPPING: "0:1000:10,5:2000:10", LABEL_GID_MAPPING: "0:1000:10"}
        with pytest.raises(SnapshotUnavailableError, match="map ids"):
            snapshots.prepare("c", "lazy", overlapping)
        assert [info.name for info in snapshots.find() if info.kind is Kind.ACTIVE] == []
        assert list((tmp_path / "root" / "mapped").iterdir()) == []
