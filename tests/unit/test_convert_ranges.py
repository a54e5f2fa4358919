"""Parts of blobs: tried again after what passes, never short, never more; few candidates for reuse."""

from __future__ import annotations

import io
import json
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from converter.hot import StoredBlobs
from converter.journal import Journal
from converter.ranges import read_range
from converter.reuse import CANDIDATE_COUNT_MAX, Reuse
from lazyfs.errors import IntegrityError, SourceError
from lazyfs.image.digest import Digest
from lazyfs.image.manifest import parse_lazy_manifest, parse_manifest
from lazyfs.registry import RegistryOptions, open_destination
from tests.convertkit import Layout, Lazy, run_convert
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from pathlib import Path

DATA = bytes(range(256)) * 5000
DIGEST = Digest.of(DATA)


class Answers:
    """A source that answers a range with what is next in its list."""

    def __init__(self, *answers: bytes | Exception) -> None:
        self.answers = list(answers)

    def read_range(self, *_: object) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)


def read(source: Answers, **options: Any) -> bytes:
    return read_range(source, DIGEST, 0, len(DATA), **options)  # type: ignore[arg-type]


def test_what_passes_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazyfs.registry.retry.pause_s", lambda *_: 0.0)
    assert read(Answers(SourceError("reset", transient=True), DATA)) == DATA
    assert read(Answers(DATA[:-1], DATA)) == DATA


@pytest.mark.parametrize("wrong", [b"", DATA[:-1], DATA + b"x", DATA * 2])
def test_another_size_is_refused(wrong: bytes) -> None:
    source = Answers(wrong, wrong, wrong)
    with pytest.raises(IntegrityError, match="expected 1280000"):
        read(source)
    assert len(source.answers) == 1


def test_bytes_that_fail_the_callers_check_are_asked_for_once_more() -> None:
    def check(data: bytes) -> None:
        if data != DATA:
            raise IntegrityError("other bytes")

    flipped = b"x" + DATA[1:]
    assert read(Answers(flipped, DATA), check=check) == DATA
    with pytest.raises(IntegrityError, match="other bytes"):
        read(Answers(flipped, flipped), check=check)


def test_few_of_many_blobs_that_claim_a_layer_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(tmp_path / "in")
    layout.add_image("a", [TarBuilder().file("f", b"x").build()])
    place = f"oci:{tmp_path}/out:a"
    run_convert(layout.reference("a"), place, journal=tmp_path / "journal")
    made = Lazy(place)
    index_path = tmp_path / "out/index.json"
    index = json.loads(index_path.read_bytes())
    for number in range(3 * CANDIDATE_COUNT_MAX):     # manifests that name blobs nobody has
        manifest = json.loads(json.dumps(made.raw_manifest))
        manifest["layers"][0]["digest"] = f"sha256:{number:064x}"
        data = json.dumps(manifest).encode()
        digest = Digest.of(data)
        (tmp_path / "out/blobs/sha256" / digest.hex).write_bytes(data)
        index["manifests"].append({"mediaType": manifest["mediaType"], "digest": digest.text, "size": len(data),
                                   "annotations": {"org.opencontainers.image.ref.name": f"b{number}"}})
    index_path.write_text(json.dumps(index))
    destination = open_destination(f"oci:{tmp_path}/out:c", RegistryOptions())
    asked: list[Digest] = []

    def has_blob(digest: Digest, _: int) -> bool:
        asked.append(digest)
        return False

    monkeypatch.setattr(destination, "has_blob", has_blob)
    source = parse_manifest(*_document(layout))
    blob = parse_lazy_manifest(parse_manifest(made.document.data, made.document.media_type)).layers[0]
    reuse = Reuse(destination, blob.options, Journal(tmp_path / "none"), look=True)
    assert reuse.find(source.layers[0]) is None
    assert len(asked) == CANDIDATE_COUNT_MAX
    destination.close()


def test_one_blob_of_two_layers_at_a_time_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blob").write_bytes(DATA)
    stored = StoredBlobs(Answers())  # type: ignore[arg-type]
    both, real_open, opened = threading.Barrier(2), os.open, []

    def open_together(path: Path, flags: int) -> int:
        both.wait(30)
        opened.append(real_open(path, flags))
        return opened[-1]

    monkeypatch.setattr("converter.hot.os.open", open_together)
    threads = [threading.Thread(target=stored.keep, args=(DIGEST, tmp_path / "blob")) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert stored(DIGEST, 7, 9) == DATA[7:16]
    stored.close()
    for descriptor in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def _document(layout: Layout) -> tuple[bytes, str]:
    (entry,) = json.loads((layout.path / "index.json").read_bytes())["manifests"]
    return (layout.blobs / entry["digest"].removeprefix("sha256:")).read_bytes(), entry["mediaType"]
