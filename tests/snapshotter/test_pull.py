"""`lazyfs pull` of ordinary images, with containerd 1.6 and 2.x: it leaves what containerd's own client leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lazyfs.image.digest import Digest
from lazyfs.registry import RegistryOptions, open_source
from snapshotter.containerd import Containerd
from snapshotter.pullimage import chain, resolve
from snapshotter.unpack import held_layers
from tests.containerdkit import VERSIONS, running_containerd
from tests.containerdkit import Containerd as Daemon
from tests.convertkit import Layout
from tests.mountkit import LAZYFS
from tests.registrykit import Registry, running_registry
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.mount
BUSYBOX = Path("/usr/bin/busybox")
PREFIX = "containerd.io/snapshot/"


@pytest.fixture(scope="module", params=VERSIONS)
def daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running_containerd(tmp_path_factory.mktemp("pull"), request.param) as containerd:
        yield containerd


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture
def namespace(daemon: Daemon) -> Iterator[str]:
    """Of the test's own; empty again afterwards."""
    name = f"t{uuid.uuid4().hex[:9]}"
    yield name
    remove_all(daemon, name)


def remove_all(daemon: Daemon, namespace: str) -> None:
    """Images and leases; then what containerd has left after collecting garbage: nothing."""
    names = daemon.ctr("images", "list", "--quiet", namespace=namespace).split()
    if names:
        daemon.ctr("images", "remove", *names, namespace=namespace)
    daemon.ctr("leases", "create", "--id", "last", namespace=namespace)
    for lease in daemon.ctr("leases", "list", "--quiet", namespace=namespace).split():
        daemon.ctr("leases", "delete", "--sync", lease, namespace=namespace)      # collects garbage
    with Containerd(str(daemon.address), namespace) as client:
        assert client.contents() == []
        assert client.snapshots("overlayfs") == []


def push(layout: Layout, tag: str, registry: Registry, name: str) -> str:
    """An image of a layout into the registry, all platforms; its reference."""
    subprocess.run(["skopeo", "copy", "--quiet", "--all", "--dest-tls-verify=false", layout.reference(tag),
                    f"docker://{registry.host}/{name}"], check=True)
    return f"{registry.host}/{name}"


def tars(count: int, *, size: int = 1000, seed: str = "x") -> list[bytes]:
    first = TarBuilder().directory("bin").file("bin/busybox", BUSYBOX.read_bytes(), mode=0o755)
    layers = [first.symlink("bin/sh", "busybox").build()]
    for number in range(1, count):
        content = os.urandom(size) if size > 10_000 else f"{seed}{number}".encode()
        layers.append(TarBuilder().file(f"file{number}", content).whiteout(f"file{number - 1}").build())
    return layers


def lazyfs_pull(daemon: Daemon, namespace: str, reference: str, *words: str, code: int = 0) -> dict[str, Any]:
    done = subprocess.run(
        [*LAZYFS, "pull", "--json", "--insecure", "--snapshotter", "overlayfs", "--namespace", namespace,
         "--containerd-address", daemon.address, *words, reference],
        capture_output=True, text=True, check=False, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout) if code == 0 else {"error": done.stderr}


def state(daemon: Daemon, namespace: str) -> dict[str, Any]:
    """All that containerd knows in a namespace, but for what CRI's clients add and ctr does not."""
    with Containerd(str(daemon.address), namespace) as client:
        snapshots = client.snapshots("overlayfs")
        return {
            "images": {image.name: (image.target.digest, image.target.media_type, image.target.size, image.labels)
                       for image in client.images()},
            "contents": {info.digest: (info.size, info.labels) for info in client.contents()},
            "snapshots": {info.name: (info.parent, info.kind, {
                key: value for key, value in info.labels.items() if not key.startswith(PREFIX + "cri.")})
                for info in snapshots},
            "leases": client.leases(),
        }


