"""Many of everything at once: images, layers, pulls, containers, removals; and then nothing is left."""

from __future__ import annotations

import random
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.lazyrig import Node, layer_digests, running_node, sums_of
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.mount, pytest.mark.slow]
IMAGES = 50
LAYERS = 126                     # with the bootstrap 127, which is as many as overlayfs and Docker take
AT_ONCE = 8


def make_and_run(node: Node, number: int) -> None:
    files = {"f": random.Random(number).randbytes(50_000 + number)}
    image = node.push(f"app{number}", files)
    node.pull(image)
    assert node.sums(image, ["f"]) == sums_of(files)


def test_fifty_images_at_once_and_nothing_is_left_of_them(tmp_path: Path) -> None:
    with running_node(tmp_path, "2.x") as node:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda number: make_and_run(node, number), range(IMAGES)))
            assert len(node.lazy_mounts()) == IMAGES
            list(pool.map(lambda image: node.containerd.ctr("images", "remove", "--sync", image), node.images))
        node.assert_nothing_left()
        node.snapshotter.end(signal.SIGTERM)
        node.daemon.stop()
        assert [entry for entry in node.machine.mounts() if entry.fs_type in {"erofs", "fuse"}] == []


def test_a_hundred_pulls_runs_and_removals_in_parallel(tmp_path: Path) -> None:
    """Twenty images in five namespaces: they come and go while others with the same bootstrap are being used."""
    files = [{"f": random.Random(number).randbytes(50_000 + number)} for number in range(20)]
    with running_node(tmp_path, "2.x") as node:
        images = [node.push(f"app{number}", one) for number, one in enumerate(files)]

        def come_and_go(number: int) -> None:
            which, namespace = number // 5, f"n{number % 5}"
            node.pull(images[which], namespace=namespace)
            assert node.sums(images[which], ["f"], namespace=namespace) == sums_of(files[which])
            node.containerd.ctr("images", "remove", "--sync", images[which], namespace=namespace)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(come_and_go, range(100)))
        for namespace in node.containerd.namespaces():
            node.collect(namespace=namespace)
        node.assert_nothing_left()


def test_an_image_of_as_many_layers_as_there_may_be(tmp_path: Path) -> None:
    layers = [TarBuilder().file(f"l{number}", b"%d\n" % number).build() for number in range(LAYERS - 1)]
    with running_node(tmp_path, "2.x") as node:
        image = node.push_layers("deep", layers)
        blobs, _ = layer_digests(image)
        assert len(blobs) == LAYERS
        node.pull(image)
        names = [f"/l{number}" for number in range(LAYERS - 1)]
        output = node.containerd.run(image, "/bin/busybox", "cat", *names)
        assert output == "".join(f"{number}\n" for number in range(LAYERS - 1))
        node.remove_all()
        node.assert_nothing_left()
