"""`lazyfs check` and `lazyfs inspect` on converted images: what is whole passes, each damage has its exit code."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from converter import differences as differences_module
from converter import filesums, hot
from converter.differences import Differences
from lazyfs.cli.check import check_command
from lazyfs.cli.inspect import inspect_command
from lazyfs.errors import CheckError, FormatError, IntegrityError, LazyfsError, NotFoundError
from lazyfs.image.blob import FOOTER_BYTES
from lazyfs.image.prefetch import parse_prefetch
from tests.convertkit import OPTIONS, Layout, run_convert
from tests.tarbuilder import TarBuilder

BIG = os.urandom(200_000) + b"compressible " * 10_000


def lower(**changes: bytes) -> bytes:
    builder = TarBuilder()
    builder.directory("d").file("d/big", changes.get("big", BIG)).file("d/small", changes.get("small", b"x"))
    builder.file("gone", b"y").symlink("link", changes.get("link", b"d/big").decode()).hardlink("hard", "d/big")
    return builder.build()


def upper() -> bytes:
    return TarBuilder().file(".wh.gone", b"").file("d/late", b"late" * 50_000).build()


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))    # no blob that another test damaged is found again
    made = Layout(tmp_path / "in")
    made.add_image("a", [lower(), upper()], config={"variant": "v8", "architecture": "arm64"})
    return made


def converted(layout: Layout, tag: str = "a", **options) -> str:
    destination = f"oci:{layout.path.parent}/out:{tag}"
    if options.get("prefetch") is not None:
        options["prefetch"] = parse_prefetch(options["prefetch"])
    run_convert(layout.reference(tag), destination, **options)
    return destination


def run_check(*words: str) -> tuple[int, list[str]]:
    """(exit code, lines on stdout)"""
    result = CliRunner().invoke(check_command, [*words, "--quiet"])
    error = result.exception
    if error is not None and not isinstance(error, (LazyfsError, SystemExit)):
        raise error
    code = error.exit_code if isinstance(error, LazyfsError) else result.exit_code
    return code, result.stdout.splitlines()


def blob_path(reference: str, digest: str) -> Path:
    return Path(reference.split(":")[1]) / "blobs" / "sha256" / digest.removeprefix("sha256:")


def described(reference: str) -> dict:
    result = CliRunner().invoke(inspect_command, [reference, "--json"], catch_exceptions=False)
    (image,) = json.loads(result.stdout)["images"]
    return image


def manifest_of(layout: Layout, tag: str) -> dict:
    entries = json.loads((layout.path / "index.json").read_bytes())["manifests"]
    (digest,) = [entry["digest"] for entry in entries
                 if entry["annotations"]["org.opencontainers.image.ref.name"] == tag]
    return json.loads((layout.blobs / digest.removeprefix("sha256:")).read_bytes())


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x20
    path.write_bytes(data)


@pytest.mark.parametrize("prefetch", [None, b"d/big\nhard\nd/*"])
def test_a_good_image_passes(layout: Layout, prefetch: bytes | None) -> None:
    reference = converted(layout, prefetch=prefetch)
    assert run_check(reference) == (0, [])
    assert run_check(reference, layout.reference("a")) == (0, [])


def test_a_sparse_file_of_a_tebibyte_is_compared(layout: Layout) -> None:
    tar = TarBuilder().sparse_gnu("s", 1 << 40, [(0, b"a"), ((1 << 40) - 4096, b"b" * 4096)]).build()
    layout.add_image("s", [tar])
    reference = converted(layout, "s")
    assert run_check(reference, layout.reference("s")) == (0, [])


def test_a_file_of_more_chunks_than_are_kept_is_compared(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """So well compressed that one request brings more chunks than the cache holds."""
    monkeypatch.setattr(filesums, "_CACHE_BYTES", 3 * OPTIONS.encoding.chunk_size)
    layout.add_image("c", [TarBuilder().file("f", b"compressible " * 50_000).build()])
    reference = converted(layout, "c")
    assert run_check(reference, layout.reference("c")) == (0, [])


def test_a_damaged_source_layer_is_told_from_a_badly_made_one(layout: Layout) -> None:
    """Another archive in a layer's place, whose headers are wrong as well: its digest is what is wrong."""
    reference = converted(layout)
    manifest = manifest_of(layout, "a")
    broken = gzip.compress(b"no header at all" * 32 + bytes(1024))
    layout.corrupt(manifest["layers"][0]["digest"], broken.ljust(manifest["layers"][0]["size"], b"\0"))
    result = CliRunner().invoke(check_command, [reference, layout.reference("a"), "--quiet"])
    assert isinstance(result.exception, IntegrityError)


