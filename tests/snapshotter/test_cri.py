"""Pods as kubelet makes them: pull, sandbox, container, exec, logs, stats, removal, image GC; both containerds."""

from __future__ import annotations

import base64
import contextlib
import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from lazyfs.registry import RegistryOptions
from lazyfs.registry.options import Secret
from tests.containerdkit import VERSIONS, require_containerd
from tests.convertkit import Layout, run_convert
from tests.crikit import BUSYBOX, Cri, CriError, add_test_images, push_layout, running_cri, wait_until
from tests.daemonkit import running_daemon
from tests.lazyrig import Node, SnapshotterProcess, layer_digests
from tests.mountkit import Machine, require_mounting
from tests.registrykit import Registry, running_registry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DATA_BYTES = 12 * 1024 * 1024     # more than everything else in the images together
USER, PASSWORD = "puller", "a pull secret"


def push_test_images(registry: Registry, directory: Path) -> tuple[str, str, str]:
    """References of the pause image, of an ordinary one, and of the same one made lazy."""
    layout = Layout(directory / "images")
    add_test_images(layout)
    for tag in ("pause", "app"):
        push_layout(layout, tag, f"{registry.host}/{tag}:1")
    lazy = f"{registry.host}/app:lazy"
    run_convert(layout.reference("app"), f"docker://{lazy}", registry=RegistryOptions(insecure=True))
    return f"{registry.host}/pause:1", f"{registry.host}/app:1", lazy


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
    # containerd collects this every now and then
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
        pause, app, _ = push_test_images(registry, tmp_path)
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


# --- lazyfs -----------------------------------------------------------------------------------------------------------

TRANSFER = {"disable_snapshot_annotations": True}     # 2.x's own default; without it, it pulls by itself as 1.6 does
EXPORTS = {"enable_remote_snapshot_annotations": "true"}


@dataclass
class LazyNode:
    """containerd's CRI on top of `lazyfs snapshotter` and `lazyfs daemon`."""

    cri: Cri
    node: Node


@contextlib.contextmanager
def running_lazy_cri(
    directory: Path, version: str, registry: Registry, pause: str, *, transfer: bool = False, exports: bool = True,
    **options: Any,
) -> Iterator[LazyNode]:
    """
    All of a node. `transfer`: 2.x pulls by its transfer service.

    `exports`: 2.x knows our directory, and hands CRI's labels through the transfer service, as `install` sets it up.

    """
    require_mounting()
    require_containerd(version)
    machine = Machine(directory)
    snapshotter = SnapshotterProcess(machine, directory / f"c{version[0]}" / "c.sock")
    more: dict[str, Any] = {"debug": {"level": "debug"}}
    if version == "2.x" and transfer:
        more["plugins"] = {"io.containerd.cri.v1.images": TRANSFER}
    if version == "2.x" and exports:
        more["proxy_plugins"] = {"lazyfs": {"exports": {"root": str(snapshotter.root), **EXPORTS}}}
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(running_daemon(machine))
        stack.callback(snapshotter.kill)
        snapshotter.start()
        cri = stack.enter_context(running_cri(
            directory, version, snapshotter=snapshotter.address, sandbox_image=pause, more=more, **options))
        yield LazyNode(cri, Node(machine, registry, daemon, snapshotter, cri.containerd))


def check_no_data_layer(cri: Cri, image: str) -> None:
    """containerd has the lazy image's bootstrap, and none of its data."""
    blobs, bootstrap = layer_digests(image)
    content = set(cri.containerd.ctr("content", "list", "--quiet", namespace="k8s.io").split())
    assert str(bootstrap) in content
    assert not content.intersection(map(str, blobs))


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.parametrize(("version", "transfer"), [("1.6", False), ("2.x", False), ("2.x", True)])
def test_pods_with_lazyfs(tmp_path: Path, version: str, transfer: bool) -> None:
    """Pause and ordinary images through our snapshotter, and a lazy image beside them."""
    with running_registry(tmp_path) as registry:
        pause, app, lazy = push_test_images(registry, tmp_path)
        with running_lazy_cri(tmp_path, version, registry, pause, transfer=transfer) as there:
            cri = there.cri
            for image in (pause, app, lazy):
                cri.pull(image)
            assert cri.images() == [app, lazy, pause]
            assert ("with snapshotter lazyfs using transfer service" in cri.containerd.log) == transfer
            check_no_data_layer(cri, lazy)
            check_pod(cri, app)
            check_pod(cri, lazy)
            check_image_gc(cri, [lazy, app, pause], "lazyfs")
            there.node.assert_nothing_left()


