"""Containers with user namespaces: ids are mapped, by containerd for ordinary images, by us for lazy ones."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazyfs.fs import mountapi
from tests.lazyrig import running_node

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.mount
FILES = {"f0": random.Random(0).randbytes(300_000), "f1": b"x" * 5000}
MAPPING = ("--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536", "--remap-labels")
SCRIPT = ("cat /proc/self/uid_map; /bin/busybox stat -c '%u %g' / /data /data/f0; "
          "/bin/busybox wc -c < /data/f0; echo more >> /data/f0; /bin/busybox wc -c < /data/f0")


@pytest.fixture
def open_path(tmp_path: Path) -> Iterator[Path]:
    """A directory that root of the container may walk to, as /run/containerd is; pytest's own is for us alone."""
    path = Path(tempfile.mkdtemp(prefix="lazyfs-userns-", dir=tmp_path.anchor + "tmp"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "ordinary"])
def test_root_of_a_container_owns_its_files(open_path: Path, lazy: bool) -> None:
    with running_node(open_path, "2.x", driver="erofs") as node:
        node.containerd.config["proxy_plugins"]["lazyfs"]["capabilities"] = ["remap-ids"]   # as `install` writes it
        node.containerd.restart()
        image = node.push("app", FILES, lazy=lazy)
        node.pull(image)
        output = node.containerd.ctr("run", "--rm", "--snapshotter", "lazyfs", *MAPPING, image, "mapped",
                                     "/bin/busybox", "sh", "-c", SCRIPT.replace("cat", "/bin/busybox cat"))
        words = output.split()
        assert words == ["0", "100000", "65536", *(["0", "0"] * 3), "300000", "300005"]
        node.remove_all()
        node.assert_nothing_left()
        assert not [entry for entry in mountapi.mounts() if "/mapped/" in entry.target], "they went with the container"
        assert list((node.snapshotter.root / "mapped").iterdir()) == []


def test_driver_fuse_says_that_it_cannot_map(open_path: Path) -> None:
    with running_node(open_path, "2.x", driver="fuse") as node:
        node.containerd.config["proxy_plugins"]["lazyfs"]["capabilities"] = ["remap-ids"]
        node.containerd.restart()
        image = node.push("app", FILES)
        node.pull(image)
        with node.containerd.start_ctr("run", "--rm", "--snapshotter", "lazyfs", *MAPPING, image, "mapped",
                                       "/bin/busybox", "true") as refused:
            _, text = refused.communicate(timeout=60)
        assert refused.returncode == 1
        assert "this file system cannot map ids" in text
        node.remove_all()
        node.assert_nothing_left()
        assert list((node.snapshotter.root / "mapped").iterdir()) == []
