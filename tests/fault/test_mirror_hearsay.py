"""Tags and manifests by word of peers while a registry is down: who is believed, of what, and for how long."""

from __future__ import annotations

import contextlib
import json
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from lazyfs.image.digest import Digest
from lazyfs.mirror.believing import Word, encode
from lazyfs.registry.place import Document
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.mirrorkit import OCI_MANIFEST, PushedImage, RunningMirror, ask, descriptor, image_of, push, running_mirror
from tests.ports import free_port
from tests.registrykit import Registry, running_registry
from tests.served import served

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1024 * 1024
LIMIT_S = 3600
ASK = "/lazyfs-ask/"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture
def proxy(registry: Registry) -> Iterator[FaultProxy]:
    with FaultProxy(registry.host) as found:
        yield found


class Cluster:
    """Two mirrors that pull while the registry is there, one that comes when it is gone; and a fourth's place."""

    def __init__(self, mirrors: list[RunningMirror], addresses: list[str]) -> None:
        self.old, self.new = mirrors[:2], mirrors[2]
        self.addresses = addresses


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    port = free_port()
    addresses = [f"127.0.0.{number}:{port}" for number in range(12, 16)]
    sections: dict[str, dict[str, Any]] = {"peers": {"cluster": "test", "static": addresses}}
    with contextlib.ExitStack() as stack:
        mirrors = [stack.enter_context(running_mirror(
            tmp_path_factory.mktemp("node"), sections=sections,
            mirror={"peers_address": address, "tags_from_peers_s": LIMIT_S, "proof_s": 1}))
            for address in addresses[:3]]
        deadline = time.monotonic() + 60
        while not all("peers: listening" in one.log for one in mirrors):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield Cluster(mirrors, addresses)


def manifest(mirror: RunningMirror, host: str, repository: str, tag: str = "1") -> int:
    return mirror.get(f"/v2/{repository}/manifests/{tag}", ns=host).status


def pull(mirror: RunningMirror, host: str, repository: str, image: PushedImage) -> None:
    """As a client does: the tag, the manifest by digest, every blob."""
    head = mirror.head(f"/v2/{repository}/manifests/1", ns=host)
    assert (head.status, head.headers.get("docker-content-digest")) == (200, image.digest), mirror.log[-3000:]
    assert mirror.get(f"/v2/{repository}/manifests/{image.digest}", ns=host).body == image.data
    for blob in image.blobs:
        answer = mirror.get(f"/v2/{repository}/blobs/{Digest.of(blob)}", ns=host)
        assert (answer.status, answer.body == blob) == (200, True), mirror.log[-3000:]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def test_an_image_that_two_peers_have_can_be_pulled_here_first_while_its_registry_is_down(
        registry: Registry, proxy: FaultProxy, cluster: Cluster) -> None:
    image = image_of([os.urandom(2 * MIB), os.urandom(1000)])
    push(registry.host, "agreed", "1", image)
    for one in cluster.old:
        pull(one, proxy.host, "agreed", image)
    proxy.down()
    pull(cluster.new, proxy.host, "agreed", image)
    assert cluster.new.figure('lazyfs_mirror_requests_total{end="manifests",source="peers",status="200"}') >= 2
    assert "by word of peers" in cluster.new.log


def test_one_alone_is_not_believed_of_a_tag_but_of_a_digest(registry: Registry, proxy: FaultProxy,
                                                            cluster: Cluster) -> None:
    image = image_of([os.urandom(1000)])
    push(registry.host, "alone", "1", image)
    pull(cluster.old[0], proxy.host, "alone", image)
    proxy.down()
    assert manifest(cluster.new, proxy.host, "alone") == 404
    assert manifest(cluster.new, proxy.host, "alone", image.digest) == 200


def test_what_was_heard_is_not_told_on(registry: Registry, proxy: FaultProxy, cluster: Cluster) -> None:
    """Else two who have heard it from one would make two more who say it."""
    image = image_of([os.urandom(1000)])
    push(registry.host, "told", "1", image)
    for one in cluster.old:
        pull(one, proxy.host, "told", image)
    proxy.down()
    pull(cluster.new, proxy.host, "told", image)
    words = quote(f"docker://{proxy.host}/told:1", safe="")
    assert ask(cluster.addresses[0], "GET", ASK + words).status == 200
    assert ask(cluster.addresses[2], "GET", ASK + words).status == 404


def test_a_registry_that_says_no_is_not_overruled(registry: Registry, proxy: FaultProxy, cluster: Cluster) -> None:
    image = image_of([os.urandom(1000)])
    push(registry.host, "taken", "1", image)
    for one in cluster.old:
        pull(one, proxy.host, "taken", image)
    for status in (401, 403, 404):
        proxy.add(Fault(Kind.STATUS, status=status))
        assert manifest(cluster.new, proxy.host, "taken") == 404
        assert manifest(cluster.new, proxy.host, "taken", image.digest) == 404
        proxy.clear()


