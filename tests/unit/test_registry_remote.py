"""docker://: a real registry, plain and TLS, with and without passwords."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import threading
import time
import urllib.request
from typing import TYPE_CHECKING

import msgspec
import pytest
import trustme

from lazyfs.errors import AuthError, FormatError, IntegrityError, NotFoundError, SourceError, TargetError
from lazyfs.image.digest import Digest
from lazyfs.registry import RegistryOptions, open_destination, open_source
from lazyfs.registry.client import RegistryClient
from lazyfs.registry.documents import OCI_INDEX
from lazyfs.registry.place import Document
from tests.faultproxy import FaultProxy
from tests.registrykit import Registry, running_registry
from tests.smallimage import SmallImage, make_image, write_image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lazyfs.registry.place import ByteStream

LAYERS = [b"first layer " * 100_000, b"second", b""]
OPTIONS = RegistryOptions(request_deadline_s=20.0, retry_count=2)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


def push(text: str, layers: list[bytes], options: RegistryOptions = OPTIONS) -> SmallImage:
    destination = open_destination(text, options)
    try:
        return write_image(destination, layers)
    finally:
        destination.close()


def check(text: str, image: SmallImage, options: RegistryOptions = OPTIONS) -> None:
    source = open_source(text, options)
    try:
        assert source.root() == image.document
        assert source.document(image.document.digest) == image.document
        assert source.read_blob(Digest.of(image.config), len(image.config)) == image.config
        for layer in image.layers:
            digest = Digest.of(layer)
            with source.open_blob(digest, len(layer)) as stream:
                assert b"".join(iter(lambda: stream.read(100_000), b"")) == layer
            size = min(len(layer) // 2, 5000)
            with source.read_range(digest, len(layer) // 3, size, time.monotonic() + 5) as stream:
                assert b"".join(iter(lambda: stream.read(999), b"")) == layer[len(layer) // 3 :][:size]
            with source.read_range(digest, len(layer) // 3, size, time.monotonic() + 5) as stream:
                assert read_into(stream, 999) == layer[len(layer) // 3 :][:size]
    finally:
        source.close()


def read_into(stream: ByteStream, piece_size: int) -> bytes:
    """To its end, by readinto()."""
    view = memoryview(bytearray(piece_size))
    return b"".join(bytes(view[:count]) for count in iter(lambda: stream.readinto(view), 0))


def test_what_is_pushed_can_be_pulled(registry: Registry) -> None:
    text = f"docker://{registry.host}/a/b:v1"
    image = push(text, LAYERS)
    check(text, image)
    check(f"{registry.host}/a/b@{image.document.digest}", image)
    assert push(text, LAYERS) == image


def test_nothing_is_visible_before_commit(registry: Registry) -> None:
    text = f"docker://{registry.host}/uncommitted:v1"
    destination = open_destination(text, OPTIONS)
    image = write_image(destination, LAYERS, is_committed=False)
    staging = destination.staging_dir
    assert staging.stat().st_mode & 0o7777 == 0o700
    assert destination.reader().read_blob(image.digest, len(image.layer)) == image.layer
    with pytest.raises(NotFoundError):
        open_source(text, OPTIONS).root()
    destination.put_document(image.document)
    assert destination.reader().document(image.document.digest) == image.document
    with pytest.raises(NotFoundError):
        open_source(text, OPTIONS).root()
    destination.close()
    assert not staging.exists()


def test_an_index_and_its_members(registry: Registry) -> None:
    destination = open_destination(f"{registry.host}/multi:v1", OPTIONS)
    image = write_image(destination, LAYERS, is_committed=False)
    destination.put_document(image.document)
    data = msgspec.json.encode({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
        {"mediaType": image.document.media_type, "digest": str(image.document.digest),
         "size": len(image.document.data), "platform": {"os": "linux", "architecture": "amd64"}}]})
    index = Document(data, OCI_INDEX, Digest.of(data))
    destination.commit(index)
    destination.close()
    source = open_source(f"{registry.host}/multi:v1", OPTIONS)
    assert source.root() == index
    assert source.document(image.document.digest) == image.document
    source.close()


def test_documents_are_found_own_tag_first(registry: Registry) -> None:
    images = {tag: push(f"{registry.host}/tags:{tag}", [tag.encode()]) for tag in ("a", "b", "c")}
    destination = open_destination(f"{registry.host}/tags:b", OPTIONS)
    assert list(destination.documents()) == [images[tag].document for tag in ("b", "c", "a")]
    destination.close()
    empty = open_destination(f"{registry.host}/no/such/repository:b", OPTIONS)
    assert list(empty.documents()) == []
    empty.close()


def test_pages_of_tags_are_followed(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    tags = [f"t{number:02}" for number in range(12)]
    for tag in tags:
        push(f"{registry.host}/pages:{tag}", [b"same"])
    monkeypatch.setattr("lazyfs.registry.client.TAG_PAGE_COUNT", 5)
    client = RegistryClient(registry.host, "pages", OPTIONS)
    assert sorted(client.tags(100, time.monotonic() + 10)) == tags
    assert len(client.tags(7, time.monotonic() + 10)) == 7
    client.close()


def test_mount_from_a_sister_repository(registry: Registry) -> None:
    image = push(f"{registry.host}/mount/from:1", [os.urandom(1000)])
    with FaultProxy(registry.host) as proxy:
        destination = open_destination(f"{proxy.host}/mount/to:1", OPTIONS)
        size = len(image.layer)
        assert not destination.has_blob(image.digest, size)
        assert not destination.mount_blob(Digest.of(b"absent"), 6, f"docker://{proxy.host}/mount/from")
        assert proxy.seen("DELETE", "uploads"), "the upload opened instead is closed"
        assert not destination.mount_blob(image.digest, size, "docker://elsewhere/mount/from")
        assert not destination.mount_blob(image.digest, size, "oci:/some/dir")
        assert destination.mount_blob(image.digest, size, f"docker://{proxy.host}/mount/from")
        assert destination.has_blob(image.digest, size)
        assert not destination.has_blob(image.digest, size + 1)
        assert not proxy.seen("PUT") + proxy.seen("PATCH")
        destination.close()


def test_blobs_that_are_there_are_not_sent_again(registry: Registry) -> None:
    image = push(f"{registry.host}/once:1", LAYERS)
    with FaultProxy(registry.host) as proxy:
        assert push(f"{proxy.host}/once:2", LAYERS) == image
        assert not proxy.seen("POST")
        assert [seen.path for seen in proxy.seen("PUT")] == ["/v2/once/manifests/2"]


def test_a_wrong_size_is_refused_before_anything_is_sent(registry: Registry) -> None:
    destination = open_destination(f"{registry.host}/size:1", OPTIONS)
    path = destination.staging_dir / "blob"
    path.write_bytes(b"12")
    with pytest.raises(TargetError):
        destination.put_blob(path, Digest.of(b"123"), 3)
    path.write_bytes(b"124")
    with pytest.raises(SourceError):
        destination.put_blob(path, Digest.of(b"123"), 3)
    assert not destination.has_blob(Digest.of(b"123"), 3)
    destination.close()


def test_what_is_not_there(registry: Registry) -> None:
    image = push(f"{registry.host}/here:1", LAYERS)
    for text in ("here:2", "nowhere:1", f"here@{Digest.of(b'x')}"):
        source = open_source(f"{registry.host}/{text}", OPTIONS)
        with pytest.raises(NotFoundError):
            source.root()
        source.close()
    source = open_source(f"{registry.host}/here:1", OPTIONS)
    absent = Digest.of(b"absent")
    with pytest.raises(NotFoundError):
        source.open_blob(absent, 6)
    with pytest.raises(NotFoundError):
        source.read_range(absent, 0, 6, time.monotonic() + 5)
    with pytest.raises(SourceError) as caught:
        source.read_range(image.digest, len(image.layer) + 5, 10, time.monotonic() + 5)
    assert not caught.value.transient
    with pytest.raises(SourceError):  # the registry would give what it has, which is less
        source.read_range(image.digest, len(image.layer) - 5, 10, time.monotonic() + 5)
    with pytest.raises(SourceError):
        source.read_blob(image.digest, len(image.layer) - 1)
    source.close()


def test_damage_in_the_registry_is_found(registry: Registry) -> None:
    image = push(f"{registry.host}/damaged:1", [b"to be damaged"])
    for data in (image.config, image.document.data):
        path = registry.blob_path(str(Digest.of(data)))
        path.write_bytes(data.replace(b"amd64", b"arm64").replace(b"oci", b"ico"))
    source = open_source(f"{registry.host}/damaged:1", OPTIONS)
    with pytest.raises(IntegrityError):
        source.read_blob(Digest.of(image.config), len(image.config))
    with pytest.raises((IntegrityError, FormatError, SourceError)):
        source.document(image.document.digest)
    source.close()


def test_connections_are_used_again(registry: Registry) -> None:
    image = push(f"{registry.host}/reuse:1", LAYERS)
    source = open_source(f"{registry.host}/reuse:1", OPTIONS)
    for _ in range(20):
        with source.read_range(image.digest, 5, 100, time.monotonic() + 5) as stream:
            assert len(stream.read(100)) == 100
        source.document(image.document.digest)
    pool = source._client.transport._pools[None]  # type: ignore[attr-defined]
    made = [pool.pools.get(key).num_connections for key in pool.pools.keys()]  # noqa: SIM118 - not a dict
    assert made == [1]
    source.close()


def test_many_threads_share_one_source(registry: Registry) -> None:
    image = push(f"{registry.host}/threads:1", LAYERS)
    source = open_source(f"{registry.host}/threads:1", OPTIONS)
    errors: list[BaseException] = []

    def one(seed: int) -> None:
        try:
            for step in range(20):
                offset = (seed * 7919 + step * 104_729) % (len(image.layer) - 3000)
                with source.read_range(image.digest, offset, 3000, time.monotonic() + 10) as stream:
                    assert b"".join(iter(lambda: stream.read(1024), b"")) == image.layer[offset : offset + 3000]
        except BaseException as error:  # noqa: BLE001 - handed to the test
            errors.append(error)

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    source.close()
    assert not errors


def test_closing_early_is_fine(registry: Registry) -> None:
    image = push(f"{registry.host}/early:1", LAYERS)
    source = open_source(f"{registry.host}/early:1", OPTIONS)
    for _ in range(3):
        with source.open_blob(image.digest, len(image.layer)) as stream:
            assert stream.read(10) == image.layer[:10]
        with source.read_range(image.digest, 0, len(image.layer), time.monotonic() + 5) as stream:
            stream.read(1)
    assert source.root() == image.document
    source.close()
    source.close()


def test_passwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    with running_registry(tmp_path, username="kim", password="hunter2") as registry:
        text = f"{registry.host}/private:1"
        right = RegistryOptions(username="kim", password="hunter2")
        image = push(text, LAYERS, right)
        check(text, image, right)
        for options in (OPTIONS, RegistryOptions(username="kim", password="wr0ng"),
                        RegistryOptions(username="lee", password="hunter2")):
            source = open_source(text, options)
            with pytest.raises(AuthError) as caught:
                source.root()
            assert "docker login" in caught.value.hint
            assert "wr0ng" not in str(caught.value)
            with pytest.raises(AuthError):
                source.read_range(image.digest, 0, 1, time.monotonic() + 5)
            source.close()
            destination = open_destination(text, options)
            with pytest.raises(AuthError):
                destination.put_bytes(b"x", Digest.of(b"x"))
            assert list(destination.documents()) == []
            destination.close()
        (tmp_path / ".docker").mkdir()
        (tmp_path / ".docker/config.json").write_text(json.dumps(
            {"auths": {registry.host: {"username": "kim", "password": "hunter2"}}}))
        check(text, image, OPTIONS)


def ranges_use_one_connection(text: str, options: RegistryOptions) -> None:
    """Ranges of many TLS records, and of a few bytes, read straight into a buffer: exact, and nothing dialled anew."""
    data = random.Random(7).randbytes(700_000)
    push(text, [data], options)
    source = open_source(text, options)
    try:
        for offset, size, piece in ((0, 700_000, 1 << 20), (1, 699_999, 100_000), (5, 3, 2), (16_383, 80_000, 70_000)):
            with source.read_range(Digest.of(data), offset, size, time.monotonic() + 10) as stream:
                assert read_into(stream, piece) == data[offset : offset + size]
        pools = source._client._own.transport._pools[None].pools
        assert {pools.get(key).num_connections for key in pools.keys()} == {1}    # noqa: SIM118 - no mapping
    finally:
        source.close()


def test_ranges_use_one_connection(registry: Registry) -> None:
    ranges_use_one_connection(f"docker://{registry.host}/ranges:v1", OPTIONS)


def test_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    leaf = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    leaf.private_key_and_cert_chain_pem.write_to_path(tmp_path / "leaf.pem")
    pem = tmp_path / "leaf.pem"
    with running_registry(tmp_path, tls_certificate=pem, tls_key=pem) as registry:
        text = f"{registry.host}/secure:1"
        trusting = RegistryOptions(ca_file=tmp_path / "ca.pem")
        image = push(text, LAYERS, trusting)
        check(text, image, trusting)
        check(text, image, RegistryOptions(insecure=True))
        ranges_use_one_connection(text, trusting)
        source = open_source(text, OPTIONS)
        with pytest.raises(SourceError, match="certificate is not trusted") as caught:
            source.root()
        source.close()
        assert not caught.value.transient
        assert "--ca-file" in caught.value.hint


def test_a_registry_that_is_down(tmp_path: Path) -> None:
    options = RegistryOptions(request_deadline_s=1.0)
    with running_registry(tmp_path) as registry:
        image = push(f"{registry.host}/down:1", LAYERS)
        registry.stop()
        source = open_source(f"{registry.host}/down:1", options)
        started = time.monotonic()
        with pytest.raises(SourceError, match=f"{registry.host}.*refused") as caught:
            source.root()
        assert time.monotonic() - started < 3
        assert caught.value.transient
        with pytest.raises(SourceError):
            source.read_range(image.digest, 0, 10, time.monotonic() + 1)
        registry.start()
        assert source.root() == image.document
        source.close()


def test_names_that_do_not_exist() -> None:
    source = open_source("docker://no-such-host.invalid/a:1", RegistryOptions(request_deadline_s=2.0))
    with pytest.raises(SourceError, match="cannot find the host"):
        source.root()
    source.close()


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
def test_skopeo_pulls_what_we_push_and_the_other_way(registry: Registry, tmp_path: Path) -> None:
    image = push(f"{registry.host}/skopeo:1", LAYERS[:2])
    subprocess.run(["skopeo", "copy", "-q", "--insecure-policy", "--preserve-digests", "--src-tls-verify=false",
                    f"docker://{registry.host}/skopeo:1", f"oci:{tmp_path}/d:1"], check=True)
    check(f"oci:{tmp_path}/d:1", image)
    subprocess.run(["skopeo", "copy", "-q", "--insecure-policy", "--preserve-digests", "--dest-tls-verify=false",
                    f"oci:{tmp_path}/d:1", f"docker://{registry.host}/skopeo:2"], check=True)
    check(f"docker://{registry.host}/skopeo:2", image)


def test_the_kit_serves_http(registry: Registry) -> None:
    """The registry's own answer, seen without our client."""
    with urllib.request.urlopen(f"http://{registry.host}/v2/", timeout=5) as answer:
        assert answer.status == 200
    assert make_image([b"x"]).document.digest == make_image([b"x"]).document.digest