@pytest.mark.parametrize("kind", ["gzip", "zstd", "index"])
def test_it_leaves_what_ctr_leaves(
    daemon: Daemon, registry: Registry, namespace: str, tmp_path: Path, kind: str,
) -> None:
    layout = Layout(tmp_path / "in")
    if kind == "index":
        members = [{**layout.add_image("", tars(3, seed=one), architecture=one),
                    "platform": {"os": "linux", "architecture": one}} for one in ("arm64", "amd64")]
        attestation = {**members[0], "platform": {"os": "unknown", "architecture": "unknown"}}
        layout.index("1", [members[0], attestation, members[1]])
    else:
        layout.add_image("1", tars(3), compression=kind)
    reference = push(layout, "1", registry, f"same/{kind}:1")
    report = lazyfs_pull(daemon, namespace, reference)
    assert (report["name"], report["is_lazy"], report["unpacked_count"]) == (reference, False, 3)
    ours = state(daemon, namespace)
    assert ours["leases"] == []
    output = daemon.run(reference, "/bin/sh", "-c", "echo /file*", snapshotter="overlayfs", namespace=namespace)
    assert output == "/file2\n"
    ways = [["--skip-metadata"], ["--skip-metadata", "--local"]] if daemon.programs.is_2 else [[]]
    for number, way in enumerate(ways):
        other = f"{namespace}-ctr{number}"
        daemon.ctr("images", "pull", *way, "--plain-http", "--snapshotter", "overlayfs", reference, namespace=other)
        theirs = state(daemon, other)
        assert ours["images"] == theirs["images"]
        assert ours["contents"] == theirs["contents"]
        if way == ["--skip-metadata"] and daemon.programs.is_2:      # containerd's own unpacker, as CRI's
            assert ours["snapshots"] == theirs["snapshots"]
        else:                                                        # ctr's, which sends no labels
            assert {name: found[:2] for name, found in ours["snapshots"].items()} == {
                name: found[:2] for name, found in theirs["snapshots"].items()}
        remove_all(daemon, other)


def test_content_of_another_namespace_is_not_fetched_again(
    daemon: Daemon, registry: Registry, namespace: str, tmp_path: Path,
) -> None:
    layout = Layout(tmp_path / "in")
    layout.add_image("1", [*tars(2), TarBuilder().file("large", os.urandom(3 << 20)).build()])
    reference = push(layout, "1", registry, "shared:1")
    first = f"{namespace}-first"
    assert lazyfs_pull(daemon, first, reference)["fetched_bytes"] > 3 << 20
    assert lazyfs_pull(daemon, namespace, reference)["fetched_bytes"] < 1 << 20
    assert state(daemon, first) == state(daemon, namespace)
    remove_all(daemon, first)


def test_again_and_by_another_name(daemon: Daemon, registry: Registry, namespace: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "in")
    layout.add_image("1", tars(4))
    reference = push(layout, "1", registry, "again/one:1")
    lazyfs_pull(daemon, namespace, reference)
    before = state(daemon, namespace)
    report = lazyfs_pull(daemon, namespace, f"{reference}@{next(iter(before['images'].values()))[0]}")
    assert report["unpacked_count"] == 0
    assert lazyfs_pull(daemon, namespace, reference)["unpacked_count"] == 0
    after = state(daemon, namespace)
    assert (after["contents"], after["snapshots"]) == (before["contents"], before["snapshots"])
    assert len(after["images"]) == 2
    second = push(layout, "1", registry, "again/another:1")
    lazyfs_pull(daemon, namespace, second)
    sources = [labels["containerd.io/distribution.source.127.0.0.1"]
               for _, labels in state(daemon, namespace)["contents"].values()]
    assert sources.count("again/another,again/one") == 2      # manifest and config; layers that are there are not asked


def test_snapshots_that_are_there_are_held_by_the_lease(
    daemon: Daemon, registry: Registry, namespace: str, tmp_path: Path,
) -> None:
    layout = Layout(tmp_path / "in")
    layout.add_image("1", tars(3))
    reference = push(layout, "1", registry, "held:1")
    lazyfs_pull(daemon, namespace, reference)
    with contextlib.closing(open_source(reference, RegistryOptions(insecure=True))) as source:
        image = resolve(source, None, reference, "overlayfs")
    with Containerd(str(daemon.address), namespace) as client:
        client.create_lease("held", {})
        assert held_layers(client.with_lease("held"), "overlayfs", image) == 3
        daemon.ctr("images", "remove", "--sync", reference, namespace=namespace)
        assert len(client.snapshots("overlayfs")) == 3
        daemon.ctr("leases", "delete", "--sync", "held", namespace=namespace)
        assert held_layers(client, "overlayfs", image) == 0


def test_a_tag_that_has_moved(daemon: Daemon, registry: Registry, namespace: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "in")
    layout.add_image("1", tars(2, seed="old"))
    layout.add_image("2", tars(2, seed="new"))
    reference = push(layout, "1", registry, "moved:1")
    first = lazyfs_pull(daemon, namespace, reference)
    assert push(layout, "2", registry, "moved:1") == reference
    second = lazyfs_pull(daemon, namespace, reference)
    assert first["digest"] != second["digest"]
    assert second["unpacked_count"] == 1      # the layer below is the same
    output = daemon.run(reference, "/bin/busybox", "cat", "/file1", snapshotter="overlayfs", namespace=namespace)
    assert output == "new1"


