"""Conversion end to end between directories: the right image, deterministic, reused, refused when it must be."""

from __future__ import annotations

import hashlib
import json
import random
from typing import TYPE_CHECKING

import pytest

from converter.encode import Encoding
from lazyfs import limits
from lazyfs.errors import FormatError, IntegrityError, LazyfsError, NotFoundError, UnsupportedError
from lazyfs.image.codec import Codec, compress, decompress
from lazyfs.image.prefetch import parse_prefetch
from tests.convertkit import Layout, Lazy, run_convert
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from pathlib import Path

    from converter.report import ConvertReport

BLOCK = limits.BLOCK_SIZE_BYTES
NOISE = random.Random(1).randbytes(700_000)
TEXT = b"the same words again and again\n" * 20_000
BASE = (
    TarBuilder().directory("etc")
    .file("etc/passwd", b"root:x:0:0::/:\n", mode=0o600, uid=7, gid=8, mtime=(1_700_000_000, 5))
    .file("noise", NOISE).file("empty").file("text", TEXT).hardlink("text2", "text").symlink("link", "etc/passwd")
    .file("copy-of-noise", NOISE).file("gone", b"soon")
).build()
UPPER = TarBuilder().whiteout("gone").file("etc/hosts", b"127.0.0.1 localhost\n").file("zeros", bytes(500_000)).build()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "in")
    made.add_image("app", [BASE, UPPER], annotations={"org.example.note": "kept"})
    return made


def out(tmp_path: Path, tag: str = "lazy", name: str = "out") -> str:
    return f"oci:{tmp_path}/{name}:{tag}"


def convert(layout: Layout, tmp_path: Path, tag: str = "app", name: str = "out", **changes) -> ConvertReport:
    return run_convert(layout.reference(tag), out(tmp_path, "lazy", name), journal=tmp_path / "journal", **changes)


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
@pytest.mark.parametrize("codec", [Codec.LZ4, Codec.ZSTD, Codec.NONE])
def test_every_byte_arrives(tmp_path: Path, compression: str, codec: Codec) -> None:
    layout = Layout(tmp_path / "in")
    layout.add_image("app", [BASE, UPPER], compression=compression)
    report = convert(layout, tmp_path, encoding=Encoding(codec, 0 if codec is Codec.NONE else 3, 64 * 1024))
    lazy = Lazy(out(tmp_path))
    assert lazy.verify() == sum(layer.chunk_count for layer in report.images[0].layers)
    assert lazy.read(b"noise") == lazy.read(b"copy-of-noise") == NOISE
    assert lazy.read(b"text") == lazy.read(b"text2") == TEXT
    assert lazy.read(b"empty") == b""
    assert lazy.read(b"zeros") == bytes(500_000)
    assert lazy.read(b"etc/hosts") == b"127.0.0.1 localhost\n"
    assert lazy.tree() == {b"etc", b"etc/passwd", b"etc/hosts", b"noise", b"copy-of-noise", b"empty", b"text", b"text2",
                           b"link", b"zeros"}
    stat = lazy.image.stat(lazy.nid(b"etc/passwd"))
    assert (stat.mode, stat.uid, stat.mtime_ns) == (0o600, 7, 5)
    assert lazy.nid(b"text") == lazy.nid(b"text2")


def test_the_source_is_kept_in_the_manifest_and_config(layout: Layout, tmp_path: Path) -> None:
    report = convert(layout, tmp_path)
    lazy = Lazy(out(tmp_path))
    assert lazy.config["config"] == {"Cmd": ["/bin/sh"], "Env": ["A=b"]}
    assert lazy.raw_manifest["annotations"]["org.example.note"] == "kept"
    assert lazy.document.digest == report.digest
    assert lazy.manifest.source_digest == report.source_digest
    assert len(lazy.config["rootfs"]["diff_ids"]) == len(lazy.raw_manifest["layers"]) == 3


def test_equal_content_is_stored_once(layout: Layout, tmp_path: Path) -> None:
    base = convert(layout, tmp_path).images[0].layers[0]
    assert base.device_size < len(NOISE) + len(TEXT) + 20 * 4096


def test_zeros_are_not_stored(layout: Layout, tmp_path: Path) -> None:
    upper = convert(layout, tmp_path, encoding=Encoding(Codec.NONE, 0, 64 * 1024)).images[0].layers[1]
    assert upper.device_size > 500_000
    assert upper.blob_size < 70_000


