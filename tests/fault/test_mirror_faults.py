"""The mirror with registries that fail, lie or are not there; with many clients at once; killed in the middle."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import secrets
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from lazyfs.image.digest import Digest
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.mirrorkit import OCI_MANIFEST, PushedImage, RunningMirror, ask, descriptor, image_of, push, running_mirror
from tests.registrykit import Registry, running_registry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture
def proxy(registry: Registry) -> Iterator[FaultProxy]:
    """The registry, as the mirror sees it."""
    with FaultProxy(registry.host) as found:
        yield found


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMirror]:
    """One for all: each test has a registry, by its proxy, or a repository of its own."""
    with running_mirror(tmp_path_factory.mktemp("mirror")) as found:
        yield found


def an_image(registry: Registry, *layers: bytes, repository: str = "a", tag: str = "1") -> PushedImage:
    image = image_of(list(layers))
    push(registry.host, repository, tag, image)
    return image


def blob_path(data: bytes, repository: str = "a") -> str:
    return f"/v2/{repository}/blobs/{Digest.of(data)}"


def pull(mirror: RunningMirror, host: str, image: PushedImage, repository: str = "a", tag: str = "1") -> None:
    """As a client does: the tag, the manifest by digest, every blob; all of it right."""
    head = mirror.head(f"/v2/{repository}/manifests/{tag}", ns=host)
    assert head.status == 200, mirror.log[-2000:]
    digest = head.headers["docker-content-digest"]
    assert digest == image.digest
    assert mirror.get(f"/v2/{repository}/manifests/{digest}", ns=host).body == image.data
    for blob in image.blobs:
        answer = mirror.get(blob_path(blob, repository), ns=host)
        assert (answer.status, answer.body) == (200, blob)


def bytes_asked(proxy: FaultProxy) -> int:
    """Of blobs, by the ranges of the requests that the registry saw."""
    total = 0
    for one in proxy.seen("GET", "/blobs/"):
        first, _, last = one.headers.get("range", "").removeprefix("bytes=").partition("-")
        total += int(last) - int(first) + 1 if last else 0
    return total


# --- the registry is not there --------------------------------------------------------------------------------------


def test_a_pulled_image_can_be_pulled_while_its_registry_is_down(registry: Registry, proxy: FaultProxy,
                                                                 tmp_path: Path) -> None:
    image = an_image(registry, os.urandom(3 * MIB), repository="down")
    with running_mirror(tmp_path, mirror={"proof_s": 1}) as mirror:
        pull(mirror, proxy.host, image, "down")
        proxy.down()
        assert mirror.stop() == 0
        mirror.start()
        pull(mirror, proxy.host, image, "down")
        assert mirror.figure('lazyfs_mirror_requests_total{end="manifests",source="offline",status="200"}') > 0


def test_no_longer_than_the_operator_says(registry: Registry, proxy: FaultProxy, tmp_path: Path) -> None:
    image = an_image(registry, os.urandom(1000), repository="late")
    with running_mirror(tmp_path, mirror={"offline_s": 0}) as mirror:
        pull(mirror, proxy.host, image, "late")
        proxy.down()
        assert mirror.get("/v2/late/manifests/1", ns=proxy.host).status == 404


def test_what_it_cannot_have_is_404_and_soon(proxy: FaultProxy, mirror: RunningMirror) -> None:
    """A client goes to the registry itself then; the second time the mirror does not even try."""
    proxy.add(Fault(Kind.BLACK_HOLE))
    answer = mirror.get("/v2/a/manifests/1", ns=proxy.host)
    assert (answer.status, answer.code) == (404, "MANIFEST_UNKNOWN")
    count = len(proxy.requests)
    assert mirror.get("/v2/a/manifests/2", ns=proxy.host).status == 404
    assert len(proxy.requests) == count


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_whatever_the_registry_answers_a_client_gets_404(proxy: FaultProxy, mirror: RunningMirror,
                                                         status: int) -> None:
    proxy.add(Fault(Kind.STATUS, status=status))
    for path in ("/v2/a/manifests/1", f"/v2/a/blobs/sha256:{'0' * 64}", "/v2/a/tags/list"):
        assert mirror.get(path, ns=proxy.host).status == 404


def test_a_tag_that_moved_is_seen_at_once(registry: Registry, mirror: RunningMirror) -> None:
    pull(mirror, registry.host, an_image(registry, b"old", repository="moves"), "moves")
    pull(mirror, registry.host, an_image(registry, b"new", repository="moves"), "moves")


def test_a_tag_is_believed_as_long_as_the_operator_says(registry: Registry, tmp_path: Path) -> None:
    old = an_image(registry, b"old", repository="fresh")
    with running_mirror(tmp_path, mirror={"tag_fresh_s": 3600}) as mirror:
        pull(mirror, registry.host, old, "fresh")
        an_image(registry, b"new", repository="fresh")
        pull(mirror, registry.host, old, "fresh")


# --- in the middle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.CUT, Kind.RESET, Kind.STATUS, Kind.GARBAGE])
def test_a_connection_that_breaks_is_not_seen(registry: Registry, proxy: FaultProxy, mirror: RunningMirror,
                                              kind: Kind) -> None:
    image = an_image(registry, os.urandom(10 * MIB), repository="breaks")
    proxy.add(Fault(kind, path="/blobs/", method="GET", times=2, at=100_000, skip=1))
    pull(mirror, proxy.host, image, "breaks")


@pytest.mark.parametrize("fault", [
    Fault(Kind.FLIP, path="/blobs/", at=70_000), Fault(Kind.SHORT, path="/blobs/", size=5),
    Fault(Kind.ENCODING, path="/blobs/"),
], ids=lambda fault: fault.kind.name)
def test_wrong_bytes_are_never_read_to_their_end(registry: Registry, proxy: FaultProxy, mirror: RunningMirror,
                                                 fault: Fault) -> None:
    layer = os.urandom(5 * MIB)
    an_image(registry, layer, repository="lies")
    assert mirror.get("/v2/lies/manifests/1", ns=proxy.host).status == 200
    proxy.add(fault)
    with contextlib.suppress(OSError, http.client.HTTPException):    # torn in the middle
        assert mirror.get(blob_path(layer, "lies"), ns=proxy.host).status == 404


def test_a_manifest_of_another_digest_is_refused(registry: Registry, proxy: FaultProxy, mirror: RunningMirror) -> None:
    image = an_image(registry, b"x", repository="other")
    proxy.add(Fault(Kind.FLIP, path="/manifests/", method="GET", at=5))
    assert mirror.get("/v2/other/manifests/1", ns=proxy.host).status == 404
    assert mirror.get(f"/v2/other/manifests/{image.digest}", ns=proxy.host).status == 404


@pytest.mark.parametrize("body", [b"[" * 100_000, b"{}", b"\xff", b'{"schemaVersion": 2, "layers": 7}', b"5"])
def test_a_manifest_that_is_none(proxy: FaultProxy, mirror: RunningMirror, body: bytes) -> None:
    proxy.add(Fault(Kind.STATUS, status=200, headers={"Content-Type": OCI_MANIFEST}, body=body))
    assert mirror.get("/v2/a/manifests/1", ns=proxy.host).status in {200, 404}
    assert mirror.get("/v2/a/tags/list", ns=proxy.host).status in {200, 404}
    assert mirror.get(f"/v2/a/referrers/sha256:{'0' * 64}", ns=proxy.host).status == 404
    assert mirror.get("/healthz").status == 200


def test_a_mirror_that_is_killed_goes_on_where_it_was(registry: Registry, proxy: FaultProxy, tmp_path: Path) -> None:
    """What was whole is not fetched again, and nothing that was not checked is served."""
    image = an_image(registry, os.urandom(6 * MIB), os.urandom(2 * MIB), repository="killed")
    with running_mirror(tmp_path) as mirror:
        pull(mirror, proxy.host, image, "killed")
        proxy.forget()
        mirror.stop(signal.SIGKILL)
        mirror.start()
        pull(mirror, proxy.host, image, "killed")
        assert bytes_asked(proxy) < MIB


def test_what_has_rotted_on_the_disk_is_not_read_to_its_end_and_fetched_again(registry: Registry, proxy: FaultProxy,
                                                                              tmp_path: Path) -> None:
    image = an_image(registry, os.urandom(6 * MIB), repository="rots")
    with running_mirror(tmp_path) as mirror:
        pull(mirror, proxy.host, image, "rots")
        mirror.stop()
        (rotten,) = (path for path in (mirror.directory / "data/pieces/whole").iterdir()
                     if path.stat().st_size == len(image.blobs[1]))
        with rotten.open("r+b") as file:
            file.seek(3 * MIB)
            file.write(b"rot")
        mirror.start()
        with pytest.raises(http.client.IncompleteRead):
            mirror.get(f"/v2/rots/blobs/{Digest.of(image.blobs[1])}", ns=proxy.host)
        pull(mirror, proxy.host, image, "rots")


# --- many at once ---------------------------------------------------------------------------------------------------


def test_many_clients_are_one_transfer(registry: Registry, proxy: FaultProxy, mirror: RunningMirror) -> None:
    layer = os.urandom(24 * MIB)
    image = an_image(registry, layer, repository="many")
    with ThreadPoolExecutor(12) as pool:
        for done in [pool.submit(pull, mirror, proxy.host, image, "many") for _ in range(12)]:
            done.result(120)
    assert bytes_asked(proxy) <= sum(map(len, image.blobs)) + 12 * 1024     # and samples
    assert len(proxy.seen("GET", "/manifests/")) == 1


def test_it_streams_while_it_downloads(registry: Registry, proxy: FaultProxy, mirror: RunningMirror) -> None:
    """The first bytes are there although others are held back for ever."""
    layer = os.urandom(16 * MIB)
    an_image(registry, layer, repository="streams")
    assert mirror.get("/v2/streams/manifests/1", ns=proxy.host).status == 200
    proxy.add(Fault(Kind.STALL, path="/blobs/", method="GET", at=2 * MIB + 5))
    with contextlib.closing(http.client.HTTPConnection(mirror.host, timeout=60)) as connection:
        connection.request("GET", f"{blob_path(layer, 'streams')}?ns={proxy.host}")
        with connection.getresponse() as answer:
            assert answer.status == 200
            assert answer.read(MIB) == layer[:MIB]


# --- who may ----------------------------------------------------------------------------------------------------------


def test_a_blob_of_this_node_is_not_given_to_who_only_claims_it(registry: Registry, tmp_path: Path) -> None:
    """A registry that anybody may name says that it has the blob; it cannot show it."""
    private = os.urandom(100_000)
    image = an_image(registry, private, repository="private")
    store = tmp_path / "containerd" / "io.containerd.content.v1.content" / "blobs" / "sha256"
    store.mkdir(parents=True)
    (store / Digest.of(private).hex).write_bytes(private)
    with running_mirror(tmp_path, mirror={"containerd_root": str(tmp_path / "containerd")}) as mirror, FaultProxy(
            "") as evil:
        pull(mirror, registry.host, image, "private")
        claim = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": descriptor(b"{}", "application/x.y"),
                 "layers": [descriptor(private, "application/x.layer")]}
        evil.add(Fault(Kind.STATUS, path="/manifests/", status=200, headers={"Content-Type": OCI_MANIFEST},
                       body=json.dumps(claim).encode()))
        evil.add(Fault(Kind.STATUS, path="/blobs/", method="HEAD", status=200,
                       headers={"Content-Length": str(len(private))}))
        assert mirror.get("/v2/x/manifests/1", ns=evil.host).status == 200
        for method in ("HEAD", "GET"):
            assert mirror.get(blob_path(private, "x"), ns=evil.host, method=method).status == 404
        assert mirror.figure('lazyfs_mirror_requests_total{end="blobs",source="content",status="200"}') == 1


def test_a_blob_that_was_fetched_for_another_registry_is_not_given_either(registry: Registry,
                                                                          mirror: RunningMirror) -> None:
    private = os.urandom(5 * MIB)
    pull(mirror, registry.host, an_image(registry, private, repository="private2"), "private2")
    with FaultProxy("") as evil:
        evil.add(Fault(Kind.STATUS, path="/blobs/", method="HEAD", status=200,
                       headers={"Content-Length": str(len(private))}))
        assert mirror.get(blob_path(private, "x"), ns=evil.host).status == 404
        evil.clear()
        guess = os.urandom(1024)
        evil.add(Fault(Kind.STATUS, path="/blobs/", method="HEAD", status=200,
                       headers={"Content-Length": str(len(private))}))
        evil.add(Fault(Kind.STATUS, path="/blobs/", status=206, body=guess,
                       headers={"Content-Range": f"bytes 0-1023/{len(private)}"}))
        assert mirror.get(blob_path(private, "x"), ns=evil.host).status == 404


def test_private_images_by_this_nodes_credentials_or_not_at_all(tmp_path: Path) -> None:
    password = secrets.token_hex(8)
    (tmp_path / "password").write_text(password)
    (tmp_path / "password").chmod(0o600)
    with running_registry(tmp_path, username="node", password=password) as registry:
        image = image_of([os.urandom(1000)])
        secret = base64.b64encode(f"node:{password}".encode()).decode()
        push(registry.host, "p", "1", image, {"Authorization": f"Basic {secret}"})
        login = {f'registry.host."{registry.host}"': {"username": "node", "password_file": str(tmp_path / "password")}}
        with running_mirror(tmp_path) as mirror:
            assert mirror.get("/v2/p/manifests/1", ns=registry.host).status == 404
        with running_mirror(tmp_path, sections=login) as mirror:
            pull(mirror, registry.host, image, "p")
            assert password not in mirror.log
            assert secret not in mirror.log
        with running_mirror(tmp_path, sections=login, mirror={"private": "never"}) as mirror:
            assert mirror.get("/v2/p/manifests/1", ns=registry.host).status == 404


def test_what_was_taken_away_is_forgotten(registry: Registry, tmp_path: Path) -> None:
    image = an_image(registry, os.urandom(1000), repository="gone")
    with running_mirror(tmp_path, mirror={"proof_s": 1}) as mirror:
        pull(mirror, registry.host, image, "gone")
        for digest in (image.digest, *(str(Digest.of(blob)) for blob in image.blobs)):
            kind = "manifests" if digest == image.digest else "blobs"
            assert ask(registry.host, "DELETE", f"/v2/gone/{kind}/{digest}").status == 202
        deadline = time.monotonic() + 20
        blob = blob_path(image.blobs[1], "gone")
        while mirror.get(blob, ns=registry.host).status != 404:      # the proof of a second ago still counts
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert mirror.get("/v2/gone/manifests/1", ns=registry.host).status == 404
