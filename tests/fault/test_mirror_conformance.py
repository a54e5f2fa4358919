"""
Every pull-side requirement of the distribution specification, v1.1, against the mirror with a real registry behind it.

The categories are those of the specification's own conformance tests for a read-only registry: ping, tags, blobs with
ranges, manifests of every kind, referrers, errors.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.mirrorkit import (
    OCI_INDEX,
    OCI_MANIFEST,
    RunningMirror,
    ask,
    descriptor,
    image_of,
    index_of,
    push,
    running_mirror,
)
from tests.referrerskit import ReferrersApi
from tests.registrykit import running_registry

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOB = os.urandom(2000)
BIG = os.urandom(9 * 1024 * 1024 + 17)        # of several pieces
EMPTY = b"{}"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
IMAGE = image_of([BLOB, BIG])
SECOND = image_of([BLOB], annotations={"second": "yes"})
KINDS = {
    "image": IMAGE,
    "index": index_of(IMAGE, SECOND),
    "nested": index_of(index_of(IMAGE, SECOND)),
    "artifact": image_of([BLOB], EMPTY, config_type="application/vnd.oci.empty.v1+json",
                         artifactType="application/vnd.test.thing"),
    "data": image_of([], EMPTY, annotations={"inlined": "e30="}),
    "custom": image_of([BLOB], unknown={"a": [1, 2]}, annotations={"org.example": "ü"}),
    "none": image_of([]),
    "subject": image_of([BLOB], EMPTY, config_type="application/vnd.test.config", artifactType="application/vnd.test",
                        annotations={"x": "y"}, subject=descriptor(IMAGE.data, OCI_MANIFEST)),
}


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningMirror, str]]:
    """A mirror, and the registry behind it."""
    directory = tmp_path_factory.mktemp("conformance")
    with running_registry(directory) as registry, ReferrersApi(registry.host) as api:
        api.filters = False
        push(api.host, "repo/a", "second", SECOND)
        for name, image in KINDS.items():
            push(api.host, "repo/a", name, image)
        with running_mirror(directory) as mirror:
            yield mirror, api.host


def blob(data: bytes) -> str:
    return f"/v2/repo/a/blobs/sha256:{hashlib.sha256(data).hexdigest()}"


def test_ping(stand: tuple[RunningMirror, str]) -> None:
    mirror, host = stand
    assert mirror.get("/v2/").status == 200
    answer = mirror.get("/v2/", ns=host)
    assert answer.status == 200
    assert answer.headers["oci-namespace"] == host


# --- blobs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [BLOB, BIG, KINDS["data"].blobs[0]], ids=["small", "pieces", "tiny"])
def test_a_blob_and_its_head(stand: tuple[RunningMirror, str], data: bytes) -> None:
    mirror, host = stand
    head = mirror.head(blob(data), ns=host)
    got = mirror.get(blob(data), ns=host)
    assert (head.status, head.body, got.status) == (200, b"", 200)
    assert got.body == data
    for answer in (head, got):
        assert answer.headers["content-length"] == str(len(data))
        assert answer.headers["docker-content-digest"] == blob(data).rpartition("/")[2]
        assert answer.headers["accept-ranges"] == "bytes"
        assert answer.headers["oci-namespace"] == host
        assert "content-encoding" not in answer.headers


def test_nothing_is_encoded_again(stand: tuple[RunningMirror, str]) -> None:
    mirror, host = stand
    answer = mirror.get(blob(BLOB), ns=host, headers={"Accept-Encoding": "zstd, gzip, deflate"})
    assert answer.body == BLOB
    assert "content-encoding" not in answer.headers


@pytest.mark.parametrize(("wanted", "start", "end"), [
    ("bytes=500-1499", 500, 1500), ("bytes=500-", 500, 2000), ("bytes=-500", 1500, 2000), ("bytes=0-", 0, 2000),
    ("bytes=1999-1999", 1999, 2000), ("bytes=1500-5000", 1500, 2000), ("bytes=-9999", 0, 2000),
])
def test_a_range(stand: tuple[RunningMirror, str], wanted: str, start: int, end: int) -> None:
    mirror, host = stand
    answer = mirror.get(blob(BLOB), ns=host, headers={"Range": wanted})
    assert answer.status == 206
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/2000"
    assert answer.headers["content-length"] == str(end - start)
    assert answer.body == BLOB[start:end]


@pytest.mark.parametrize("wanted", ["bytes=2000-5000", "bytes=2000-", "bytes=-0"])
def test_a_range_past_the_end(stand: tuple[RunningMirror, str], wanted: str) -> None:
    mirror, host = stand
    answer = mirror.get(blob(BLOB), ns=host, headers={"Range": wanted})
    assert answer.status == 416
    assert answer.headers["content-range"] == "bytes */2000"
    assert answer.code == "RANGE_INVALID"


@pytest.mark.parametrize("wanted", ["bytes=9-5", "lines=1-2", "bytes=a-b", "bytes=-", "bytes=0-1,5-6"])
def test_a_range_that_is_none_is_the_whole(stand: tuple[RunningMirror, str], wanted: str) -> None:
    mirror, host = stand
    answer = mirror.get(blob(BLOB), ns=host, headers={"Range": wanted})
    assert (answer.status, answer.body) == (200, BLOB)


def test_ranges_of_many_pieces_and_conditions(stand: tuple[RunningMirror, str]) -> None:
    mirror, host = stand
    start = 5 * 1024 * 1024 + 1
    answer = mirror.get(blob(BIG), ns=host, headers={"Range": f"bytes={start}-"})
    assert (answer.status, answer.body) == (206, BIG[start:])
    tag = answer.headers["etag"]
    same = mirror.get(blob(BIG), ns=host, headers={"Range": f"bytes={start}-", "If-Range": tag})
    other = mirror.get(blob(BIG), ns=host, headers={"Range": f"bytes={start}-", "If-Range": '"x"'})
    assert (same.status, other.status, len(other.body)) == (206, 200, len(BIG))
    assert mirror.get(blob(BIG), ns=host, headers={"If-None-Match": tag}).status == 304
    assert mirror.head(blob(BIG), ns=host).headers["content-length"] == str(len(BIG))


def test_many_requests_on_one_connection_and_clients_that_close_early(stand: tuple[RunningMirror, str]) -> None:
    """containerd asks for open-ended ranges, and leaves each in the middle."""
    mirror, host = stand
    for start in range(0, len(BIG), 1024 * 1024):
        leaving = http.client.HTTPConnection(mirror.host, timeout=60)
        leaving.request("GET", f"{blob(BIG)}?ns={host}", headers={"Range": f"bytes={start}-"})
        answer = leaving.getresponse()
        assert answer.read(1024) == BIG[start:start + 1024]
        answer.close()
        leaving.close()
    kept = http.client.HTTPConnection(mirror.host, timeout=60)
    for data in (BLOB, BIG, BLOB):
        kept.request("GET", f"{blob(data)}?ns={host}")
        assert kept.getresponse().read() == data
    socket = kept.sock
    kept.request("HEAD", f"{blob(BLOB)}?ns={host}")
    assert kept.getresponse().read() == b""
    assert kept.sock is socket
    kept.close()
    assert "Traceback" not in mirror.log


def test_an_empty_blob(stand: tuple[RunningMirror, str]) -> None:
    mirror, host = stand
    push(host, "repo/a", "empty", image_of([b""]))
    answer = mirror.get(blob(b""), ns=host)
    assert (answer.status, answer.body) == (200, b"")


def test_an_unknown_blob(stand: tuple[RunningMirror, str]) -> None:
    mirror, host = stand
    for method in ("GET", "HEAD"):
        assert mirror.get(blob(b"unknown"), ns=host, method=method).status == 404
    assert mirror.get(blob(b"unknown"), ns=host).code == "BLOB_UNKNOWN"


def test_a_blob_of_another_repository_is_unknown(stand: tuple[RunningMirror, str]) -> None:
    mirror, host = stand
    other = image_of([b"other's"])
    push(host, "repo/b", "1", other)
    digest = f"sha256:{hashlib.sha256(other.blobs[1]).hexdigest()}"
    assert mirror.get(f"/v2/repo/b/blobs/{digest}", ns=host).status == 200
    assert mirror.get(f"/v2/repo/a/blobs/{digest}", ns=host).status == 404


def test_sha512_is_left_to_the_registry(stand: tuple[RunningMirror, str]) -> None:
    mirror, host = stand
    answer = mirror.get(f"/v2/repo/a/blobs/sha512:{'0' * 128}", ns=host)
    assert (answer.status, answer.code) == (404, "BLOB_UNKNOWN")


# --- manifests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_manifest_by_tag_and_by_digest(stand: tuple[RunningMirror, str], name: str) -> None:
    mirror, host = stand
    image = KINDS[name]
    for reference in (name, image.digest):
        head = mirror.head(f"/v2/repo/a/manifests/{reference}", ns=host)
        got = mirror.get(f"/v2/repo/a/manifests/{reference}", ns=host)
        assert (head.status, head.body, got.status, got.body) == (200, b"", 200, image.data)
        for answer in (head, got):
            assert answer.headers["content-type"] == image.media_type
            assert answer.headers["docker-content-digest"] == image.digest
            assert answer.headers["content-length"] == str(len(image.data))
            assert answer.headers["oci-namespace"] == host


def test_an_unknown_manifest(stand: tuple[RunningMirror, str]) -> None:
    mirror, host = stand
    for reference in ("unknown", "sha256:" + "0" * 64):
        answer = mirror.get(f"/v2/repo/a/manifests/{reference}", ns=host)
        assert (answer.status, answer.code) == (404, "MANIFEST_UNKNOWN")
    assert mirror.get("/v2/nobody/manifests/1", ns=host).status == 404


@pytest.mark.parametrize(("path", "status", "code"), [
    ("/v2/Repo/manifests/1", 400, "NAME_INVALID"), ("/v2/repo//a/manifests/1", 400, "NAME_INVALID"),
    ("/v2/repo/manifests/-1", 400, "NAME_INVALID"), ("/v2/repo/blobs/sha256:zz", 400, "DIGEST_INVALID"),
    ("/v2/repo/manifests/sha256:0", 400, "DIGEST_INVALID"), ("/v2/repo/else/1", 404, "NAME_UNKNOWN"),
    ("/v2/%2e%2e/%2e%2e/manifests/1", 400, "NAME_INVALID"), ("/v2/a/manifests/%00", 400, "NAME_INVALID"),
    ("/v2/_catalog", 404, "NAME_UNKNOWN"), ("/v2/%ff/manifests/1", 400, "NAME_INVALID"),
    (f"/v2/{'a' * 300}/manifests/1", 400, "NAME_INVALID"), ("/", 404, "NAME_UNKNOWN"),
])
def test_what_is_no_name(stand: tuple[RunningMirror, str], path: str, status: int, code: str) -> None:
    mirror, host = stand
    answer = mirror.get(path, ns=host)
    assert (answer.status, answer.code) == (status, code)


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE", "PATCH"])
def test_nothing_can_be_pushed(stand: tuple[RunningMirror, str], method: str) -> None:
    mirror, host = stand
    answer = mirror.get("/v2/repo/a/manifests/image", ns=host, method=method)
    assert (answer.status, answer.code) == (405, "UNSUPPORTED")


@pytest.mark.parametrize("ns", ["localhost", "a b", "no-dot", "x:99999", "../etc", "user:pw@host"])
def test_a_namespace_that_is_no_registry(stand: tuple[RunningMirror, str], ns: str) -> None:
    mirror, _ = stand
    assert mirror.get("/v2/repo/a/manifests/image", ns=ns).status in {400, 404}


def test_a_path_with_its_registry(stand: tuple[RunningMirror, str]) -> None:
    """For Podman and CRI-O, which send no `ns`."""
    mirror, host = stand
    name = f"{host.replace(':', '__')}/repo/a"
    assert mirror.get(f"/v2/{name}/manifests/image").body == IMAGE.data
    assert mirror.get(blob(BLOB).replace("repo/a", name)).body == BLOB


# --- lists --------------------------------------------------------------------------------------------------------


def test_tags_in_pages(stand: tuple[RunningMirror, str]) -> None:
    mirror, host = stand
    answer = mirror.get("/v2/repo/a/tags/list", ns=host)
    assert answer.status == 200
    listed = json.loads(answer.body)
    assert listed["name"] == "repo/a"
    assert {*KINDS, "second"} <= set(listed["tags"])
    assert listed["tags"] == sorted(listed["tags"])
    found: list[str] = []
    path = f"/v2/repo/a/tags/list?n=3&ns={host}"
    while path:
        page = ask(mirror.host, "GET", path)
        assert page.status == 200
        assert len(json.loads(page.body)["tags"]) <= 3
        found += json.loads(page.body)["tags"]
        link = page.headers.get("link", "")
        path = link.partition("<")[2].partition(">")[0]
    assert found == listed["tags"]
    rest = json.loads(mirror.get("/v2/repo/a/tags/list", ns=host, last=found[1]).body)["tags"]
    assert rest == found[2:]
    assert mirror.get("/v2/nobody/tags/list", ns=host).code == "NAME_UNKNOWN"


def test_referrers(stand: tuple[RunningMirror, str]) -> None:
    mirror, host = stand
    answer = mirror.get(f"/v2/repo/a/referrers/{IMAGE.digest}", ns=host)
    assert answer.status == 200
    assert answer.headers["content-type"] == OCI_INDEX
    listed: list[dict[str, Any]] = json.loads(answer.body)["manifests"]
    assert [one["digest"] for one in listed] == [KINDS["subject"].digest]
    assert json.loads(mirror.get(f"/v2/repo/a/referrers/sha256:{'1' * 64}", ns=host).body)["manifests"] == []


def test_referrers_are_filtered_also_where_the_registry_does_not(stand: tuple[RunningMirror, str]) -> None:
    mirror, host = stand
    for kind, count in (("application/vnd.test", 1), ("application/other", 0)):
        answer = mirror.get(f"/v2/repo/a/referrers/{IMAGE.digest}", ns=host, artifactType=kind)
        assert len(json.loads(answer.body)["manifests"]) == count
        assert answer.headers["oci-filters-applied"] == "artifactType"


def test_its_own_questions_are_refused(stand: tuple[RunningMirror, str]) -> None:
    """Two mirrors that ask each other would go on for ever."""
    mirror, host = stand
    answer = mirror.get("/v2/repo/a/manifests/image", ns=host, headers={"User-Agent": "lazyfs-mirror/0"})
    assert answer.status == 404


def test_health_and_metrics(stand: tuple[RunningMirror, str]) -> None:
    mirror, host = stand
    mirror.get(blob(BLOB), ns=host)
    assert mirror.get("/healthz").status == 200
    text = mirror.get("/metrics").body.decode()
    assert 'lazyfs_mirror_requests_total{end="blobs",source="pieces",status="200"}' in text
    assert 'lazyfs_mirror_fetched_bytes_total{source="registry"}' in text
