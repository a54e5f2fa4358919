"""What `lazyfs snapshotter install` writes is enough for pods: an ordinary containerd becomes one with lazy images."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tomllib
from typing import TYPE_CHECKING

import pytest

from tests.containerdkit import VERSIONS, _toml
from tests.crikit import running_cri
from tests.daemonkit import running_daemon
from tests.lazyrig import SnapshotterProcess
from tests.mountkit import LAZYFS, Machine, require_mounting
from tests.registrykit import running_registry
from tests.snapshotter.test_cri import check_no_data_layer, check_pod, push_test_images

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_a_pod_after_install(tmp_path: Path, version: str) -> None:
    require_mounting()
    machine = Machine(tmp_path)
    with contextlib.ExitStack() as stack:
        registry = stack.enter_context(running_registry(tmp_path))
        pause, app, lazy = push_test_images(registry, tmp_path)
        cri = stack.enter_context(running_cri(tmp_path, version, sandbox_image=pause))
        containerd = cri.containerd
        stack.enter_context(running_daemon(machine))
        snapshotter = SnapshotterProcess(machine, containerd.address)
        stack.callback(snapshotter.kill)
        snapshotter.start()
        file = tmp_path / "installed.toml"
        file.write_text("# somebody's\n" + "".join(_toml(containerd.config)))
        before = file.read_bytes()
        environment = {**os.environ, "LAZYFS_SNAPSHOTTER_ADDRESS": str(snapshotter.address),
                       "LAZYFS_SNAPSHOTTER_ROOT": str(snapshotter.root)}
        state = ["--state", str(tmp_path / "install.json")]
        subprocess.run([*LAZYFS, "snapshotter", "install", "--no-units", "--config", file, "--containerd",
                        containerd.programs.containerd, *state], check=True, env=environment, timeout=60)
        containerd.stop()
        containerd.config = tomllib.loads(file.read_text())
        containerd.start()
        cri.wait_ready()
        for image in (pause, app, lazy):
            cri.pull(image)
        check_no_data_layer(cri, lazy)
        check_pod(cri, lazy)
        check_pod(cri, app)
        for image in (lazy, app, pause):
            cri.remove_image(image)
        cri.clear()
        subprocess.run([*LAZYFS, "snapshotter", "uninstall", *state], check=True, env=environment, timeout=60)
        assert file.read_bytes() == before
    machine.close()
