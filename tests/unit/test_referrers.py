"""Prefetch lists beside images: put, found, replaced; in layouts, registries without and with the referrers API."""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from lazyfs.cli.profile import profile_command
from lazyfs.errors import DeadlineError, FormatError, IntegrityError, NotFoundError, SourceError, UsageError
from lazyfs.image.artifact import (
    ARTIFACT_LIST_BYTES_MAX,
    CREATED_KEY,
    EMPTY,
    PREFETCH_TYPE,
    REFERRER_COUNT_MAX,
    add_referrer,
    build_artifact,
    is_referrers_tag,
    parse_artifact,
    parse_referrers,
    referrers_tag,
)
from lazyfs.image.descriptor import Document
from lazyfs.image.digest import Digest
from lazyfs.image.oci import OCI_MANIFEST
from lazyfs.image.prefetch import format_prefetch
from lazyfs.registry import RegistryOptions, open_destination, open_source, own_name, parse_reference
from lazyfs.registry.referrers import find_list
from tests.convertkit import Layout, Lazy, registry_with, run_convert, tar_of
from tests.referrerskit import INDEX_TYPE, ReferrersApi

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lazyfs.image.prefetch import PrefetchList

HEAD = "# lazyfs-prefetch 1\n"
FIRST, SECOND = f"{HEAD}a ms=1\n", f"{HEAD}# runs: 2\nb 0-99 share=0.5\n"
SUBJECT = Document(b"{}", OCI_MANIFEST, Digest.of(b"{}"))
NOW = "2026-01-31T12:00:00Z"
FILES = {"a": b"A" * 100_000, "b": b"B" * 5000}


def push(image: str, text: str, *words: str) -> dict[str, Any]:
    done = CliRunner().invoke(profile_command, ["push", "-", image, "--json", *words], input=text,
                              catch_exceptions=False)
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def pull(image: str, *words: str) -> str:
    return CliRunner().invoke(profile_command, ["pull", image, *words], catch_exceptions=False).stdout


def find(image: str, seconds: float = 20.0) -> PrefetchList | None:
    with contextlib.closing(open_source(image, RegistryOptions(retry_count=0))) as source:
        return find_list(source, source.root().digest, time.monotonic() + seconds)


# --- documents ------------------------------------------------------------------------------------------------------


def test_an_artifact_names_its_list_and_its_image() -> None:
    artifact = build_artifact(SUBJECT, FIRST.encode(), NOW)
    found = parse_artifact(artifact, SUBJECT.digest)
    assert (found.digest, found.size) == (Digest.of(FIRST.encode()), len(FIRST))
    raw = json.loads(artifact.data)
    assert raw["artifactType"] == raw["layers"][0]["mediaType"] == PREFETCH_TYPE
    assert raw["config"] == {"mediaType": "application/vnd.oci.empty.v1+json", "digest": Digest.of(EMPTY).text,
                             "size": 2}
    assert raw["subject"] == {"mediaType": OCI_MANIFEST, "digest": SUBJECT.digest.text, "size": 2}
    with pytest.raises(FormatError, match="at most"):
        build_artifact(SUBJECT, b"#" * (ARTIFACT_LIST_BYTES_MAX + 1), NOW)


@pytest.mark.parametrize(("change", "message"), [
    ({"artifactType": "application/x"}, "no prefetch list"),
    ({"layers": []}, "no prefetch list"),
    ({"subject": None}, "does not refer"),
    ({"subject": {"mediaType": OCI_MANIFEST, "digest": Digest.of(b"other").text, "size": 5}}, "does not refer"),
    ({"layers": [{"mediaType": PREFETCH_TYPE, "digest": SUBJECT.digest.text, "size": ARTIFACT_LIST_BYTES_MAX + 1}]},
     "at most"),
    ({"layers": [{"mediaType": "text/plain", "digest": SUBJECT.digest.text, "size": 2}]}, "text/plain"),
    ({"layers": [{"mediaType": PREFETCH_TYPE, "digest": "sha256:short", "size": 2}]}, "not a sha256 digest"),
    ({"layers": 7}, "malformed"),
])
def test_hostile_artifacts_are_refused(change: dict[str, Any], message: str) -> None:
    data = json.dumps({**json.loads(build_artifact(SUBJECT, b"a\n", NOW).data), **change}).encode()
    with pytest.raises(FormatError, match=message):
        parse_artifact(Document(data, OCI_MANIFEST, Digest.of(data)), SUBJECT.digest)


