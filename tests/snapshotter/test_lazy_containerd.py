"""Containers from lazy images: containerd, runc, a registry, the daemon and the snapshotter, all of them real."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.containerdkit import VERSIONS
from tests.lazyrig import WAIT_S, Node, Reader, add_layer, copy_image, layer_digests, running_node, sums_of
from tests.registrykit import running_registry
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.mount
FILES = {f"f{number}": random.Random(number).randbytes(400_000 + number) for number in range(8)}
NAMES = sorted(FILES)
SUMS = sums_of(FILES)
BOTH = pytest.mark.parametrize("version", VERSIONS)


@pytest.fixture
def node(tmp_path: Path, version: str, driver: str) -> Iterator[Node]:
    with running_node(tmp_path, version, driver=driver) as running:
        yield running


@pytest.fixture
def driver() -> str:
    return "auto"


def wait_for_mount_ahead(node: Node) -> None:
    """Where pulls say which image it is: containerd's transfer service does not."""
    deadline = time.monotonic() + WAIT_S
    while not node.containerd.programs.is_2 and not node.lazy_mounts():
        assert time.monotonic() < deadline, node.snapshotter.log.read_text()
        time.sleep(0.01)
    assert len(node.lazy_mounts()) == (0 if node.containerd.programs.is_2 else 1)


def mount_late(node: Node) -> None:
    node.snapshotter.end(signal.SIGTERM)
    node.snapshotter.environment["LAZYFS_SNAPSHOTTER_MOUNT_AHEAD"] = "false"
    node.start_snapshotter()


@BOTH
@pytest.mark.parametrize("driver", ["erofs", "fuse"])
def test_a_lazy_image_runs_without_its_data_being_pulled(node: Node) -> None:
    image = node.push("app", FILES)
    node.pull(image)
    blobs, bootstrap = layer_digests(image)
    content = node.content()
    assert bootstrap.text in content
    assert not content & {blob.text for blob in blobs}
    wait_for_mount_ahead(node)
    assert node.sums(image, NAMES) == SUMS
    assert len(node.lazy_mounts()) == 1
    assert node.sums(image, NAMES[:1]) == {"f0": SUMS["f0"]}
    assert len(node.lazy_mounts()) == 1
    node.remove_all()
    node.assert_nothing_left()


@BOTH
def test_containers_write_to_layers_of_their_own(node: Node) -> None:
    image = node.push("app", FILES)
    node.pull(image)
    script = "echo changed > /data/f0; rm /data/f1; cat /data/f0; ls /data | wc -l"
    for _ in range(2):
        output = node.containerd.run(image, "/bin/busybox", "sh", "-c", script)
        assert output.split() == ["changed", str(len(FILES) - 1)]
    assert node.sums(image, NAMES) == SUMS


@BOTH
def test_lazy_and_ordinary_layers_mix(node: Node, tmp_path: Path) -> None:
    plain = node.push("plain", FILES, lazy=False)
    lazy = node.push("app", FILES)
    top = TarBuilder().directory("data").file("data/f0", b"covered").file("data/.wh.f1", b"").file("data/new", b"new")
    mixed = add_layer(lazy, top.build(), tmp_path / "mixed")
    node.pull(plain)
    assert node.sums(plain, NAMES) == SUMS
    assert node.lazy_mounts() == []
    node.pull(mixed)   # its top layer is unpacked over the mounted image, which is no image of containerd's yet
    node.pull(lazy)
    expected = sums_of({"f0": b"covered", "new": b"new", **{name: FILES[name] for name in NAMES[2:]}})
    assert node.sums(mixed, ["f0", "new", *NAMES[2:]]) == expected
    assert node.containerd.run(mixed, "/bin/busybox", "ls", "/data").split() == sorted(expected)
    assert node.sums(lazy, NAMES) == SUMS
    assert len(node.lazy_mounts()) == 1, "one bootstrap, one mount"
    node.remove_all()
    node.assert_nothing_left()


@pytest.mark.parametrize("version", ["2.x"])
def test_what_is_unpacked_by_a_guess_is_looked_for_at_the_right_port(node: Node, tmp_path: Path) -> None:
    """Of an image that is being unpacked containerd's labels have the registry's name, but not its port."""
    node.pull(node.push("plain", {}, lazy=False))
    lazy = node.push("app", FILES)
    node.pull(add_layer(lazy, TarBuilder().file("new", b"new").build(), tmp_path / "mixed"))
    status = node.daemon.status()
    assert status is not None
    assert [mount["image"] for mount in status["mounts"]] == [f"{node.registry.host}/app"]


@BOTH
def test_namespaces_share_a_mount_until_the_last_has_removed_the_image(node: Node) -> None:
    image = node.push("app", FILES)
    for namespace in ("one", "two"):
        node.pull(image, namespace=namespace)
        assert node.sums(image, NAMES[:2], namespace=namespace) == {name: SUMS[name] for name in NAMES[:2]}
    assert len(node.lazy_mounts()) == 1
    node.remove_all("one")
    assert node.sums(image, NAMES, namespace="two") == SUMS
    node.remove_all("two")
    node.assert_nothing_left()


@BOTH
def test_a_copied_image_works_when_its_first_registry_is_gone(node: Node, tmp_path: Path) -> None:
    image = node.push("app", FILES)
    with running_registry(tmp_path / "second") as second:
        copy = f"{second.host}/elsewhere/copy:1"
        copy_image(f"docker://{image}", f"docker://{copy}")
        node.pull(image)
        node.pull(copy)
        node.registry.stop()
        assert node.sums(copy, NAMES) == SUMS
        node.remove_all()
        node.assert_nothing_left()