@pytest.mark.parametrize("codec", [Codec.LZ4, Codec.ZSTD])
def test_the_result_depends_on_nothing_but_the_input(layout: Layout, tmp_path: Path, codec: Codec) -> None:
    encoding = Encoding(codec, 3, 64 * 1024)
    plan = parse_prefetch("etc/*\nnoise 100000-\n")
    found = {convert(layout, tmp_path, name=f"out{jobs}", jobs=jobs, encoding=encoding, prefetch=plan).digest
             for jobs in (1, 2, 4)}
    again = convert(layout, tmp_path, name="out1", encoding=encoding, prefetch=plan)       # all reused
    anew = convert(layout, tmp_path, name="out1", encoding=encoding, prefetch=plan, reuse=False)
    assert found == {again.digest} == {anew.digest}
    assert all(layer.reused for layer in again.images[0].layers)
    assert not any(layer.reused for layer in anew.images[0].layers)


def test_a_blob_is_the_same_in_every_image(layout: Layout, tmp_path: Path) -> None:
    layout.add_image("other", [BASE, TarBuilder().file("x", b"y").build()])
    layout.add_image("zstd", [BASE], compression="zstd")
    first = convert(layout, tmp_path, name="a").images[0].layers[0]
    listed = convert(layout, tmp_path, name="b", prefetch=parse_prefetch("noise")).images[0].layers[0]
    other = convert(layout, tmp_path, "other", name="c").images[0].layers[0]
    recompressed = convert(layout, tmp_path, "zstd", name="d").images[0].layers[0]
    assert first.blob_digest == listed.blob_digest == other.blob_digest == recompressed.blob_digest
    assert first.source_digest != recompressed.source_digest


def test_layers_are_reused_across_images_without_being_read(layout: Layout, tmp_path: Path) -> None:
    layout.add_image("other", [BASE, TarBuilder().file("x", b"y").build()])
    convert(layout, tmp_path)
    other = json.loads((layout.path / "index.json").read_text())["manifests"][1]["digest"]
    base = json.loads((layout.blobs / other[7:]).read_text())["layers"][0]
    layout.corrupt(base["digest"], b"unreadable")
    report = run_convert(layout.reference("other"), out(tmp_path, "two"), journal=tmp_path / "other-journal")
    assert [layer.reused for layer in report.images[0].layers] == [True, False]
    lazy = Lazy(out(tmp_path, "two"))
    lazy.verify()
    assert lazy.read(b"x") == b"y"
    assert lazy.read(b"noise") == NOISE


def test_a_damaged_blob_is_converted_again_not_handed_on(layout: Layout, tmp_path: Path) -> None:
    report = convert(layout, tmp_path)
    blob = tmp_path / "out/blobs/sha256" / report.images[0].layers[0].blob_digest.hex
    damaged = bytearray(blob.read_bytes())
    damaged[100] ^= 1
    blob.write_bytes(damaged)
    again = convert(layout, tmp_path)
    assert not again.images[0].layers[0].reused
    assert again.images[0].digest == report.images[0].digest
    Lazy(out(tmp_path)).verify()


def test_other_options_are_not_reused(layout: Layout, tmp_path: Path) -> None:
    convert(layout, tmp_path)
    report = convert(layout, tmp_path, encoding=Encoding(Codec.LZ4, 1, 128 * 1024))
    assert not any(layer.reused for layer in report.images[0].layers)


def test_the_same_layer_twice_is_converted_once(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "in")
    layout.add_image("app", [BASE, UPPER, BASE])
    report = convert(layout, tmp_path, prefetch=parse_prefetch("noise\ntext\n"))
    lazy = Lazy(out(tmp_path))
    lazy.verify()
    assert len(lazy.bootstrap.blobs) == 3
    assert lazy.read(b"gone") == b"soon"
    assert report.images[0].size == sum(layer["size"] for layer in
                                        {entry["digest"]: entry for entry in lazy.raw_manifest["layers"]}.values())