def listing(*entries: dict[str, Any]) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries}).encode()


def entry(number: int, created: str | None, kind: str = PREFETCH_TYPE) -> dict[str, Any]:
    return {"mediaType": OCI_MANIFEST, "digest": Digest.of(b"%d" % number).text, "size": 1, "artifactType": kind,
            "annotations": {} if created is None else {CREATED_KEY: created}}


def test_the_newest_comes_first() -> None:
    pages = [listing(entry(1, None), entry(2, NOW), entry(3, "9 o'clock")),
             listing(entry(4, "2026-02-01T00:00:00Z"), entry(5, "2027-01-01T00:00:00Z", "x/y"), entry(2, NOW))]
    found = parse_referrers(pages, PREFETCH_TYPE)
    assert [one.digest for one in found[:2]] == [Digest.of(b"4"), Digest.of(b"2")]
    assert {one.created for one in found[2:]} == {""}
    assert len(found) == 4


@pytest.mark.parametrize("page", [
    b"", b"[]", b'{"schemaVersion":2}', listing({"artifactType": PREFETCH_TYPE}), listing({"artifactType": 1}),
    listing({**entry(1, NOW), "digest": "sha512:x"}), listing({**entry(1, NOW), "size": -1}),
    listing({**entry(1, NOW), "size": 1 << 40}), b'{"schemaVersion":2,"manifests":' + b"[" * 100_000,
    listing(*[{}] * (REFERRER_COUNT_MAX + 1)),
])
def test_hostile_listings_are_refused(page: bytes) -> None:
    with pytest.raises(FormatError):
        parse_referrers([page], PREFETCH_TYPE)
    with pytest.raises(FormatError):
        parse_referrers([listing(*[{}] * REFERRER_COUNT_MAX), listing({})], PREFETCH_TYPE)


def test_what_others_put_in_a_listing_stays() -> None:
    foreign = {**entry(1, NOW, "application/spdx+json"), "unknown": [1, 2.50]}
    artifact = build_artifact(SUBJECT, b"a\n", NOW)
    index = json.loads(add_referrer(listing(foreign, entry(2, NOW)), artifact, NOW).data)
    assert index["manifests"][0] == foreign
    assert [one["digest"] for one in index["manifests"][1:]] == [artifact.digest.text]
    assert add_referrer(None, artifact, NOW).data == add_referrer(listing(entry(2, NOW)), artifact, NOW).data


def test_tags_of_listings() -> None:
    assert is_referrers_tag(referrers_tag(SUBJECT.digest))
    assert not any(map(is_referrers_tag, ("latest", "sha256-abc", referrers_tag(SUBJECT.digest) + "0", "")))


# --- places ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def layout(tmp_path: Path) -> str:
    source = Layout(tmp_path / "in")
    source.add_image("app", [tar_of(FILES)])
    run_convert(source.reference("app"), f"oci:{tmp_path}/out:lazy")
    return f"oci:{tmp_path}/out:lazy"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    with registry_with(tmp_path, {"app": [tar_of(FILES)]}) as running:
        yield f"docker://{running.host}/app:lazy"


@pytest.fixture
def api(registry: str) -> Iterator[ReferrersApi]:
    with ReferrersApi(registry.split("/")[2]) as running:
        yield running


def push_and_pull(image: str) -> None:
    before = Lazy(image)
    before.close()
    with pytest.raises(NotFoundError, match="no prefetch list beside it"):
        pull(image)
    assert find(image) is None
    first = push(image, FIRST)
    assert first["subject"] == before.document.digest.text
    assert pull(image) == FIRST
    assert push(image, FIRST) == {**first, "isNew": False}
    assert push(image, SECOND)["isNew"]       # in the same second, most likely: newer all the same
    assert pull(image) == SECOND
    assert push(image, FIRST)["isNew"]
    assert pull(image) == FIRST
    found = find(image)
    assert found is not None
    assert format_prefetch(found) == FIRST
    after = Lazy(image)
    after.close()
    assert after.document == before.document


