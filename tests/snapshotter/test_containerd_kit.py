"""The kit that all tests with containerd stand on: with overlayfs, both versions, and nothing left."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.containerdkit import VERSIONS, running_containerd
from tests.convertkit import Layout
from tests.registrykit import running_registry
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from tests.registrykit import Registry

BUSYBOX = Path("/usr/bin/busybox")


def push_busybox(registry: Registry, directory: Path) -> str:
    """A small image with a static busybox in the first of its two layers; its reference."""
    if not BUSYBOX.exists() or shutil.which("skopeo") is None:
        pytest.skip("busybox-static or skopeo is not installed")
    layout = Layout(directory / "busybox")
    first = TarBuilder().directory("bin").file("bin/busybox", BUSYBOX.read_bytes(), mode=0o755)
    layout.add_image("1", [first.symlink("bin/sh", "busybox").symlink("bin/true", "busybox").build(),
                           TarBuilder().file("greeting", b"hello\n").build()])
    subprocess.run(["skopeo", "copy", "--quiet", "--dest-tls-verify=false", layout.reference("1"),
                    f"docker://{registry.host}/busybox:1"], check=True)
    return f"{registry.host}/busybox:1"


@pytest.mark.mount
@pytest.mark.parametrize("version", VERSIONS)
def test_containerd_runs_an_ordinary_image(tmp_path: Path, version: str) -> None:
    with running_registry(tmp_path) as registry, running_containerd(tmp_path, version) as containerd:
        reference = push_busybox(registry, tmp_path)
        containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", reference)
        output = containerd.run(reference, "/bin/busybox", "cat", "/greeting", snapshotter="overlayfs")
        assert output == "hello\n"
        assert containerd.namespaces() == ["default"]


@pytest.mark.mount
@pytest.mark.parametrize("version", VERSIONS)
def test_containers_outlive_containerd_and_are_taken_away_at_the_end(tmp_path: Path, version: str) -> None:
    with running_registry(tmp_path) as registry, running_containerd(tmp_path, version) as containerd:
        reference = push_busybox(registry, tmp_path)
        containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", reference)
        containerd.ctr("run", "--detach", "--snapshotter", "overlayfs", reference, "sleeper",
                       "/bin/busybox", "sleep", "600")
        containerd.kill()
        containerd.start()
        assert "RUNNING" in containerd.ctr("tasks", "list")