def test_the_hot_part_is_the_listed_blocks_in_their_order(layout: Layout, tmp_path: Path) -> None:
    report = convert(layout, tmp_path, prefetch=parse_prefetch("etc/hosts\nnoise 200000-\nnot/there\nzeros\nempty\n"))
    hot = report.images[0].hot
    assert hot is not None
    assert hot.unmatched == ("not/there",)
    lazy = Lazy(out(tmp_path))
    lazy.verify()
    blocks = lazy.hot_blocks()
    assert (len(blocks) * BLOCK, hot.chunk_count) == (hot.device_size, 1)
    # one chunk: in the order of their places; no block of zeros that no layer stores
    assert blocks == sorted(set(blocks))
    ((device, place, length),) = lazy.image.extents(lazy.nid(b"noise"), 200_000, 1 << 30)
    ((upper, other, _),) = lazy.image.extents(lazy.nid(b"etc/hosts"), 0, 1 << 30)
    noise = [(device, block) for block in range(place // BLOCK, -(-(place + length) // BLOCK))]
    assert set(noise) | {(upper, other // BLOCK)} <= set(blocks)
    codecs = {lazy.tables[device].rows["codec"][block * BLOCK // lazy.tables[device].chunk_size]
              for device, block in blocks}
    assert Codec.ZERO not in codecs


@pytest.mark.parametrize("levels", [(3, 0, 6), (12, 0, 12), (3, 1 << 20, 19)])
def test_the_hot_part_is_compressed_harder_than_the_layers(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: tuple[int, int, int]
) -> None:
    level, small_bytes, hot_level = levels
    monkeypatch.setattr("converter.hot.SMALL_BYTES_MAX", small_bytes)
    text = random.Random(2).choices([b"the", b"same", b"words", b"again", b"and", b"once", b"more"], k=60_000)
    layout.add_image("words", [TarBuilder().file("words", b" ".join(text)).build()])
    encoding = Encoding(Codec.ZSTD, level, 64 * 1024)
    convert(layout, tmp_path, "words", encoding=encoding, prefetch=parse_prefetch("words\n"))
    lazy = Lazy(out(tmp_path))
    part = lazy.bootstrap.hot
    assert part is not None
    (row,) = part.table.rows
    stored = lazy.blob(int(row["blob_index"]))[: int(row["stored_size"])]
    data = decompress(stored, Codec.ZSTD, part.table.device_size)
    assert [other for other in (1, 3, 6, 12, 19) if stored == compress(data, Codec.ZSTD, other)[1]] == [hot_level]


def test_a_list_that_names_nothing_makes_no_hot_blob(layout: Layout, tmp_path: Path) -> None:
    report = convert(layout, tmp_path, prefetch=parse_prefetch("nothing\n"))
    assert report.images[0].hot is not None
    assert report.images[0].hot.chunk_count == 0
    assert Lazy(out(tmp_path)).manifest.hot is None


def test_sparse_and_huge_files(tmp_path: Path) -> None:
    size = limits.TIB
    tar = TarBuilder().sparse_pax("1.0", "huge", size, [(0, b"start"), (size - 3, b"end")]).build()
    layout = Layout(tmp_path / "in")
    layout.add_image("app", [tar])
    report = convert(layout, tmp_path)
    lazy = Lazy(out(tmp_path))
    assert lazy.image.stat(lazy.nid(b"huge")).size == size
    assert lazy.read(b"huge", 0, 10) == b"start" + bytes(5)
    assert lazy.read(b"huge", size - 6, 10) == bytes(3) + b"end"
    assert report.images[0].size < 100_000


def test_an_image_without_layers_and_an_empty_layer(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "in")
    layout.add_image("scratch", [])
    layout.add_image("empty", [bytes(1024)])
    for tag in ("scratch", "empty"):
        convert(layout, tmp_path, tag, name=tag)
        assert Lazy(out(tmp_path, name=tag)).tree() == set()


def test_all_platforms_keep_order_platforms_and_annotations(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "in")
    members = []
    for architecture in ("s390x", "amd64", "arm64"):
        member = layout.add_image("", [BASE, TarBuilder().file("arch", architecture.encode()).build()],
                                  architecture=architecture)
        members.append({**member, "platform": {"os": "linux", "architecture": architecture},
                        "annotations": {"n": architecture}})
    attestation = layout.add_image("", [b""], config={"os": "unknown", "architecture": "unknown"})
    members.insert(1, {**attestation, "platform": {"os": "unknown", "architecture": "unknown"},
                       "annotations": {"vnd.docker.reference.type": "attestation-manifest"}})
    layout.index("app", members, annotations={"whole": "yes"})
    report = convert(layout, tmp_path, all_platforms=True)
    assert len(report.notes) == 1
    assert [image.platform for image in report.images] == ["linux/s390x", "linux/amd64", "linux/arm64"]
    digest = json.loads((tmp_path / "out/index.json").read_text())["manifests"][0]["digest"]
    index = json.loads((tmp_path / "out/blobs/sha256" / digest[7:]).read_text())
    assert index["annotations"] == {"whole": "yes"}
    assert [member["platform"]["architecture"] for member in index["manifests"]] == ["s390x", "amd64", "arm64"]
    assert [member["annotations"]["n"] for member in index["manifests"]] == ["s390x", "amd64", "arm64"]
    for architecture in ("s390x", "arm64"):
        assert Lazy(out(tmp_path), platform=f"linux/{architecture}").read(b"arch") == architecture.encode()
    again = convert(layout, tmp_path, all_platforms=True)      # members of an index are looked at for reuse
    assert again.digest == report.digest
    assert all(layer.reused for image in again.images for layer in image.layers)
    one = convert(layout, tmp_path, name="one", platform="linux/arm64")
    assert [image.platform for image in one.images] == ["linux/arm64"]
    with pytest.raises(NotFoundError):
        convert(layout, tmp_path, name="none", platform="linux/riscv64")


def assert_refused(layout: Layout, tmp_path: Path, kind: type[LazyfsError], text: str, **changes) -> None:
    with pytest.raises(kind, match=text) as caught:
        convert(layout, tmp_path, **changes)
    assert caught.value.hint, f"no next step: {caught.value}"
    assert_nothing_left(tmp_path / "out")


def assert_nothing_left(path: Path) -> None:
    """No tag, no staging; finished blobs may stay."""
    if path.exists():
        assert not [entry for entry in path.iterdir() if entry.name.startswith(".lazyfs-staging")]
        index = path / "index.json"
        assert not index.exists() or json.loads(index.read_text())["manifests"] == []


def test_a_lazy_image_is_refused(layout: Layout, tmp_path: Path) -> None:
    convert(layout, tmp_path, name="lazy")
    with pytest.raises(FormatError, match="lazy image already"):
        run_convert(out(tmp_path, "lazy", "lazy"), out(tmp_path))
    assert_nothing_left(tmp_path / "out")


@pytest.mark.parametrize("jobs", [1, 4])
def test_a_diff_id_that_does_not_match_is_refused(tmp_path: Path, jobs: int) -> None:
    layout = Layout(tmp_path / "in")
    good, bad = hashlib.sha256(BASE).hexdigest(), hashlib.sha256(b"").hexdigest()
    layout.add_image("app", [BASE, UPPER], diff_ids=[f"sha256:{good}", f"sha256:{bad}"])
    assert_refused(layout, tmp_path, IntegrityError, "layer 2 .* unpacks to", jobs=jobs)
    assert_refused(layout, tmp_path, IntegrityError, "layer 2 .* unpacks to", jobs=jobs)     # when reused, too


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "longer", "missing", "empty"])
def test_a_damaged_layer_is_refused(tmp_path: Path, compression: str, damage: str) -> None:
    layout = Layout(tmp_path / "in")
    digest = layout.add_image("app", [BASE, UPPER], compression=compression)["digest"]
    layer = json.loads((layout.blobs / digest[7:]).read_text())["layers"][0]
    path = layout.blobs / layer["digest"][7:]
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes({"flip": flipped, "truncate": data[:-100], "longer": data + b"x", "empty": b""}[damage])
    with pytest.raises(LazyfsError) as caught:
        convert(layout, tmp_path)
    assert caught.value.exit_code in (12, 20, 21)
    assert layer["digest"][7:19] in str(caught.value)
    assert caught.value.hint
    assert_nothing_left(tmp_path / "out")


def test_a_malformed_archive_names_layer_and_entry(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "in")
    layout.add_image("app", [TarBuilder().file("fine", b"x").file("a/../../b", b"x").build()])
    assert_refused(layout, tmp_path, FormatError, r"layer sha256:.*\.\./b")


def test_what_is_no_container_image_is_refused(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "in")
    layout.add_image("app", [BASE], artifactType="application/vnd.example.chart",
                     config={}, layers=[{**layout.layer(BASE), "mediaType": "application/vnd.example.thing"}])
    assert_refused(layout, tmp_path, UnsupportedError, "media type")


def test_nothing_is_left_beside_the_image(layout: Layout, tmp_path: Path) -> None:
    convert(layout, tmp_path, prefetch=parse_prefetch("noise"))
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"blobs", "index.json", "oci-layout", ".lazyfs.lock"}
    lazy = Lazy(out(tmp_path))
    named = {entry["digest"][7:] for entry in (*lazy.raw_manifest["layers"], lazy.raw_manifest["config"])}
    named.add(lazy.document.digest.hex)
    assert {path.name for path in (tmp_path / "out/blobs/sha256").iterdir()} == named


def test_archives_go_in_and_out(layout: Layout, tmp_path: Path) -> None:
    archive = f"oci-archive:{tmp_path}/out.tar:lazy"
    run_convert(layout.reference("app"), archive, journal=tmp_path / "journal")
    directory = convert(layout, tmp_path)
    lazy = Lazy(archive)
    lazy.verify()
    assert lazy.document.digest == directory.digest
    lazy.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "journal", "out", "out.tar"]