@pytest.mark.mount
@pytest.mark.slow
def test_a_pull_without_labels_finds_its_image(tmp_path: Path) -> None:
    """The transfer service as it is configured by default hands no image reference down."""
    with running_registry(tmp_path) as registry:
        pause, _, lazy = push_test_images(registry, tmp_path)
        with running_lazy_cri(tmp_path, "2.x", registry, pause, transfer=True, exports=False) as there:
            there.cri.pull(pause)
            there.cri.pull(lazy)
            check_no_data_layer(there.cri, lazy)
            check_pod(there.cri, lazy, host_network=True)


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_kubelet_sees_what_images_use(tmp_path: Path, version: str) -> None:
    """And where they are; Debian's 1.6 names a directory of its own, as for every proxy snapshotter."""
    with running_registry(tmp_path) as registry:
        pause, app, _ = push_test_images(registry, tmp_path)
        with running_lazy_cri(tmp_path, version, registry, pause) as there:
            cri = there.cri
            cri.pull(app)
            size = BUSYBOX.stat().st_size
            # containerd collects this every now and then
            wait_until(lambda: cri.image_filesystem()["used_bytes"] >= size, "the image's disk use is not seen")
            found = cri.image_filesystem()
            assert found["inodes_used"] >= 10
            if version == "2.x":
                assert found["mountpoint"] == str(there.node.snapshotter.root)
            cri.remove_image(app)
            wait_until(lambda: cri.image_filesystem()["used_bytes"] == 0, "a removed image is still counted")


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_usage_is_what_a_lazy_image_has_on_the_disk(tmp_path: Path, version: str) -> None:
    """
    Not what it would use unpacked; and the container does not pay for it, so that no pod is evicted for its image.

    By containerd's API: the CRI asks about a committed snapshot once only. Kubelet's image GC goes by the free space of
    the file system that the CRI names, not by this sum.
    """
    data = random.Random(1).randbytes(DATA_BYTES)
    with running_registry(tmp_path) as registry:
        pause, _, _ = push_test_images(registry, tmp_path)
        with running_lazy_cri(tmp_path, version, registry, pause) as there:
            cri = there.cri
            cri.pull(pause)
            image = there.node.push("data", {"big": data})
            cri.pull(image)
            pod = cri.run_pod("pod")
            container = cri.run(pod, "main", image, ["/bin/busybox", "sleep", "600"])
            before = all_usage(cri)
            assert sum(before.values()) < DATA_BYTES
            cri.exec(container, ["/bin/busybox", "sh", "-c", "cat /data/big >/dev/null"])
            after = all_usage(cri)
            grown = {name: after[name] - before[name] for name in after}
            assert max(grown.values()) >= DATA_BYTES - 1024 * 1024
            assert grown[container] < 1024 * 1024
            wait_until(lambda: 0 <= cri.stats(container)["used_bytes"] < 1024 * 1024, "the container pays")


def all_usage(cri: Cri) -> dict[str, int]:
    """Bytes on the disk of every snapshot, by name, asked now."""
    table = cri.containerd.ctr("snapshots", "--snapshotter", "lazyfs", "usage", "-b", namespace="k8s.io")
    rows = [line.split() for line in table.splitlines()[1:]]
    return {row[0]: int(row[1]) for row in rows}


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_pods_outlive_containerd_and_snapshotter(tmp_path: Path, version: str) -> None:
    """Both are killed; the container reads on, and afterwards everything can be done with it, and with new ones."""
    with running_registry(tmp_path) as registry:
        pause, _, lazy = push_test_images(registry, tmp_path)
        with running_lazy_cri(tmp_path, version, registry, pause) as there:
            cri, node = there.cri, there.node
            cri.pull(pause)
            cri.pull(lazy)
            pod = cri.run_pod("pod")
            container = cri.run(pod, "main", lazy, ["/bin/sleep", "600"])
            node.containerd.kill()
            node.snapshotter.kill()
            node.snapshotter.start()
            node.containerd.start()
            cri.wait_ready()
            assert cri.state(container) == "CONTAINER_RUNNING"
            assert cri.exec(container, ["/bin/cat", "/greeting"]).stdout == "hello\n"
            second = cri.run(pod, "second", lazy, ["/bin/cat", "/greeting"])
            assert cri.exit_code(second) == 0
            cri.remove_pod(pod)
            check_image_gc(cri, [lazy, pause], "lazyfs")
            node.assert_nothing_left()


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_a_pod_runs_what_lazyfs_pulled(tmp_path: Path, version: str) -> None:
    """Images that are there already when kubelet asks for them; the pod's own is lazy, too."""
    with running_registry(tmp_path) as registry:
        _, _, lazy = push_test_images(registry, tmp_path)
        pause = f"{registry.host}/pause:lazy"
        run_convert(f"docker://{registry.host}/pause:1", f"docker://{pause}", registry=RegistryOptions(insecure=True))
        with running_lazy_cri(tmp_path, version, registry, pause) as there:
            for image in (pause, lazy):
                there.node.lazyfs_pull(image, namespace="k8s.io")
            wait_until(lambda: there.cri.images() == [lazy, pause], "the CRI does not know the images")
            check_no_data_layer(there.cri, lazy)
            check_pod(there.cri, lazy)
            check_image_gc(there.cri, [lazy, pause], "lazyfs")
            there.node.assert_nothing_left()


