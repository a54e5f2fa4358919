"""The mirror's pure parts, and its records: ranges, routes, what counts for how long."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.image.digest import Digest
from lazyfs.mirror.contentstore import ContentStore
from lazyfs.mirror.manifests import listed_in
from lazyfs.mirror.ranges import ByteRange, NotSatisfiable, parse_range
from lazyfs.mirror.records import Records
from lazyfs.mirror.route import End, Refusal, Route, find_route
from lazyfs.registry.documents import OCI_MANIFEST
from lazyfs.registry.place import Document

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DIGEST = Digest.of(b"x")


@given(st.text(max_size=40) | st.from_regex(r"bytes=\d{0,5}-\d{0,5}", fullmatch=True), st.integers(0, 5000))
def test_any_range_is_inside_or_none(header: str, size: int) -> None:
    found = parse_range(header, size)
    if isinstance(found, ByteRange):
        assert 0 <= found.start < found.end <= size
    else:
        assert found is None or found == NotSatisfiable(size)


@given(st.integers(1, 10_000), st.data())
def test_a_range_is_that_of_the_specification(size: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, size - 1))
    last = data.draw(st.integers(first, 2 * size))
    assert parse_range(f"bytes={first}-{last}", size) == (first, min(last + 1, size))
    assert parse_range(f"bytes={first}-", size) == (first, size)
    assert parse_range(f"bytes=-{last + 1}", size) == (max(0, size - last - 1), size)


@pytest.mark.parametrize(("target", "identity", "tag"), [
    ("/v2/library/alpine/manifests/3?ns=docker.io", "docker://docker.io/library/alpine", "3"),
    ("/v2/library/alpine/manifests/3", "docker://docker.io/library/alpine", "3"),
    ("/v2/docker.io/library/alpine/manifests/3", "docker://docker.io/library/alpine", "3"),
    ("/v2/a.example__5000/b/c/manifests/latest", "docker://a.example:5000/b/c", "latest"),
    ("/v2/b/c/manifests/latest?ns=a.example:5000", "docker://a.example:5000/b/c", "latest"),
    ("/v2/localhost/b/manifests/1", "docker://localhost/b", "1"),
    ("/v2/manifests/manifests/manifests/1?ns=a.b", "docker://a.b/manifests/manifests", "1"),
    ("/v2/a/blobs/b/manifests/1?ns=a.b", "docker://a.b/a/blobs/b", "1"),
])
def test_whose_image_is_meant(target: str, identity: str, tag: str) -> None:
    found = find_route(target)
    assert isinstance(found, Route)
    assert (found.end, found.reference.identity, found.reference.tag) == (End.MANIFEST, identity, tag)


@given(st.text(max_size=60), st.sampled_from(["", "/v2/", "/v2/a/manifests/", "/v2/a/blobs/", "http://h/v2/"]),
       st.text(max_size=20))
def test_any_target_is_a_route_or_refused(text: str, prefix: str, namespace: str) -> None:
    found = find_route(f"{prefix}{text}?ns={namespace}")
    if isinstance(found, Route) and found.end is not End.PING:
        assert found.reference.repository
        assert "/.." not in found.reference.identity
    assert found is None or isinstance(found, Route | Refusal)


@given(st.binary(max_size=200))
def test_any_bytes_list_something_or_nothing(data: bytes) -> None:
    assert list(listed_in(data)) == []


def test_what_a_manifest_lists() -> None:
    good, odd, wrong = ({"digest": str(DIGEST), "size": 1}, {"digest": "x", "size": 1},
                        {"digest": str(DIGEST), "size": -5})
    assert list(listed_in(json.dumps({"config": good, "layers": [odd, wrong]}).encode())) == [(DIGEST, 1)]


# --- records ------------------------------------------------------------------------------------------------------


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    found = Records(tmp_path / "records.sqlite")
    yield found
    found.close()


def a_document(data: bytes = b"{}") -> Document:
    return Document(data, OCI_MANIFEST, Digest.of(data))


def test_records_are_of_one_place(records: Records) -> None:
    document = a_document()
    records.keep_manifest("docker://a/b", document, [(DIGEST, 7)])
    records.keep_tag("docker://a/b", "1", document.digest)
    kept = records.manifest("docker://a/b", document.digest)
    assert kept is not None
    assert kept.document == document
    assert 0 <= kept.age_s < 60
    known = records.blob("docker://a/b", DIGEST)
    assert known is not None
    assert (known.size, known.is_shown) == (7, False)
    for place in ("docker://evil/b", "docker://a/c"):
        assert records.manifest(place, document.digest) is None
        assert records.tag(place, "1") is None
        assert records.blob(place, DIGEST) is None


def test_what_was_shown_is_not_made_less_by_a_list(records: Records) -> None:
    records.keep_blob("p", DIGEST, 7, is_shown=True)
    records.keep_manifest("p", a_document(), [(DIGEST, 8)])
    known = records.blob("p", DIGEST)
    assert known is not None
    assert (known.size, known.is_shown) == (7, True)
    records.forget("p", DIGEST)
    assert records.blob("p", DIGEST) is None


def test_records_outlive_a_restart_and_damage_costs_them(tmp_path: Path) -> None:
    path = tmp_path / "records.sqlite"
    first = Records(path)
    first.keep_tag("p", "1", DIGEST)
    first.close()
    second = Records(path)
    assert second.tag("p", "1") is not None
    second.close()
    path.write_bytes(os.urandom(5000))
    third = Records(path)
    assert third.tag("p", "1") is None
    third.keep_tag("p", "1", DIGEST)
    assert third.tag("p", "1") is not None
    third.close()


def test_a_manifest_that_was_changed_on_the_disk_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "records.sqlite"
    records = Records(path)
    records.keep_manifest("p", a_document(), [])
    with sqlite3.connect(path) as base:
        base.execute("UPDATE manifest SET data=?", (b"[]",))
    base.close()
    assert records.manifest("p", a_document().digest) is None
    records.close()


def test_a_time_that_is_yet_to_come_is_long_ago(tmp_path: Path) -> None:
    """The clock was set back."""
    path = tmp_path / "records.sqlite"
    records = Records(path)
    records.keep_tag("p", "1", DIGEST)
    with sqlite3.connect(path) as base:
        base.execute("UPDATE tag SET proven=?", (time.time() + 3600,))
    base.close()
    known = records.tag("p", "1")
    assert known is not None
    assert known.age_s == float("inf")
    records.close()


def test_records_are_bounded(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazyfs.mirror.records.ROW_COUNT_MAX", 100)
    monkeypatch.setattr("lazyfs.mirror.records.MANIFEST_BYTES_KEPT", 1000)
    monkeypatch.setattr("lazyfs.mirror.records._TIDY_EVERY", 1)
    documents = [a_document(b'"%060d"' % number) for number in range(40)]
    for number, document in enumerate(documents):
        records.keep_manifest("p", document, [(Digest.of(b"%d %d" % (number, one)), 1) for one in range(10)])
    assert records.manifest("p", documents[0].digest) is None
    assert records.manifest("p", documents[-1].digest) is not None
    kept = sum(records.blob("p", Digest.of(b"%d %d" % (number, one))) is not None
               for number in range(40) for one in range(10))
    assert 0 < kept <= 100


# --- containerd's store -------------------------------------------------------------------------------------------


def test_containerds_store(tmp_path: Path) -> None:
    blobs = tmp_path / "io.containerd.content.v1.content/blobs/sha256"
    blobs.mkdir(parents=True)
    (blobs / DIGEST.hex).write_bytes(b"x")
    store = ContentStore(str(tmp_path))
    opened = store.open(DIGEST)
    assert opened is not None
    assert opened.size == 1
    opened.close()
    assert store.open(DIGEST, 2) is None
    assert store.open(Digest.of(b"y")) is None
    (blobs / Digest.of(b"y").hex).symlink_to(blobs / DIGEST.hex)
    (blobs / Digest.of(b"z").hex).mkdir()
    os.mkfifo(blobs / Digest.of(b"f").hex)
    assert [store.open(Digest.of(name)) for name in (b"y", b"z", b"f")] == [None, None, None]
    assert ContentStore("").open(DIGEST) is None
