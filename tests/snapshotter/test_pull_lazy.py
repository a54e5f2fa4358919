"""`lazyfs pull` of lazy images: a whole node, containerd 1.6 and 2.x; blobs stay in the registry, whatever happens."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from snapshotter.containerd import Containerd
from tests.containerdkit import VERSIONS
from tests.lazyrig import Node, copy_image, layer_digests, running_node, sums_of
from tests.mountkit import LAZYFS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.mount
FILES = {f"f{number}": random.Random(number).randbytes(300_000 + number) for number in range(4)}
REF = "containerd.io/snapshot/cri.image-ref"


@pytest.fixture(params=VERSIONS)
def node(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Node]:
    with running_node(tmp_path, request.param) as running:
        yield running


def words(node: Node, image: str, *more: str) -> list[str]:
    return [*LAZYFS, "pull", "--json", "--insecure", "--containerd-address", str(node.containerd.address), *more, image]


def pull(node: Node, image: str, *more: str, code: int = 0) -> dict[str, Any]:
    done = subprocess.run(words(node, image, *more), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout) if code == 0 else {"error": done.stderr}


def state(node: Node, namespace: str) -> dict[str, Any]:
    with Containerd(str(node.containerd.address), namespace) as client:
        return {
            "images": {image.name: image.target.digest for image in client.images()},
            "contents": {info.digest: (info.size, info.labels) for info in client.contents()},
            "snapshots": {info.name: (info.parent, info.kind) for info in client.snapshots("lazyfs")},
            "refs": {info.labels.get(REF) for info in client.snapshots("lazyfs")},
            "leases": client.leases(),
        }


def test_documents_and_bootstrap_are_all_that_comes(node: Node) -> None:
    image = node.push("app", FILES)
    report = pull(node, image)
    assert (report["is_lazy"], report["layer_count"], report["unpacked_count"]) == (True, 3, 1)
    assert report["fetched_bytes"] < 20_000 < sum(map(len, FILES.values())) < report["image_bytes"]
    found = state(node, "default")
    blobs, bootstrap = layer_digests(image)
    assert bootstrap in found["contents"]
    assert not set(found["contents"]) & set(blobs)
    assert (len(found["contents"]), len(found["snapshots"]), found["leases"]) == (3, 3, [])
    assert found["refs"] == {image}
    assert node.sums(image, sorted(FILES)) == sums_of(FILES)
    assert pull(node, image)["unpacked_count"] == 0
    if node.containerd.programs.is_2:        # containerd's own lazy pull
        node.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "lazyfs", image, namespace="other")
        other = state(node, "other")
        assert {**other, "refs": None} == {**found, "refs": None}
    node.remove_all(*node.containerd.namespaces())
    node.assert_nothing_left()


def test_a_copy_under_another_name_is_the_same_to_containerd(node: Node) -> None:
    image = node.push("app", FILES)
    copy = f"{node.registry.host}/elsewhere/app:2"
    copy_image(f"docker://{image}", f"docker://{copy}")
    pull(node, image)
    report = pull(node, copy)
    assert report["unpacked_count"] == 0
    assert len(state(node, "default")["snapshots"]) == 3
    node.containerd.ctr("images", "remove", "--sync", image)
    assert node.sums(copy, sorted(FILES)) == sums_of(FILES)
    node.remove_all()
    node.assert_nothing_left()


def test_another_snapshotter_is_refused_in_words(node: Node) -> None:
    image = node.push("app", FILES)
    error = pull(node, image, "--snapshotter", "overlayfs", code=40)["error"]
    assert "overlayfs does not serve lazy images" in error
    found = state(node, "default")
    assert (found["images"], found["leases"]) == ({}, [])
    node.snapshotter.end(signal.SIGTERM)
    error = pull(node, image, code=40)["error"]
    assert "is the snapshotter running?" in error
    assert state_of_images(node) == {}
    node.snapshotter.start()
    pull(node, image)          # though containerd dials it again only after seconds


def state_of_images(node: Node) -> dict[str, Any]:
    with Containerd(str(node.containerd.address)) as client:
        return {image.name: image.target for image in client.images()}


def test_many_at_once_in_two_namespaces(node: Node) -> None:
    image = node.push("app", FILES)
    pulls = [subprocess.Popen(words(node, image, "--namespace", f"n{number % 2}"), text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) for number in range(6)]
    results = [(pulled.communicate(timeout=120)[1], pulled.returncode) for pulled in pulls]
    assert results == [("", 0)] * 6
    for namespace in ("n0", "n1"):
        assert node.sums(image, sorted(FILES), namespace=namespace) == sums_of(FILES)
    node.remove_all("n0", "n1")
    node.assert_nothing_left()


def test_killed_at_any_moment(node: Node) -> None:
    image = node.push("app", FILES)
    started = time.monotonic()
    pull(node, image)
    whole_s = time.monotonic() - started
    for part in range(2, 10):
        node.remove_all()
        with subprocess.Popen(words(node, image), stdout=subprocess.DEVNULL) as pulling:
            try:
                pulling.wait(whole_s * part / 10)
            except subprocess.TimeoutExpired:
                pulling.kill()
        if state_of_images(node):             # then all of it is there
            assert node.sums(image, ["f0"]) == sums_of({"f0": FILES["f0"]})
    pull(node, image)
    assert node.sums(image, sorted(FILES)) == sums_of(FILES)
    for lease in node.containerd.ctr("leases", "list", "--quiet").split():
        node.containerd.ctr("leases", "delete", lease)      # as if a day had passed
    node.remove_all()
    node.assert_nothing_left()
