"""The client of containerd's API, against containerd 1.6 and 2.x themselves."""

from __future__ import annotations

import json
import random
import threading
import uuid
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import FormatError, HostError, LazyfsError, NotFoundError, SourceError
from lazyfs.image.descriptor import Descriptor
from lazyfs.image.digest import Digest
from lazyfs.image.oci import OCI_MANIFEST
from snapshotter.containerd import PIECE_BYTES, Containerd
from snapshotter.findimage import ImageFinder, ImageName
from snapshotter.lazyhook import LABEL_BOOTSTRAP
from snapshotter.model import Kind
from tests.containerdkit import VERSIONS, running_containerd
from tests.containerdkit import Containerd as Daemon
from tests.smallimage import make_image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.mount
LAYER = "application/vnd.oci.image.layer.v1.tar"


@pytest.fixture(scope="module", params=VERSIONS)
def daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running_containerd(tmp_path_factory.mktemp("api"), request.param) as containerd:
        yield containerd


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Containerd]:
    """In a namespace of the test's own, with a lease that keeps everything."""
    with Containerd(str(daemon.address), f"t{uuid.uuid4().hex[:8]}") as found:
        found.create_lease("test", {})
        yield found.with_lease("test")
        found.delete_lease("test")


def put(client: Containerd, data: bytes, **labels: str) -> Digest:
    digest = Digest.of(data)
    assert client.write_content(f"test-{digest}", digest, len(data), lambda: iter([data]), labels)
    return digest


def test_version_and_namespaces(daemon: Daemon, client: Containerd) -> None:
    assert client.version().lstrip("v").split(".")[0] == daemon.programs.version[0]
    put(client, b"something")
    assert client.namespace in client.namespaces()


@pytest.mark.parametrize("size", [1, 100_000, 5 * PIECE_BYTES + 7])
def test_content_comes_back_as_it_was_written(client: Containerd, size: int) -> None:
    data = random.Random(size).randbytes(size)
    digest = Digest.of(data)

    def pieces() -> Iterator[bytes]:
        yield from (data[start : start + PIECE_BYTES] for start in range(0, size, PIECE_BYTES))

    assert client.write_content("ref", digest, size, pieces, {"a": "1"})
    assert client.read_content(digest, size) == data
    client.label_content(digest, {"b/c.d": "2"})
    info = client.content_info(digest)
    assert info is not None
    assert (info.size, info.labels) == (size, {"a": "1", "b/c.d": "2"})
    assert [found.digest for found in client.contents()] == [digest]
    assert not client.write_content("ref", digest, size, pieces, {"a": "3"})
    with pytest.raises(FormatError, match="larger"):
        client.read_content(digest, size - 1)


def test_content_that_is_there_is_not_asked_for(client: Containerd) -> None:
    data = bytes(5 * PIECE_BYTES)
    digest = put(client, data[: PIECE_BYTES])
    asked = []

    def pieces() -> Iterator[bytes]:
        asked.append(1)
        yield data[: PIECE_BYTES]

    assert not client.write_content("again", digest, PIECE_BYTES, pieces, {})
    assert not asked


def test_wrong_bytes_are_refused(client: Containerd) -> None:
    digest = Digest.of(b"right")
    with pytest.raises(SourceError, match="unexpected commit digest"):
        client.write_content("ref", digest, 5, lambda: iter([b"wrong"]), {})
    with pytest.raises(SourceError):
        client.write_content("ref", digest, 5, lambda: iter([b"righ"]), {})
    assert client.content_info(digest) is None


def test_what_the_source_raises_comes_out(client: Containerd) -> None:
    def pieces() -> Iterator[bytes]:
        yield bytes(PIECE_BYTES)
        raise NotFoundError("the registry has lost it")

    size = 2 * PIECE_BYTES
    with pytest.raises(NotFoundError, match="has lost it"):
        client.write_content("ref", Digest.of(bytes(size)), size, pieces, {})
    assert client.content_info(Digest.of(bytes(size))) is None


def test_one_writer_at_a_time(client: Containerd) -> None:
    size = 2 * PIECE_BYTES
    digest = Digest.of(bytes(size))
    begun, go_on = threading.Event(), threading.Event()

    def pieces() -> Iterator[bytes]:
        yield bytes(PIECE_BYTES)
        begun.set()
        assert go_on.wait(20)
        yield bytes(PIECE_BYTES)

    first = threading.Thread(target=client.write_content, args=("ref", digest, size, pieces, {}))
    first.start()
    try:
        assert begun.wait(20)
        with pytest.raises(SourceError, match="locked") as caught:
            client.write_content("ref", digest, size, pieces, {})
        assert caught.value.transient
        assert client.write_offset("ref") in (0, PIECE_BYTES)
    finally:
        go_on.set()
        first.join()
    assert client.content_info(digest) is not None
    assert client.write_offset("ref") is None


