"""The bootstrap layer: round trip, an ordinary tar for everybody else, and nothing accepted that is not exact."""

from __future__ import annotations

import io
import tarfile

import msgspec
import pytest
import zstandard

from lazyfs import limits
from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.image.bootstrap import (
    Bootstrap,
    Device,
    compress_layer,
    decompress_layer,
    pack_bootstrap,
    parse_bootstrap,
)
from lazyfs.image.erofs import ErofsImage
from lazyfs.image.table import ROW_BYTES
from lazyfs.image.ustar import Member, pack_ustar, parse_ustar
from tests.formatkit import CHUNK_SIZE, make_bootstrap

DEVICES = [bytes(range(256)) * 1024, b"", b"x" * 4096, bytes(CHUNK_SIZE * 3), b"x" * 4096]
SMALL = make_bootstrap(DEVICES, hot=[(0, 2, 1), (16, 0, 16)])
TAR = pack_bootstrap(SMALL)
NAMES = ("lazyfs/", "lazyfs/image.json", "lazyfs/tables.bin", "lazyfs/hot.bin", "lazyfs/image.erofs")


def rebuilt(**changes: object) -> bytes:
    """The tar with another image.json (fields replaced) or other members."""
    members = {member.name: bytes(member.data) for member in parse_ustar(TAR, NAMES)}
    image = msgspec.json.decode(members["lazyfs/image.json"])
    for key, value in changes.items():
        if key in ("tables", "erofs"):
            members[f"lazyfs/{'tables.bin' if key == 'tables' else 'image.erofs'}"] = value
        else:
            image[key] = value
    members["lazyfs/image.json"] = msgspec.json.encode(image)
    return pack_ustar([Member(name, members[name]) for name in NAMES])


def image_json() -> dict:
    return msgspec.json.decode(bytes(parse_ustar(TAR, NAMES)[1].data))


def test_round_trip() -> None:
    parsed = parse_bootstrap(TAR)
    assert parsed.blobs == SMALL.blobs
    assert [device.digest for device in parsed.devices] == [device.digest for device in SMALL.devices]
    for ours, theirs in zip(parsed.devices, SMALL.devices, strict=True):
        assert (ours.table.rows == theirs.table.rows).all()
    assert bytes(parsed.erofs) == SMALL.erofs
    assert pack_bootstrap(parsed) == TAR
    tree = ErofsImage.parse(parsed.erofs, [device.table.device_size for device in parsed.devices])
    assert [name for name, _, _ in tree.entries(tree.root_nid)] == [b"d0", b"d2", b"d3", b"d4"]


def test_equal_layers_share_one_blob() -> None:
    assert len(SMALL.blobs) == len(set(DEVICES)) + 1
    assert SMALL.devices[2].digest == SMALL.devices[4].digest


def test_it_is_an_ordinary_tar() -> None:
    with tarfile.open(fileobj=io.BytesIO(TAR)) as archive:
        members = archive.getmembers()
        assert [member.name for member in members] == ["lazyfs", *NAMES[1:]]
        assert {(member.mtime, member.uid, member.gid, member.mode) for member in members} == {
            (0, 0, 0, 0o555), (0, 0, 0, 0o444),
        }
        assert archive.extractfile("lazyfs/image.erofs").read() == SMALL.erofs


@pytest.mark.parametrize("position", [0, 100, 124, 148, 156, 257, 300, 511, 512, 1023])
def test_every_field_of_a_header_matters(position: int) -> None:
    broken = bytearray(TAR)
    broken[position] ^= 0x11
    with pytest.raises(FormatError):
        parse_bootstrap(bytes(broken))


@pytest.mark.parametrize("data", [b"", TAR[:511], TAR[:-512], TAR[:-1], TAR + bytes(512), bytes(2048), TAR[512:]])
def test_a_cut_or_longer_tar(data: bytes) -> None:
    with pytest.raises(FormatError):
        parse_bootstrap(data)