def test_a_blob_that_the_repository_has_not_shown_to_them_is_not_given(registry: Registry, cluster: Cluster) -> None:
    """A registry of somebody's own lists another one's blob, and goes: nobody can be asked whether it has it."""
    private = os.urandom(200_000)
    image = image_of([private])
    push(registry.host, "private", "1", image)
    pull(cluster.old[0], registry.host, "private", image)
    claim = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": descriptor(b"{}", "application/x.y"),
             "layers": [descriptor(private, "application/x.layer")]}
    with FaultProxy("") as evil:
        evil.add(Fault(Kind.STATUS, path="/manifests/", status=200, headers={"Content-Type": OCI_MANIFEST},
                       body=json.dumps(claim).encode()))
        for one in cluster.old:
            assert manifest(one, evil.host, "x") == 200
        evil.down()
        assert manifest(cluster.new, evil.host, "x") == 200
        path = f"/v2/x/blobs/{Digest.of(private)}"
        assert cluster.new.get(path, ns=evil.host).status == 404
        assert cluster.new.get(path, ns=registry.host).status == 404     # it was pulled from another repository


# --- members that lie ------------------------------------------------------------------------------------------------


class _Liar(BaseHTTPRequestHandler):
    """A member that is asked, and answers with `body`."""

    body = b""
    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        with contextlib.suppress(OSError):       # it has heard enough
            self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class has it so
        """Nothing on standard error."""


@contextlib.contextmanager
def lying(address: str, body: bytes) -> Iterator[type[_Liar]]:
    handler = type("Handler", (_Liar,), {"body": body, "asked": 0})
    host, _, port = address.rpartition(":")
    with served(ThreadingHTTPServer((host, int(port)), handler)):
        yield handler


@pytest.mark.parametrize("body", [
    b"", b"\xc1" * 100, b"\x91" * 200_000,
    encode(Word(Document(b"{}", "text/html", Digest.of(b"{}")), 0.0, frozenset())), bytes(6 * MIB),
], ids=["nothing", "no msgpack", "deep", "no manifest", "too large"])
def test_whatever_a_member_answers_the_others_count(registry: Registry, proxy: FaultProxy, cluster: Cluster,
                                                    body: bytes) -> None:
    name = f"hostile{len(body)}"
    image = image_of([os.urandom(1000)])
    push(registry.host, name, "1", image)
    for one in cluster.old:
        pull(one, proxy.host, name, image)
    proxy.down()
    with lying(cluster.addresses[3], body) as liar:
        pull(cluster.new, proxy.host, name, image)
        assert liar.asked >= 1


def test_a_member_that_lies_is_not_believed(registry: Registry, proxy: FaultProxy, cluster: Cluster) -> None:
    """Its digest is the freshest of all, and it says so alone."""
    image, other = image_of([os.urandom(1000)]), image_of([b"evil"])
    push(registry.host, "lied", "1", image)
    for one in cluster.old:
        pull(one, proxy.host, "lied", image)
    proxy.down()
    word = Word(Document(other.data, OCI_MANIFEST, Digest(other.digest)), 0.0, frozenset(map(Digest.of, other.blobs)))
    with lying(cluster.addresses[3], encode(word)) as liar:
        pull(cluster.new, proxy.host, "lied", image)
        assert liar.asked >= 1
        assert manifest(cluster.new, proxy.host, "nothing-of-it") == 404


# --- the limit, and the switch --------------------------------------------------------------------------------------


def test_what_is_older_than_the_limit_is_not_told(registry: Registry, proxy: FaultProxy, tmp_path: Path) -> None:
    image = image_of([b"x"])
    push(registry.host, "aged", "1", image)
    address = f"127.0.0.1:{free_port()}"
    sections = {"peers": {"cluster": "test", "static": [address]}}
    words = ASK + quote(f"docker://{proxy.host}/aged:1", safe="")
    with running_mirror(tmp_path, sections=sections,
                        mirror={"peers_address": address, "tags_from_peers_s": 3}) as mirror:
        until(lambda: "peers: listening" in mirror.log, "it listens")
        pull(mirror, proxy.host, "aged", image)
        until(lambda: ask(address, "GET", words).status == 404, "it is too old")
        assert manifest(mirror, proxy.host, "aged") == 200      # the registry says it again
        assert ask(address, "GET", words).status == 200
        assert ask(address, "GET", ASK + "%00").status == 400
        assert ask(address, "GET", ASK + "x" * 20_000).status == 400


def test_it_is_off_unless_it_is_turned_on(registry: Registry, proxy: FaultProxy, tmp_path: Path) -> None:
    image = image_of([b"x"])
    push(registry.host, "off", "1", image)
    address = f"127.0.0.1:{free_port()}"
    sections = {"peers": {"cluster": "test", "static": [address]}}
    with running_mirror(tmp_path, sections=sections, mirror={"peers_address": address}) as mirror:
        until(lambda: "peers: listening" in mirror.log, "it listens")
        pull(mirror, proxy.host, "off", image)
        assert ask(address, "GET", ASK + quote(f"docker://{proxy.host}/off:1", safe="")).status == 400