def runs(cri: Cri, image: str) -> bool:
    """Whether a container of the image can be run now."""
    pod = cri.run_pod("probe")
    try:
        cri.run(pod, "main", image, ["/bin/true"])
    except CriError:
        return False
    finally:
        cri.remove_pod(pod)
    return True


def push_private_image(registry: Registry, directory: Path) -> str:
    """Reference of a lazy image that only USER may read."""
    layout = Layout(directory / "private")
    add_test_images(layout)
    image = f"{registry.host}/private:lazy"
    run_convert(layout.reference("app"), f"docker://{image}",
                registry=RegistryOptions(username=USER, password=Secret(PASSWORD), insecure=True))
    return image


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_a_lazy_image_behind_a_password_of_dockers(
    tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """containerd has its pull secret from kubelet; the daemon finds the same one in docker's configuration."""
    (tmp_path / "public").mkdir()
    docker = tmp_path / "docker"
    docker.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(docker))
    with running_registry(tmp_path / "public") as public, \
            running_registry(tmp_path, username=USER, password=PASSWORD) as registry:
        pause, _, _ = push_test_images(public, tmp_path)
        image = push_private_image(registry, tmp_path)
        with running_lazy_cri(tmp_path, version, registry, pause) as there:
            cri = there.cri
            cri.pull(pause)
            with pytest.raises(CriError):
                cri.pull(image)
            cri.pull(image, USER, PASSWORD)
            assert not runs(cri, image)
            auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
            (docker / "config.json").write_text(json.dumps({"auths": {registry.host: {"auth": auth}}}))
            wait_until(lambda: runs(cri, image), "the image cannot be read with credentials")   # kubelet retries, too
            check_pod(cri, image)


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.parametrize(("version", "transfer"), [("1.6", False), ("2.x", False), ("2.x", True)])
def test_a_lazy_image_with_a_pull_secret(tmp_path: Path, version: str, transfer: bool) -> None:
    """Kubelet asks our socket about images (--image-service-endpoint): its pull secrets reach the daemon."""
    (tmp_path / "public").mkdir()
    with running_registry(tmp_path / "public") as public, \
            running_registry(tmp_path, username=USER, password=PASSWORD) as registry:
        pause, _, _ = push_test_images(public, tmp_path)
        image = push_private_image(registry, tmp_path)
        with running_lazy_cri(tmp_path, version, registry, pause, transfer=transfer) as there:
            cri = there.cri
            cri.images_address = there.node.snapshotter.address
            cri.pull(pause)
            with pytest.raises(CriError):
                cri.pull(image)
            cri.pull(image, USER, PASSWORD)
            assert cri.images() == sorted([pause, image])   # their ports are not in order
            check_pod(cri, image)
            check_image_gc(cri, [image, pause], "lazyfs")
            there.node.assert_nothing_left()
            for log in (cri.containerd.log, there.node.snapshotter.log.read_text(),
                        (tmp_path / "daemon.log").read_text()):
                assert PASSWORD not in log


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.parametrize(("version", "transfer"), [("1.6", False), ("2.x", False), ("2.x", True)])
def test_a_lazy_image_from_a_mirror(
    tmp_path: Path, version: str, transfer: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The registry in the image's name does not exist: hosts.toml sends both containerd and the daemon elsewhere."""
    hosts = tmp_path / "certs.d"
    monkeypatch.setenv("LAZYFS_REGISTRY_HOSTS_DIR", str(hosts))
    with running_registry(tmp_path) as registry:
        pause, _, _ = push_test_images(registry, tmp_path)
        (hosts / "registry.invalid").mkdir(parents=True)
        (hosts / "registry.invalid" / "hosts.toml").write_text(
            f'[host."http://{registry.host}"]\ncapabilities = ["pull", "resolve"]\n')
        image = "registry.invalid/app:lazy"
        with running_lazy_cri(tmp_path, version, registry, pause, transfer=transfer, hosts_dir=hosts) as there:
            there.cri.pull(pause)
            there.cri.pull(image)
            check_pod(there.cri, image)
