"""docker-archive:, and the walk over a tar that both archive transports stand on."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile
import time
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyfs.errors import FormatError, IntegrityError, LazyfsError, NotFoundError, UsageError
from lazyfs.image.digest import Digest
from lazyfs.registry import RegistryOptions, open_destination, open_source
from lazyfs.registry.documents import DOCKER_MANIFEST
from lazyfs.registry.tarindex import index_tar
from tests.smallimage import write_image

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS = RegistryOptions()
LAYERS = [b"\0" * 10_240, b"another layer" * 100, b"\0" * 10_240]


Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> Member:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type, entry.linkname = len(data), kind, target
    return entry, data


def tar_of(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for entry, data in members:
            tar.addfile(entry, io.BytesIO(data) if data else None)
    return buffer.getvalue()


def saved(*, modern: bool = False, names: list[str] | None = None, layers: list[bytes] = LAYERS,
          diff_ids: list[str] | None = None) -> bytes:
    """What docker save writes: old (ID/layer.tar, equal layers as symlinks) or new (blobs/sha256)."""
    diff_ids = [str(Digest.of(layer)) for layer in layers] if diff_ids is None else diff_ids
    config = msgspec.json.encode(
        {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}})
    members = []
    if modern:
        paths = [f"blobs/sha256/{Digest.of(layer).hex}" for layer in layers]
        config_path = f"blobs/sha256/{Digest.of(config).hex}"
        members = [member("blobs/", kind=tarfile.DIRTYPE), member("blobs/sha256/", kind=tarfile.DIRTYPE),
                   member("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'), member("index.json", b"{}")]
        members += [member(path, layer) for path, layer in dict(zip(paths, layers, strict=True)).items()]
    else:
        paths, config_path = [f"{number:064x}/layer.tar" for number in range(len(layers))], "config.json"
        for number, (path, layer) in enumerate(zip(paths, layers, strict=True)):
            first = layers.index(layer)
            members += [member(f"{number:064x}/", kind=tarfile.DIRTYPE), member(f"{number:064x}/VERSION", b"1.0")]
            members.append(member(path, layer) if first == number else
                           member(path, kind=tarfile.SYMTYPE, target=f"../{first:064x}/layer.tar"))
    images = [{"Config": config_path, "RepoTags": [name], "Layers": paths} for name in names or ["app:1"]]
    return tar_of(*members, member(config_path, config), member("manifest.json", json.dumps(images).encode()))


def check(text: str) -> None:
    source = open_source(text, OPTIONS)
    document = source.root()
    assert document.media_type == DOCKER_MANIFEST
    manifest = json.loads(document.data)
    config = source.read_blob(Digest(manifest["config"]["digest"]), manifest["config"]["size"])
    assert json.loads(config)["os"] == "linux"
    assert len(manifest["layers"]) == len(LAYERS)
    for entry, layer in zip(manifest["layers"], LAYERS, strict=True):
        assert entry == {"mediaType": "application/vnd.docker.image.rootfs.diff.tar", "size": len(layer),
                         "digest": str(Digest.of(layer))}
        assert source.read_blob(Digest(entry["digest"]), entry["size"]) == layer
        with source.read_range(Digest(entry["digest"]), 100, 50, time.monotonic() + 5) as stream:
            assert stream.read(100) == layer[100:150]
    with pytest.raises(NotFoundError):
        source.open_blob(Digest.of(b"none"), 4)
    with pytest.raises(NotFoundError):
        source.document(Digest.of(b"none"))
    assert source.document(document.digest) == document
    source.close()


@pytest.mark.parametrize("modern", [False, True])
def test_both_shapes_of_docker_save(tmp_path: Path, modern: bool) -> None:
    (tmp_path / "x.tar").write_bytes(saved(modern=modern))
    check(f"docker-archive:{tmp_path}/x.tar")
    check(f"docker-archive:{tmp_path}/x.tar:app:1")
    check(f"docker-archive:{tmp_path}/x.tar:docker.io/library/app:1")
    check(f"docker-archive:{tmp_path}/x.tar:@0")
    for text in ("app:2", "other", "@1"):
        with pytest.raises(NotFoundError):
            open_source(f"docker-archive:{tmp_path}/x.tar:{text}", OPTIONS)


def test_several_images_need_a_name(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(saved(names=["app:1", "localhost:5000/app:2"]))
    with pytest.raises(UsageError, match="localhost:5000/app:2"):
        open_source(f"docker-archive:{tmp_path}/x.tar", OPTIONS)
    check(f"docker-archive:{tmp_path}/x.tar:localhost:5000/app:2")


def test_compressed_layers_get_their_own_digest(tmp_path: Path) -> None:
    packed = gzip.compress(LAYERS[1], mtime=0)
    (tmp_path / "x.tar").write_bytes(saved(layers=[packed], diff_ids=[str(Digest.of(LAYERS[1]))]))
    source = open_source(f"docker-archive:{tmp_path}/x.tar", OPTIONS)
    (layer,) = json.loads(source.root().data)["layers"]
    assert layer["mediaType"].endswith(".tar.gzip")
    assert source.read_blob(Digest(layer["digest"]), layer["size"]) == packed
    source.close()


def test_damaged_layers_do_not_pass(tmp_path: Path) -> None:
    data = bytearray(saved(modern=True))
    data[data.index(b"another layer")] ^= 1
    (tmp_path / "x.tar").write_bytes(data)
    source = open_source(f"docker-archive:{tmp_path}/x.tar", OPTIONS)
    with pytest.raises(IntegrityError):
        source.read_blob(Digest.of(LAYERS[1]), len(LAYERS[1]))
    source.close()


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
def test_what_skopeo_writes(tmp_path: Path) -> None:
    destination = open_destination(f"oci:{tmp_path}/d:1", OPTIONS)
    write_image(destination, LAYERS)
    destination.close()
    subprocess.run(["skopeo", "copy", "-q", "--insecure-policy", f"oci:{tmp_path}/d:1",
                    f"docker-archive:{tmp_path}/x.tar:app:1"], check=True)
    check(f"docker-archive:{tmp_path}/x.tar:app:1")


@pytest.mark.parametrize("transport", ["docker-archive", "oci-archive"])
@pytest.mark.parametrize(("tool", "pack"), [("gunzip", gzip.compress), ("unxz", lambda d: b"\xfd7zXZ\0" + d),
                                            ("unzstd", lambda d: b"\x28\xb5\x2f\xfd" + d)])
def test_compressed_archives_are_refused_with_the_remedy(
    tmp_path: Path, transport: str, tool: str, pack: object
) -> None:
    assert callable(pack)
    (tmp_path / "x.tar.gz").write_bytes(pack(saved()))
    with pytest.raises(UsageError) as caught:
        open_source(f"{transport}:{tmp_path}/x.tar.gz", OPTIONS)
    assert tool in caught.value.hint


@pytest.mark.parametrize("content", [
    b"", b"x" * 512, b"\0" * 512, tar_of(), tar_of(member("manifest.json", b"{}")), saved()[:-10_240 * 2],
    tar_of(member("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'), member("index.json", b"{}")),
    tar_of(member("manifest.json", b"[]"), member("manifest.json", b"[1]")),
    tar_of(member("manifest.json", b'[{"Config":"c","Layers":["l"]}]'), member("c", b"{}"), member("l", b"x")),
    tar_of(member("../manifest.json", b"[]")), tar_of(member("/manifest.json", b"[]")),
    tar_of(member("manifest.json", kind=tarfile.SYMTYPE, target="../../etc/passwd")),
    tar_of(member("a", kind=tarfile.CHRTYPE)), saved(diff_ids=["sha256:1"]), saved(diff_ids=["sha256:1"] * 3),
    saved(diff_ids=[]),
])
def test_other_content(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises((FormatError, UsageError)):
        open_source(f"docker-archive:{tmp_path}/x.tar", OPTIONS).root()


def test_loops_of_links_end(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_of(
        member("manifest.json", b'[{"Config":"c","Layers":[]}]'), member("c", kind=tarfile.SYMTYPE, target="d"),
        member("d", kind=tarfile.LNKTYPE, target="c")))
    with pytest.raises(FormatError, match="loop"):
        open_source(f"docker-archive:{tmp_path}/x.tar", OPTIONS)


def index(tmp_path: Path, data: bytes) -> dict[str, bytes]:
    path = tmp_path / "walk.tar"
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        found = index_tar(descriptor, len(data), "walk.tar")
        for one in found.values():
            assert 0 <= one.offset <= one.offset + one.size <= len(data)
        return {name: data[one.offset : one.offset + one.size] for name, one in found.items() if not one.target}
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_walk_finds_what_tarfile_wrote(tmp_path: Path, form: int) -> None:
    contents = {"a": b"1", "dir/b": b"22" * 1000, "empty": b"", "x" * 90 + "/" + "y" * 60: b"long"}
    if form != tarfile.USTAR_FORMAT:
        contents |= {"z" * 300: b"longer", "dir/äöü": b"utf-8"}
    members = [member(f"./{name}" if name == "a" else name, content) for name, content in contents.items()]
    data = tar_of(member("dir/", kind=tarfile.DIRTYPE), *members, form=form)
    assert index(tmp_path, data) == contents


def test_sizes_of_8_gib_and_more_are_understood(tmp_path: Path) -> None:
    """A sparse file stands in for the data; both GNU's base-256 and pax' decimal size."""
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        entry = tarfile.TarInfo("big")
        entry.size = (9 << 30) + 5
        header = entry.tobuf(form)
        path = tmp_path / "big.tar"
        path.write_bytes(header)
        end = len(header) + (9 << 30) + 512
        os.truncate(path, end + 1024)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            (found,) = index_tar(descriptor, end + 1024, "big.tar").values()
            assert (found.offset, found.size) == (len(header), entry.size)
            with pytest.raises(FormatError):
                index_tar(descriptor, end - 512 - 6, "big.tar")
        finally:
            os.close(descriptor)
            path.unlink()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([saved(), saved(modern=True), tar_of(member("p" * 300, b"x"), form=tarfile.PAX_FORMAT)]),
       st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 255)), min_size=1, max_size=6), st.booleans(),
       st.data())
def test_mutations_give_an_image_or_an_error_of_ours(
    tmp_path: Path, base: bytes, changes: list[tuple[int, int]], cut: bool, data: st.DataObject
) -> None:
    spoiled = bytearray(base)
    for position, value in changes:
        spoiled[position % len(spoiled)] = value
    if cut:
        del spoiled[data.draw(st.integers(0, len(spoiled))) :]
    (tmp_path / "m.tar").write_bytes(spoiled)
    try:
        source = open_source(f"docker-archive:{tmp_path}/m.tar", OPTIONS)
    except LazyfsError:
        return
    source.root()
    source.close()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_pax_headers_of_any_bytes(tmp_path: Path, payload: bytes) -> None:
    pax = member("PaxHeader", payload, kind=tarfile.XHDTYPE)
    data = tar_of(pax, member("after", b"data"))
    try:
        index(tmp_path, data)
    except FormatError:
        return


def test_messages_name_the_other_kind_of_archive(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(saved())
    with (contextlib.closing(open_source(f"oci-archive:{tmp_path}/x.tar", OPTIONS)) as source,
          pytest.raises(NotFoundError, match="no OCI image layout") as caught):
        source.root()
    assert caught.value.hint == "try docker-archive:"
    (tmp_path / "text").write_bytes(b"root:x:0:0:root:/root:/bin/bash\n" * 100)
    with pytest.raises(FormatError, match="not a tar archive"):
        open_source(f"oci-archive:{tmp_path}/text", OPTIONS)
