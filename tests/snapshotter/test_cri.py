"""Pods as kubelet makes them: pull, sandbox, container, exec, logs, stats, removal, image GC; both containerds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.containerdkit import VERSIONS
from tests.convertkit import Layout
from tests.crikit import Cri, CriError, add_test_images, push_layout, running_cri, wait_until
from tests.registrykit import Registry, running_registry

if TYPE_CHECKING:
    from pathlib import Path

USER, PASSWORD = "puller", "a pull secret"


def push_test_images(registry: Registry, directory: Path) -> tuple[str, str]:
    """References of the pause image and of an ordinary one."""
    layout = Layout(directory / "images")
    add_test_images(layout)
    for tag in ("pause", "app"):
        push_layout(layout, tag, f"{registry.host}/{tag}:1")
    return f"{registry.host}/pause:1", f"{registry.host}/app:1"


def check_pod(cri: Cri, image: str, *, host_network: bool = False) -> None:
    """One pod's whole life with a container of `image`, which is `app`."""
    pod = cri.run_pod("pod", host_network=host_network)
    if not host_network:
        assert cri.pod_address(pod).startswith("10.")
    container = cri.run(pod, "main", image, ["/bin/sh", "-c", "echo started; cat /greeting >&2; exec sleep 600"])
    cri.wait_log(pod, "main", "started")
    cri.wait_log(pod, "main", "hello")
    assert sorted(cri.logs(pod, "main")) == [("stderr", "hello"), ("stdout", "started")]

    done = cri.exec(container, ["/bin/sh", "-c", "cat /greeting; echo changed >/greeting; cat /greeting; exit 3"])
    assert (done.stdout, done.exit_code) == ("hello\nchanged\n", 3)
    cri.exec(container, ["/bin/dd", "if=/dev/zero", "of=/big", "bs=1024", "count=3000"])
    # containerd collects usage of writable layers every 10 s
    wait_until(lambda: cri.stats(container)["used_bytes"] >= 3000 * 1024, "the writable layer's use is not seen")
    assert cri.stats(container)["memory_bytes"] > 0

    second = cri.run(pod, "second", image, ["/bin/cat", "/greeting"])
    assert cri.exit_code(second) == 0
    assert cri.logs(pod, "second") == [("stdout", "hello")], "a container sees what another wrote"
    cri.stop(container)
    cri.remove(container)
    cri.remove(second)
    cri.remove_pod(pod)
    assert cri.containers() == []


def snapshots(cri: Cri, snapshotter: str) -> list[str]:
    """All that containerd knows in the snapshotter."""
    table = cri.containerd.ctr("snapshots", "--snapshotter", snapshotter, "list", namespace="k8s.io")
    return table.splitlines()[1:]


def check_image_gc(cri: Cri, images: list[str], snapshotter: str) -> None:
    """Kubelet removes images: nothing of them is left."""
    for image in images:
        cri.remove_image(image)
        assert cri.image(image) is None
    assert cri.images() == []
    wait_until(lambda: not snapshots(cri, snapshotter), "snapshots of removed images stay")
    wait_until(lambda: not cri.containerd.ctr("content", "list", "--quiet", namespace="k8s.io").split(),
               "content of removed images stays")


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_a_pod_with_overlayfs(tmp_path: Path, version: str) -> None:
    """What the same steps with our snapshotter are compared with."""
    with running_registry(tmp_path) as registry:
        pause, app = push_test_images(registry, tmp_path)
        with running_cri(tmp_path, version, sandbox_image=pause) as cri:
            cri.pull(pause)
            cri.pull(app)
            assert cri.images() == [app, pause]
            check_pod(cri, app)
            check_image_gc(cri, [app, pause], "overlayfs")


@pytest.mark.mount
@pytest.mark.parametrize("version", VERSIONS)
def test_an_image_behind_a_password_with_overlayfs(tmp_path: Path, version: str) -> None:
    with running_registry(tmp_path, username=USER, password=PASSWORD) as registry:
        layout = Layout(tmp_path / "images")
        add_test_images(layout)
        image = f"{registry.host}/private:1"
        push_layout(layout, "app", image, f"{USER}:{PASSWORD}")
        with running_cri(tmp_path, version) as cri:
            with pytest.raises(CriError):
                cri.pull(image)
            cri.pull(image, USER, PASSWORD)
            assert cri.images() == [image]
            check_image_gc(cri, [image], "overlayfs")