def test_a_layout(layout: str, tmp_path: Path) -> None:
    push_and_pull(layout)
    assert pull(layout, "-o", str(tmp_path / "list")) == ""
    assert (tmp_path / "list").read_text() == FIRST
    bare = layout.removesuffix(":lazy")       # the only image: a listing is none
    assert own_name(bare) == layout
    assert pull(bare) == FIRST
    assert push(f"{bare}@{Lazy(layout).document.digest}", FIRST)["isNew"] is False


def test_an_archive_is_refused(layout: str, tmp_path: Path) -> None:
    archive = f"oci-archive:{tmp_path}/app.tar"
    run_convert(f"oci:{tmp_path}/in:app", archive)
    with pytest.raises(UsageError, match="archive"):
        push(archive, FIRST)
    with pytest.raises(NotFoundError):
        pull(archive)
    with pytest.raises(FormatError, match="not a lazy image"):
        push(f"oci:{tmp_path}/in:app", FIRST)


def test_a_registry_without_the_api(registry: str) -> None:
    push_and_pull(registry)
    subject = Lazy(registry)
    tag = f"{parse_reference(registry).identity}:{referrers_tag(subject.document.digest)}"
    subject.close()
    with contextlib.closing(open_source(tag, RegistryOptions())) as source:
        index = json.loads(source.root().data)
    assert [one["artifactType"] for one in index["manifests"]] == [PREFETCH_TYPE]
    with contextlib.closing(open_destination(registry, RegistryOptions())) as place:     # no layers to reuse there
        assert len(list(place.documents())) == 1


def test_a_registry_with_the_api(registry: str, api: ReferrersApi) -> None:
    image = f"docker://{api.host}/app:lazy"
    push_and_pull(image)
    assert find(registry) is None             # it has no listing: the API does without
    assert all(f"artifactType={PREFETCH_TYPE.replace('/', '%2F').replace('+', '%2B')}" in path for path in api.asked)
    api.pages = 3
    assert pull(image) == FIRST
    api.pages = 50                            # bounded: what is behind is not looked at
    api.asked.clear()
    pull(image)
    assert len(api.asked) == 4


@pytest.mark.parametrize("answer", [(404, "text/plain", b"404 page not found"), (405, "text/html", b""),
                                    (200, "text/html", b"<html>welcome</html>")])
def test_what_is_no_api_leads_to_the_listing(registry: str, api: ReferrersApi, answer: tuple[int, str, bytes]) -> None:
    push(registry, FIRST)
    api.answer = answer
    assert pull(f"docker://{api.host}/app:lazy") == FIRST


@pytest.mark.parametrize(("answer", "kind"), [
    ((200, INDEX_TYPE, b"{"), FormatError), ((200, INDEX_TYPE, listing({"artifactType": PREFETCH_TYPE})), FormatError),
    ((500, "text/plain", b""), SourceError),
    ((200, INDEX_TYPE, listing(entry(1, NOW))), NotFoundError),
])
def test_a_hostile_api(registry: str, api: ReferrersApi, answer: tuple[int, str, bytes], kind: type) -> None:
    api.answer = answer
    with pytest.raises(kind):
        find(f"docker://{api.host}/app:lazy")


def test_another_images_list_is_refused_and_replaced(layout: str, tmp_path: Path) -> None:
    digest = Lazy(layout).document.digest
    other = build_artifact(SUBJECT, FIRST.encode(), NOW)
    tag = f"oci:{tmp_path}/out:{referrers_tag(digest)}"
    with contextlib.closing(open_destination(tag, RegistryOptions())) as place:
        place.put_document(other)
        place.commit(add_referrer(None, other, "9999-12-31T23:59:59Z"))
    with pytest.raises(FormatError, match="does not refer"):
        find(layout)
    push(layout, SECOND)
    assert pull(layout) == SECOND


def test_a_damaged_list_is_refused(layout: str, tmp_path: Path) -> None:
    push(layout, FIRST)
    path = tmp_path / "out/blobs/sha256" / Digest.of(FIRST.encode()).hex
    path.write_bytes(SECOND.encode()[: len(FIRST)])
    with pytest.raises(IntegrityError):
        find(layout)
    path.unlink()
    with pytest.raises(NotFoundError):
        find(layout)


def test_nothing_is_read_after_the_deadline(layout: str, registry: str) -> None:
    for image in (layout, registry):
        push(image, FIRST)
        with pytest.raises(DeadlineError):
            find(image, seconds=-1.0)