def test_another_platform(daemon: Daemon, registry: Registry, namespace: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "in")
    members = [{**layout.add_image("", tars(2, seed=one), architecture=one),
                "platform": {"os": "linux", "architecture": one}} for one in ("arm64", "amd64")]
    layout.index("1", members)
    reference = push(layout, "1", registry, "platforms:1")
    native = lazyfs_pull(daemon, namespace, reference)
    other = lazyfs_pull(daemon, namespace, reference, "--platform", "linux/arm64")
    assert (native["digest"], native["chain_id"] != other["chain_id"]) == (other["digest"], True)
    error = lazyfs_pull(daemon, namespace, reference, "--platform", "linux/s390x", code=21)["error"]
    assert "linux/amd64, linux/arm64" in error


def test_many_pulls_at_once(daemon: Daemon, registry: Registry, namespace: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "in")
    layout.add_image("1", tars(3, size=2_000_000))
    reference = push(layout, "1", registry, "at-once:1")
    words = [*LAZYFS, "pull", "--quiet", "--insecure", "--snapshotter", "overlayfs", "--namespace", namespace,
             "--containerd-address", str(daemon.address), reference]
    pulls = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    results = [(pull.communicate(timeout=120)[1], pull.returncode) for pull in pulls]
    assert results == [("", 0)] * 4
    assert state(daemon, namespace)["leases"] == []
    assert len(state(daemon, namespace)["snapshots"]) == 3


def test_killed_at_any_moment(daemon: Daemon, registry: Registry, namespace: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "in")
    layout.add_image("1", tars(3, size=4_000_000))
    reference = push(layout, "1", registry, "killed:1")
    words = [*LAZYFS, "pull", "--quiet", "--insecure", "--snapshotter", "overlayfs", "--namespace", namespace,
             "--containerd-address", str(daemon.address), reference]
    started = time.monotonic()
    lazyfs_pull(daemon, namespace, reference)
    whole_s = time.monotonic() - started
    for part in range(1, 8):
        remove_all(daemon, namespace)
        with subprocess.Popen(words) as pull:
            try:
                pull.wait(whole_s * part / 8)
            except subprocess.TimeoutExpired:
                pull.send_signal(signal.SIGKILL)
        found = state(daemon, namespace)
        if found["images"]:                    # then all of it is there
            daemon.run(reference, "/bin/sh", "-c", "true", snapshotter="overlayfs", namespace=namespace)
    assert lazyfs_pull(daemon, namespace, reference)["layer_count"] == 3
    daemon.run(reference, "/bin/sh", "-c", "true", snapshotter="overlayfs", namespace=namespace)


def test_wrong_bytes_leave_nothing(daemon: Daemon, registry: Registry, namespace: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "in")
    layout.add_image("1", tars(3))
    reference = push(layout, "1", registry, "damaged:1")
    manifest = json.loads(layout.blobs.joinpath(json.loads((layout.path / "index.json").read_text())["manifests"][0][
        "digest"].removeprefix("sha256:")).read_text())
    path = registry.blob_path(manifest["layers"][1]["digest"])
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    error = lazyfs_pull(daemon, namespace, reference, code=12)["error"]
    assert manifest["layers"][1]["digest"][:19] in error
    found = state(daemon, namespace)
    assert (found["images"], found["leases"]) == ({}, [])
    path.write_bytes(data)
    lazyfs_pull(daemon, namespace, reference)


def test_a_wrong_diff_id_leaves_nothing(daemon: Daemon, registry: Registry, namespace: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "in")
    layout.add_image("1", tars(1), diff_ids=["sha256:" + "0" * 64])
    reference = push(layout, "1", registry, "wrong-diff-id:1")
    assert "diff-id" in lazyfs_pull(daemon, namespace, reference, code=12)["error"]
    found = state(daemon, namespace)
    assert (found["images"], found["leases"], found["snapshots"]) == ({}, [], {})


def test_what_is_not_there_is_said(daemon: Daemon, registry: Registry, namespace: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "in")
    layout.add_image("1", tars(1))
    reference = push(layout, "1", registry, "there:1")
    assert "not" in lazyfs_pull(daemon, namespace, f"{registry.host}/there:none", code=21)["error"]
    assert "nosuch" in lazyfs_pull(daemon, namespace, reference, "--snapshotter", "nosuch", code=40)["error"]
    nobody = tmp_path / "none.sock"
    error = lazyfs_pull(daemon, namespace, reference, "--containerd-address", str(nobody), code=40)["error"]
    assert f"containerd does not answer at {nobody}" in error
    assert "registries only" in lazyfs_pull(daemon, namespace, layout.reference("1"), code=2)["error"]
    assert state(daemon, namespace)["leases"] == []


def test_names_of_stacks() -> None:
    # OCI image-spec v1.1 config.md: ChainID(a) = a, ChainID(a|b) = sha256(ChainID(a) + " " + b)
    first, second = Digest("sha256:" + "1" * 64), Digest("sha256:" + "2" * 64)
    assert list(chain([first, second])) == [first.text, Digest.of(f"{first} {second}".encode()).text]