@BOTH
def test_twenty_containers_start_at_once(node: Node) -> None:
    image = node.push("app", FILES)
    node.pull(image)
    found: list[dict[str, str]] = []
    names = [NAMES[number % len(NAMES)] for number in range(20)]
    threads = [threading.Thread(target=lambda name=name: found.append(node.sums(image, [name]))) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert sorted(map(str, found)) == sorted(str({name: SUMS[name]}) for name in names)
    assert len(node.lazy_mounts()) == 1
    node.remove_all()
    node.assert_nothing_left()


def start_reading(node: Node, image: str) -> Reader:
    """A container that lives, and a reader of its files as it sees them."""
    node.containerd.ctr("run", "--detach", "--snapshotter", "lazyfs", image, "lives", "/bin/busybox", "sleep", "600")
    return Reader(rootfs(node), FILES)


def rootfs(node: Node) -> Path:
    """data/ as the container sees it."""
    (pid,) = [line.split()[1] for line in node.containerd.ctr("tasks", "list").splitlines() if "lives" in line]
    return Path(f"/proc/{pid}/root/data")


def fails(node: Node, image: str) -> str:
    """A container that does not start; what ctr says."""
    words = ["run", "--rm", "--snapshotter", "lazyfs", image, "fails", "/bin/busybox", "true"]
    with node.containerd.start_ctr(*words) as run:
        _, errors = run.communicate(timeout=60)
    assert run.returncode
    return errors


def end_container(node: Node) -> None:
    node.containerd.ctr("tasks", "delete", "--force", "lives")
    node.containerd.ctr("containers", "delete", "lives")


@BOTH
@pytest.mark.parametrize("driver", ["erofs", "fuse"])
def test_a_container_reads_on_whatever_of_ours_is_killed(node: Node) -> None:
    image = node.push("app", FILES)
    node.pull(image)
    reader = start_reading(node, image)
    worker = node.daemon.worker()
    os.kill(worker, signal.SIGKILL)
    worker = node.daemon.wait_ready(not_worker=worker)
    node.snapshotter.kill_server()
    node.snapshotter.kill()
    node.snapshotter.start()
    node.containerd.kill()
    os.kill(worker, signal.SIGKILL)
    node.containerd.start()
    worker = node.daemon.wait_ready(not_worker=worker)
    node.machine.lazyfs("daemon", "upgrade")
    node.daemon.wait_ready(not_worker=worker)
    assert node.sums(image, NAMES) == SUMS, "and new containers start"
    reader.finish()
    end_container(node)
    node.remove_all()
    node.assert_nothing_left()


@BOTH
def test_a_container_starts_while_the_server_is_being_replaced(node: Node) -> None:
    image = node.push("app", FILES)
    node.pull(image)
    for name in NAMES[:3]:
        node.snapshotter.kill_server()
        assert node.sums(image, [name]) == {name: SUMS[name]}, "at the first try: it is not refused, it waits"


@BOTH
def test_an_image_that_is_removed_under_its_container_is_served_to_the_end(node: Node) -> None:
    image = node.push("app", FILES)
    node.pull(image)
    reader = start_reading(node, image)
    node.remove_all()
    node.snapshotter.kill()
    node.start_snapshotter()
    reader.finish()
    assert len(node.lazy_mounts()) == 1
    end_container(node)
    node.collect()
    node.assert_nothing_left()


@BOTH
def test_a_daemon_that_is_down_is_said_by_ctr_and_then_used(node: Node) -> None:
    mount_late(node)   # a worker that has something mounted answers on
    image = node.push("app", FILES)
    node.pull(image)
    node.daemon.stop()
    assert "the lazyfs daemon does not run" in fails(node, image)
    node.restart_daemon()
    assert node.sums(image, NAMES[:1]) == {"f0": SUMS["f0"]}


@BOTH
def test_after_a_reboot_everything_is_made_anew(node: Node) -> None:
    """Records are kept, mounts are gone. A container from before is started again; removal leaves nothing."""
    image = node.push("app", FILES)
    node.pull(image)
    node.containerd.ctr("run", "--detach", "--snapshotter", "lazyfs", image, "lives", "/bin/busybox", "sleep", "600")
    stray = node.snapshotter.root / "images" / ("0" * 32)
    stray.mkdir()
    node.reboot()
    assert not stray.exists()
    assert node.lazy_mounts() == []
    node.containerd.ctr("tasks", "start", "--detach", "lives")
    assert len(node.lazy_mounts()) == 1
    Reader(rootfs(node), FILES).finish()
    assert node.sums(image, NAMES) == SUMS
    end_container(node)
    node.remove_all()
    node.assert_nothing_left()


@BOTH
def test_one_broken_image_blocks_neither_the_start_nor_the_others(node: Node) -> None:
    mount_late(node)   # what is mounted is not broken
    good, bad = node.push("app", FILES), node.push("other", {"only": b"x" * 100_000})
    for image in (good, bad):
        node.pull(image)
    node.snapshotter.kill()
    node.registry.stop()
    smallest = min(node.snapshotter.root.glob("snapshots/*/fs/lazyfs/tables.bin"), key=lambda path: path.stat().st_size)
    smallest.unlink()
    node.start_snapshotter()
    node.registry.start()
    assert node.sums(good, NAMES) == SUMS
    assert "pull it again" in fails(node, bad)
    node.remove_all()
    node.assert_nothing_left()