@pytest.mark.parametrize("where", ["first byte", "middle", "footer", "hot"])
def test_a_flipped_bit_in_a_blob_is_found(layout: Layout, where: str) -> None:
    reference = converted(layout, prefetch=b"d/late")
    image = described(reference)
    path = blob_path(reference, image["hot"]["digest"] if where == "hot" else image["layers"][0]["blob"])
    size = path.stat().st_size
    flip(path, {"first byte": 0, "middle": size // 2, "footer": size - FOOTER_BYTES + 3, "hot": 5}[where])
    code, lines = run_check(reference)
    assert code == 51
    assert all(line.startswith("chunk: ") for line in lines)
    assert path.name[:12] in lines[0]
    if where == "hot":
        assert "hot blob" in lines[0]


@pytest.mark.parametrize("with_source", [False, True])
def test_a_hot_blob_that_is_sound_but_holds_other_bytes_is_found(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, with_source: bool
) -> None:
    write = hot._pwrite
    monkeypatch.setattr(hot, "_pwrite", lambda device, data, place: write(device, b"\7" + bytes(data)[1:], place))
    reference = converted(layout, prefetch=b"d/late\nd/small")
    code, lines = run_check(reference, *([layout.reference("a")] if with_source else []))
    assert code == 51
    assert sum(int(line.split(": ")[2].split()[0]) for line in lines) == 5     # d/late lies in four chunks
    assert all("hot blocks hold other bytes than their layers" in line for line in lines)


def test_a_cut_and_a_missing_blob_are_found(layout: Layout) -> None:
    reference = converted(layout)
    path = blob_path(reference, described(reference)["layers"][1]["blob"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    code, lines = run_check(reference)
    assert (code, lines != []) == (51, True)
    path.unlink()
    code, lines = run_check(reference)
    assert (code, lines != []) == (51, True)
    path.write_bytes(whole)
    assert run_check(reference) == (0, [])


@pytest.mark.parametrize(
    ("layers", "config", "code", "line"),
    [
        ([lower(small=b"z"), upper()], {}, 54, "content: /d/small: other bytes, first in the 64 KiB from byte 0"),
        ([lower(small=b"xx"), upper()], {}, 54, "content: /d/small: has 1 bytes, should have 2"),
        ([lower(big=BIG[:150_000] + b"?" + BIG[150_001:]), upper()], {}, 54,
         "content: /d/big: other bytes, first in the 64 KiB from byte 131072"),
        ([lower(link=b"d/small"), upper()], {}, 53, "metadata: /link: points to b'd/big', should point to b'd/small'"),
        ([lower()], {}, 52, "tree: /d/late: should not be there"),
        ([lower(), TarBuilder().file("d/late", b"late" * 50_000).build()], {}, 52, "tree: /gone: is missing"),
        ([lower(), upper(), TarBuilder().directory("d/late").build()], {}, 52,
         "tree: /d/late: is a regular, should be a directory"),
        ([lower(), upper(), TarBuilder().directory("d", mode=0o711, uid=5, mtime=9).build()], {}, 53,
         "metadata: /d: mode is 0755, should be 0711"),
        ([lower(), upper()], {"config": {"Cmd": ["/other"]}}, 55, "config: config field 'config' differs"),
    ],
)
def test_each_kind_of_difference(layout: Layout, layers: list[bytes], config: dict, code: int, line: str) -> None:
    layout.add_image("other", layers, config={"variant": "v8", "architecture": "arm64", **config})
    found, lines = run_check(converted(layout), layout.reference("other"))
    assert found == code, lines
    assert line in lines


def test_hard_link_groups_are_compared(layout: Layout) -> None:
    copy = TarBuilder().file("hard", BIG).build()
    layout.add_image("other", [lower(), upper(), copy], config={"variant": "v8", "architecture": "arm64"})
    code, lines = run_check(converted(layout), layout.reference("other"))
    assert code == 53
    assert any("another group of hard links" in line for line in lines)


def test_only_the_first_differences_are_printed(layout: Layout) -> None:
    builder = TarBuilder()
    for number in range(50):
        builder.file(f"n{number:02}", b"")
    layout.add_image("other", [lower(), upper(), builder.build()], config={"variant": "v8", "architecture": "arm64"})
    code, lines = run_check(converted(layout), layout.reference("other"))
    assert code == 52
    assert lines[0] == "tree: /n00: is missing"
    assert len(lines) == 21
    assert lines[-1].startswith("... and ")


def test_json_of_check(layout: Layout) -> None:
    reference = converted(layout)
    flip(blob_path(reference, described(reference)["layers"][0]["blob"]), 0)
    result = CliRunner().invoke(check_command, [reference, layout.reference("a"), "--json", "--quiet"])
    assert isinstance(result.exception, CheckError)
    report = json.loads(result.stdout)
    assert report["counts"]["chunk"] >= 1
    assert report["counts"]["content"] >= 1
    assert report["differences"][0]["kind"] == "chunk"


def test_check_wants_a_lazy_image(layout: Layout) -> None:
    result = CliRunner().invoke(check_command, [layout.reference("a"), "--quiet"])
    assert isinstance(result.exception, FormatError)
    assert "lazyfs convert" in result.exception.hint


def test_kinds_are_weighed_in_order() -> None:
    found = Differences()
    assert found.error() is None
    for kind in reversed(differences_module.KINDS):
        found.add(kind, f"about {kind}")
        assert type(found.error()) is differences_module.KINDS[kind]
    assert [kind for kind, _ in found.first()] == list(differences_module.KINDS)


# --- inspect --------------------------------------------------------------------------------------------------------


def test_inspect_tells_what_is_there(layout: Layout) -> None:
    reference = converted(layout, prefetch=b"d/late\nlink")
    image = described(reference)
    assert (image["lazy"], image["platform"]) == (True, "linux/arm64/v8")
    source = json.loads((layout.blobs / image["source"].removeprefix("sha256:")).read_bytes())
    assert [layer["source"] for layer in image["layers"]] == [layer["digest"] for layer in source["layers"]]
    for layer in image["layers"]:
        data = blob_path(reference, layer["blob"]).read_bytes()
        assert layer["blob"] == "sha256:" + hashlib.sha256(data).hexdigest()
        assert layer["size"] == len(data)
        assert sum(layer["codecs"].values()) == layer["chunks"]
    assert image["entries"] == {"regular": 4, "directory": 1, "symlink": 1}
    assert image["inodes"] == 6
    part = image["hot"]
    assert part["uncompressedSize"] % 4096 == 0
    assert 0 < part["size"] < part["uncompressedSize"]
    assert (part["chunks"], part["chunkSize"]) == (1, 1 << 20)
    assert part["extents"] >= 2
    assert 0.9 < part["share"] < 1.1     # nearly all of it, in chunks of another size
    text = CliRunner().invoke(inspect_command, [reference], catch_exceptions=False).stdout
    for word in ("linux/arm64/v8", image["digest"], image["layers"][1]["blob"][:19], "hot part", "bootstrap",
    "4 regular"):
        assert word in text


def test_inspect_of_an_ordinary_image_lists_its_layers_and_says_what_to_do(layout: Layout) -> None:
    result = CliRunner().invoke(inspect_command, [layout.reference("a")], catch_exceptions=False)
    assert "not a lazy image" in result.stdout
    assert result.stdout.count("sha256:") == 2
    assert "lazyfs convert" in result.stderr
    assert described(layout.reference("a"))["lazy"] is False


def test_inspect_of_an_index_shows_all_platforms(layout: Layout) -> None:
    members = []
    for architecture in ("amd64", "s390x"):
        descriptor = layout.add_image("", [TarBuilder().file("f", b"x").build()], architecture=architecture)
        members.append({**descriptor, "platform": {"os": "linux", "architecture": architecture}})
    layout.index("multi", members)
    reference = converted(layout, "multi", all_platforms=True)
    result = CliRunner().invoke(inspect_command, [reference, "--json"], catch_exceptions=False)
    assert [one["platform"] for one in json.load(io.StringIO(result.stdout))["images"]] == ["linux/amd64",
    "linux/s390x"]
    one = CliRunner().invoke(inspect_command, [reference, "--json", "--platform",
    "linux/s390x"], catch_exceptions=False)
    assert [image["platform"] for image in json.loads(one.stdout)["images"]] == ["linux/s390x"]
    assert run_check("--platform", "linux/s390x", reference, layout.reference("multi")) == (0, [])


def test_inspect_of_an_empty_index_is_an_error(layout: Layout) -> None:
    layout.index("empty", [])
    with pytest.raises(NotFoundError, match="names no image"):
        CliRunner().invoke(inspect_command, [layout.reference("empty")], catch_exceptions=False)