def damaged(kind: str) -> bytes:
    image = image_json()
    tables = bytes(parse_ustar(TAR, NAMES)[2].data)
    device = image["devices"][0]
    changes = {
        "blob twice": {"blobs": [*image["blobs"], image["blobs"][0]]},
        "two hot blobs": {"blobs": [{**blob, "hot": True} for blob in image["blobs"]]},
        "no blobs": {"blobs": []},
        "too many blobs": {"blobs": image["blobs"] * 1000},
        "blob too small": {"blobs": [{**blob, "size": 1} for blob in image["blobs"]]},
        "negative size": {"blobs": [{**image["blobs"][0], "size": -1}]},
        "bad digest": {"blobs": [{**image["blobs"][0], "digest": "sha256:00"}]},
        "device digest": {"devices": [{**device, "digest": image["devices"][2]["digest"]}, *image["devices"][1:]]},
        "device size": {"devices": [{**device, "size": device["size"] + 4096}, *image["devices"][1:]]},
        "chunk size": {"devices": [{**device, "chunkSize": 3}, *image["devices"][1:]]},
        "chunk count": {"devices": [{**device, "chunkCount": device["chunkCount"] + 1}, *image["devices"][1:]]},
        "huge device": {"devices": [{**device, "size": 1 << 62, "chunkCount": 1 << 46}, *image["devices"][1:]]},
        "fewer devices": {"devices": image["devices"][:-1]},
        "too many devices": {"devices": image["devices"] * 200},
        "row too few": {"tables": tables[:-ROW_BYTES]},
        "row cut": {"tables": tables[:-1]},
        "digest flipped": {"tables": tables[:20] + b"\xAA" + tables[21:]},
        "blob index": {"tables": tables[:12] + b"\xff\xff" + tables[14:]},
        "offset": {"tables": b"\xff" * 8 + tables[8:]},
        "not json": {"devices": "x"},
    }
    return rebuilt(**changes[kind])


@pytest.mark.parametrize(
    "kind",
    ["blob twice", "two hot blobs",
     "no blobs", "too many blobs", "blob too small", "negative size", "bad digest", "device digest",
     "device size", "chunk size", "chunk count", "huge device", "fewer devices", "too many devices", "row too few",
     "row cut", "digest flipped", "blob index", "offset", "not json"],
)
def test_damage_is_refused(kind: str) -> None:
    with pytest.raises(FormatError):
        parse_bootstrap(damaged(kind))


def test_another_version_is_unsupported_whatever_else_it_holds() -> None:
    with pytest.raises(UnsupportedError, match="version 2"):
        parse_bootstrap(rebuilt(version=2, devices={"new": "form"}))


def test_unknown_fields_of_image_json_are_passed_over() -> None:
    assert parse_bootstrap(rebuilt(future=[1, {"a": None}])).blobs == SMALL.blobs


def test_an_image_without_layers() -> None:
    empty = make_bootstrap([])
    assert parse_bootstrap(pack_bootstrap(empty)).devices == ()


def test_compressed_layer_comes_back() -> None:
    packed = compress_layer(TAR)
    assert decompress_layer(packed, len(TAR)) == TAR
    assert compress_layer(TAR) == packed


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b"",
                                    lambda data: data * 2, lambda data: b"\x1f\x8b" + data])
def test_a_damaged_frame(change) -> None:
    with pytest.raises(FormatError):
        decompress_layer(change(compress_layer(TAR)), len(TAR))


@pytest.mark.parametrize("size", [0, -1, len(TAR) - 1, len(TAR) + 1, limits.BOOTSTRAP_BYTES_MAX + 1])
def test_another_size_than_promised(size: int) -> None:
    with pytest.raises(FormatError):
        decompress_layer(compress_layer(TAR), size)


def test_a_frame_without_a_size_is_refused() -> None:
    bomb = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 26))
    with pytest.raises(FormatError):
        decompress_layer(bomb, 1 << 26)


def test_devices_keep_their_own_objects() -> None:
    device = SMALL.devices[0]
    copy = Bootstrap(SMALL.blobs, (Device(device.digest, device.table), *SMALL.devices[1:]), SMALL.erofs, SMALL.hot)
    assert pack_bootstrap(copy) == TAR
