"""oci: and oci-archive:, both ways, and with skopeo as a second opinion."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import msgspec
import pytest

from lazyfs.errors import (
    DeadlineError,
    FormatError,
    IntegrityError,
    LazyfsError,
    NotFoundError,
    SourceError,
    TargetError,
    UnsupportedError,
    UsageError,
)
from lazyfs.image.digest import Digest
from lazyfs.registry import RegistryOptions, open_destination, open_source
from lazyfs.registry.documents import DOCKER_MANIFEST, OCI_INDEX, make_document
from lazyfs.registry.staging import PREFIX
from tests.smallimage import SmallImage, make_image, write_image

OPTIONS = RegistryOptions()
LAYERS = [b"first layer " * 1000, b"second"]
KINDS = ["oci", "oci-archive"]


def write(text: str, layers: list[bytes]) -> SmallImage:
    destination = open_destination(text, OPTIONS)
    try:
        return write_image(destination, layers)
    finally:
        destination.close()


def check(text: str, image: SmallImage) -> None:
    """Everything of `image` can be read from `text`, and nothing beyond."""
    source = open_source(text, OPTIONS)
    try:
        assert source.root() == image.document
        assert source.document(image.document.digest) == image.document
        assert source.read_blob(Digest.of(image.config), len(image.config)) == image.config
        for layer in image.layers:
            digest = Digest.of(layer)
            with source.open_blob(digest, len(layer)) as stream:
                assert b"".join(iter(lambda: stream.read(1000), b"")) == layer
                assert stream.read(1) == b""
            middle = layer[1:-1]
            with source.read_range(digest, 1, len(middle), time.monotonic() + 5) as stream:
                assert b"".join(iter(lambda: stream.read(1000), b"")) == middle
            with source.read_range(digest, len(layer), 0, time.monotonic() + 5) as stream:
                assert stream.read(1) == b""
    finally:
        source.close()


def leftovers(path: Path) -> list[Path]:
    return [p for p in path.rglob("*") if p.name.startswith(PREFIX)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_can_be_read(tmp_path: Path, kind: str) -> None:
    text = f"{kind}:{tmp_path}/image:v1"
    check(text, write(text, LAYERS))
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_there_before_commit(tmp_path: Path, kind: str) -> None:
    text = f"{kind}:{tmp_path}/image:v1"
    destination = open_destination(text, OPTIONS)
    image = write_image(destination, LAYERS, is_committed=False)
    assert destination.reader().read_blob(Digest.of(image.config), len(image.config)) == image.config
    with pytest.raises(NotFoundError):
        open_source(text, OPTIONS).root()
    assert list(destination.documents()) == []
    destination.close()
    with pytest.raises(NotFoundError):
        open_source(text, OPTIONS).root()
    assert not leftovers(tmp_path)
    check(text, write(text, LAYERS))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_image_gives_the_same_bytes(tmp_path: Path, kind: str) -> None:
    trees = []
    for name in ("a", "b"):
        write(f"{kind}:{tmp_path}/{name}:v1", LAYERS)
        path = tmp_path / name
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        trees.append([(str(p.relative_to(path)), p.read_bytes()) for p in files])
    assert trees[0] == trees[1]


def test_other_tags_and_unknown_keys_are_kept(tmp_path: Path) -> None:
    first = write(f"oci:{tmp_path}/d:one", [b"one"])
    index = json.loads((tmp_path / "d/index.json").read_text())
    index["annotations"] = {"who": "knows"}
    index["manifests"][0]["x-ours"] = 7
    (tmp_path / "d/index.json").write_text(json.dumps(index))
    second = write(f"oci:{tmp_path}/d:two", [b"two"])
    third = write(f"oci:{tmp_path}/d:two", [b"three"])
    assert second.document != third.document
    check(f"oci:{tmp_path}/d:one", first)
    check(f"oci:{tmp_path}/d:two", third)
    index = json.loads((tmp_path / "d/index.json").read_text())
    assert index["annotations"] == {"who": "knows"}
    assert [entry.get("x-ours") for entry in index["manifests"]] == [7, None]
    destination = open_destination(f"oci:{tmp_path}/d:one", OPTIONS)
    assert list(destination.documents()) == [first.document, third.document]
    destination.close()


def test_which_image_is_meant(tmp_path: Path) -> None:
    image = write(f"oci:{tmp_path}/d", [b"one"])
    check(f"oci:{tmp_path}/d", image)
    check(f"oci:{tmp_path}/d@{image.document.digest}", image)
    write(f"oci:{tmp_path}/d:two", [b"two"])
    with pytest.raises(UsageError, match="two"):
        open_source(f"oci:{tmp_path}/d", OPTIONS).root()
    with pytest.raises(NotFoundError, match="tags there: two"):
        open_source(f"oci:{tmp_path}/d:three", OPTIONS).root()
    with pytest.raises(NotFoundError):
        open_source(f"oci:{tmp_path}/nowhere:x", OPTIONS).root()


def test_many_writers_at_once_lose_no_tag(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def one(number: int) -> None:
        try:
            write(f"oci:{tmp_path}/d:t{number}", [b"shared", b"%d" % number])
        except BaseException as error:  # noqa: BLE001 - handed to the test
            errors.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for number in range(12):
        check(f"oci:{tmp_path}/d:t{number}", make_image([b"shared", b"%d" % number]))


def test_blobs_of_another_directory_are_linked(tmp_path: Path) -> None:
    image = write(f"oci:{tmp_path}/a:1", LAYERS)
    destination = open_destination(f"oci:{tmp_path}/b:1", OPTIONS)
    size = len(image.layer)
    assert destination.mount_blob(image.digest, size, f"oci:{tmp_path}/a")
    assert destination.has_blob(image.digest, size)
    assert not destination.mount_blob(Digest.of(b"other"), 5, f"oci:{tmp_path}/a")
    assert not destination.mount_blob(Digest.of(LAYERS[1]), 5, f"oci:{tmp_path}/a")
    assert not destination.mount_blob(Digest.of(LAYERS[1]), len(LAYERS[1]), "docker://host/a")
    destination.close()


def test_an_archive_reuses_what_it_replaces(tmp_path: Path) -> None:
    old = write(f"oci-archive:{tmp_path}/x.tar:v1", LAYERS)
    destination = open_destination(f"oci-archive:{tmp_path}/x.tar:v1", OPTIONS)
    assert list(destination.documents()) == [old.document]
    assert destination.has_blob(old.digest, len(old.layer))
    assert not destination.has_blob(Digest.of(b"new"), 3)
    image = make_image([old.layer, b"new"])
    destination.put_bytes(b"new", Digest.of(b"new"))
    destination.put_bytes(image.config, Digest.of(image.config))
    destination.commit(image.document)
    destination.close()
    check(f"oci-archive:{tmp_path}/x.tar:v1", image)
    source = open_source(f"oci-archive:{tmp_path}/x.tar:v1", OPTIONS)
    with pytest.raises(NotFoundError):
        source.open_blob(Digest.of(LAYERS[1]), len(LAYERS[1]))
    source.close()


def test_an_archive_hands_on_no_damage(tmp_path: Path) -> None:
    old = write(f"oci-archive:{tmp_path}/x.tar:v1", LAYERS)
    archive = tmp_path / "x.tar"
    archive.write_bytes(archive.read_bytes().replace(b"second", b"sec0nd"))
    destination = open_destination(f"oci-archive:{archive}:v1", OPTIONS)
    assert destination.has_blob(old.digest, len(old.layer))
    assert not destination.has_blob(Digest.of(b"second"), 6)
    destination.close()


def _what(path: Path) -> tuple[int, ...]:
    """Without times: all the machine writes to /dev/null."""
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_rdev, found.st_nlink, found.st_size


def test_an_archive_replaces_nothing_but_an_archive(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    for name in ("notes", "fifo", "null"):
        path = Path("/dev/null") if name == "null" else tmp_path / name
        before = _what(path)
        with pytest.raises(TargetError, match="exists, and is no OCI archive"):
            open_destination(f"oci-archive:{path}:x", OPTIONS)
        assert _what(path) == before
    (tmp_path / "empty.tar").touch()
    check(f"oci-archive:{tmp_path}/empty.tar:x", write(f"oci-archive:{tmp_path}/empty.tar:x", LAYERS))
    assert not leftovers(tmp_path)


def test_an_archive_behind_a_symlink_is_written_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.tar").symlink_to("real/x.tar")
    image = write(f"oci-archive:{tmp_path}/link.tar:x", LAYERS)
    assert (tmp_path / "link.tar").is_symlink()
    check(f"oci-archive:{tmp_path}/real/x.tar:x", image)
    assert not leftovers(tmp_path)


def test_damage_at_rest_is_found(tmp_path: Path) -> None:
    image = write(f"oci:{tmp_path}/d:1", LAYERS)
    source = open_source(f"oci:{tmp_path}/d:1", OPTIONS)
    config = tmp_path / "d/blobs/sha256" / Digest.of(image.config).hex
    config.write_bytes(image.config[:-1] + b"!")
    with pytest.raises(IntegrityError):
        source.read_blob(Digest.of(image.config), len(image.config))
    config.write_bytes(image.config[:-1])
    with pytest.raises(IntegrityError):
        source.read_blob(Digest.of(image.config), len(image.config))
    manifest = tmp_path / "d/blobs/sha256" / image.document.digest.hex
    manifest.write_bytes(image.document.data + b" ")
    with pytest.raises(IntegrityError):
        source.root()
    layer = tmp_path / "d/blobs/sha256" / image.digest.hex
    layer.write_bytes(image.layer[:100])
    with pytest.raises(IntegrityError):
        source.open_blob(image.digest, len(image.layer))
    with pytest.raises(IntegrityError):
        source.read_range(image.digest, 90, 20, time.monotonic() + 5)
    with pytest.raises(DeadlineError):
        source.read_range(image.digest, 0, 20, time.monotonic() - 1)
    with source.read_range(image.digest, 0, 100, time.monotonic() + 5) as stream:
        assert stream.read(10) == image.layer[:10]
        os.truncate(layer, 50)
        assert stream.read(1000) == image.layer[10:50]
        with pytest.raises(SourceError):
            stream.read(1000)
    layer.unlink()
    os.mkfifo(layer)
    with pytest.raises(SourceError):
        source.open_blob(image.digest, len(image.layer))


@pytest.mark.parametrize(("name", "content", "error"), [
    ("index.json", "{", FormatError), ("index.json", '{"manifests": 5}', FormatError),
    ("index.json", '{"manifests": [{"digest": "md5:1", "size": 1}]}', FormatError),
    ("index.json", '{"manifests": [{"digest": "sha256:../../../etc/passwd", "size": 1}]}', FormatError),
    ("index.json", "{}", NotFoundError), ("index.json", "[" * 50_000, FormatError),
    ("index.json", " " * (4 << 20) + "{}", FormatError),
    ("oci-layout", "{}", FormatError), ("oci-layout", '{"imageLayoutVersion":"2.0.0"}', UnsupportedError),
])
def test_broken_layouts(tmp_path: Path, name: str, content: str, error: type[LazyfsError]) -> None:
    write(f"oci:{tmp_path}/d", LAYERS)
    (tmp_path / "d" / name).write_text(content)
    with pytest.raises(error):
        open_source(f"oci:{tmp_path}/d", OPTIONS).root()


def test_targets_that_are_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for text in (f"oci:{tmp_path}/full:x", f"oci:{tmp_path}/file:x", f"oci-archive:{tmp_path}/full:x",
                 f"oci-archive:{tmp_path}/none/x.tar:x"):
        with pytest.raises(TargetError):
            open_destination(text, OPTIONS)
    assert (tmp_path / "file").read_text() == "mine"
    destination = open_destination(f"oci:{tmp_path}/d:x", OPTIONS)
    short = destination.staging_dir / "short"
    short.write_bytes(b"12")
    with pytest.raises(TargetError):
        destination.put_blob(short, Digest.of(b"123"), 3)
    destination.close()


def test_staging_of_the_dead_is_removed_and_of_the_living_kept(tmp_path: Path) -> None:
    destination = open_destination(f"oci:{tmp_path}/d:x", OPTIONS)
    living = destination.staging_dir
    assert living.stat().st_mode & 0o7777 == 0o700
    dead = tmp_path / "d" / f"{PREFIX}dead"
    dead.mkdir()
    (dead / ".lock").touch()
    (dead / "blob").write_text("half")
    other = open_destination(f"oci:{tmp_path}/d:y", OPTIONS)
    assert other.staging_dir.exists()
    assert living.exists()
    assert not dead.exists()
    other.close()
    destination.close()
    assert not leftovers(tmp_path)


def test_a_lock_that_is_held_is_waited_for(tmp_path: Path) -> None:
    write(f"oci:{tmp_path}/d:1", LAYERS)
    with (tmp_path / "d/.lazyfs.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=write, args=(f"oci:{tmp_path}/d:2", LAYERS))
        thread.start()
        time.sleep(0.3)
        assert [e["annotations"] for e in json.loads((tmp_path / "d/index.json").read_text())["manifests"]] == [
            {"org.opencontainers.image.ref.name": "1"}]
    thread.join()
    check(f"oci:{tmp_path}/d:2", make_image(LAYERS))


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_skopeo_reads_ours_and_we_read_skopeos(tmp_path: Path, kind: str) -> None:
    image = write(f"{kind}:{tmp_path}/ours:v1", LAYERS)
    subprocess.run(["skopeo", "copy", "-q", "--insecure-policy", "--preserve-digests", f"{kind}:{tmp_path}/ours:v1",
                    f"{kind}:{tmp_path}/theirs:v2"], check=True)
    check(f"{kind}:{tmp_path}/theirs:v2", image)


def test_documents_say_what_they_are() -> None:
    index = msgspec.json.encode({"schemaVersion": 2, "manifests": []})
    assert make_document(index, "", None, "x").media_type == OCI_INDEX
    assert make_document(index, f"{OCI_INDEX}; charset=utf-8", None, "x").media_type == OCI_INDEX
    assert make_document(b'{"schemaVersion":2,"config":{}}', DOCKER_MANIFEST, None, "x").media_type == DOCKER_MANIFEST
    with pytest.raises(FormatError, match="calls itself"):
        make_document(msgspec.json.encode({"mediaType": OCI_INDEX}), DOCKER_MANIFEST, None, "x")
    for data in (b'{"schemaVersion":1,"fsLayers":[]}', b'{"mediaType":"application/vnd.oci.artifact.manifest.v1+json"}',
                 b"{}", b'{"schemaVersion":2}'):
        with pytest.raises(UnsupportedError):
            make_document(data, "", None, "x")
    for data in (b"", b"[]", b"\xff", b"<html>", b'{"mediaType":5}'):
        with pytest.raises(FormatError):
            make_document(data, "", None, "x")