def test_images(client: Containerd) -> None:
    first, second = put(client, b"{}"), put(client, b"{ }")
    assert client.image("a/b:1") is None
    assert client.put_image("a/b:1", Descriptor(OCI_MANIFEST, first, 2))
    assert not client.put_image("a/b:1", Descriptor(OCI_MANIFEST, second, 3))
    found = client.image("a/b:1")
    assert found is not None
    assert found.target == Descriptor(OCI_MANIFEST, second, 3)
    assert [image.name for image in client.images()] == ["a/b:1"]
    assert client.in_namespace("elsewhere").images() == []


def test_snapshots(client: Containerd) -> None:
    labels = {"containerd.io/snapshot/x": "1"}
    mounts = client.prepare("overlayfs", "key", "", labels)
    assert mounts is not None
    assert mounts[0].type == "bind"
    assert client.prepare("overlayfs", "key", "", labels) is None
    assert client.mounts("overlayfs", "key") == mounts
    assert client.commit("overlayfs", "name", "key", labels)
    found = client.snapshot("overlayfs", "name")
    assert found is not None
    assert (found.kind, found.parent, dict(found.labels)) == (Kind.COMMITTED, "", labels)
    above = client.prepare("overlayfs", "above", "name", {})
    assert above is not None
    assert above[0].type in ("overlay", "bind")
    assert {info.name for info in client.snapshots("overlayfs")} == {"name", "above"}
    client.remove_snapshot("overlayfs", "above")
    client.remove_snapshot("overlayfs", "above")
    assert client.snapshot("overlayfs", "above") is None


def test_leases_hold_what_was_made_with_them(daemon: Daemon, client: Containerd) -> None:
    digest = put(client, b"held")
    later = client.in_namespace(client.namespace)
    assert later.leases() == ["test"]
    later.delete_lease("test")
    later.delete_lease("test")
    later.create_lease("other", {})
    daemon.ctr("leases", "delete", "--sync", "other", namespace=client.namespace)   # collects garbage
    assert later.content_info(digest) is None
    later.create_lease("test", {})
    kept = put(client, b"kept")
    later.create_lease("third", {})
    later.with_lease("third").hold("content", kept.text)
    daemon.ctr("leases", "delete", "--sync", "test", namespace=client.namespace)
    assert later.content_info(kept) is not None
    later.delete_lease("third")


def test_the_image_of_a_bootstrap_is_found(client: Containerd) -> None:
    image = make_image([b"blob", b"bootstrap"])
    manifest = image.document.data.replace(
        b'"size":9}', b'"size":9,"annotations":{"%s":"1"}}' % LABEL_BOOTSTRAP.encode())
    assert manifest != image.document.data
    target = put(client, manifest)
    put(client, image.config)
    client.put_image("r/lazy:1", Descriptor(OCI_MANIFEST, target, len(manifest)))
    client.put_image("r/other:1", Descriptor(OCI_MANIFEST, put(client, image.document.data), 1))
    members = [{"mediaType": OCI_MANIFEST, "digest": str(digest), "size": len(manifest)}
               for digest in (target, Digest.of(b"another platform's"))]
    index = json.dumps({"schemaVersion": 2, "manifests": members}).encode()
    client.put_image("r/index:1", Descriptor("application/vnd.oci.image.index.v1+json", put(client, index), len(index)))
    client.put_image("r/nonsense:1", Descriptor(OCI_MANIFEST, put(client, b"\xff not JSON"), 1))
    client.put_image("r/gone:1", Descriptor(OCI_MANIFEST, Digest.of(b"nowhere"), 1))
    finder = ImageFinder()
    wanted = Digest.of(b"bootstrap")
    for _ in range(2):
        assert finder.find(client, wanted) == [ImageName(client.namespace, name) for name in ("r/index:1", "r/lazy:1")]
    assert finder.find(client, Digest.of(b"blob")) == []


def test_no_containerd(tmp_path: Path) -> None:
    with Containerd(str(tmp_path / "none.sock")) as client, pytest.raises(HostError, match="does not answer") as caught:
        client.version()
    assert "--containerd-address" in caught.value.hint


def test_no_such_snapshotter(client: Containerd) -> None:
    with pytest.raises(LazyfsError, match="nosuch"):
        client.prepare("nosuch", "key", "", {})
