"""docs/format.md is true: its examples decode by its own rules alone, and by our code; its limits are our constants."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path

import lz4.block
import msgspec
import zstandard
from blake3 import blake3

from lazyfs import limits
from lazyfs.image import manifest as manifest_module
from lazyfs.image.blob import FOOTER_BYTES, parse_tail
from lazyfs.image.codec import Codec
from lazyfs.image.descriptor import Descriptor
from lazyfs.image.digest import Digest
from lazyfs.image.hot import EXTENT, HEAD_BYTES, pack_hot, parse_hot
from lazyfs.image.manifest import BLOB_TYPE, BOOTSTRAP_TYPE, PREFIX, LazyBootstrap, parse_lazy_manifest
from lazyfs.image.model import EntryKind, FileType
from lazyfs.image.oci import Manifest
from lazyfs.image.prefetch import parse_prefetch
from lazyfs.image.table import ROW

DOCUMENT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


def example(name: str) -> str:
    (text,) = re.findall(rf"^```\w+ {re.escape(name)}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    return text


BLOB = bytes.fromhex("".join(example("blob").split()))


def test_blob_by_the_text_alone() -> None:
    footer = BLOB[-96:]
    magic, version, kind, chunk_size = struct.unpack_from("<8sHHI", footer)
    numbers = struct.unpack_from("<8Q", footer, 16)
    device_size, data_size, meta_at, meta_size, table_at, table_size, entries, chunks = numbers
    assert (magic, version, kind, chunk_size, device_size) == (b"LAZYBLOB", 1, 1, 65536, 4096)
    assert (meta_at, table_at, len(BLOB) - 96) == (data_size, meta_at + meta_size, table_at + table_size)
    assert (entries, chunks, table_size, footer[80:]) == (5, 1, 48, bytes(16))
    offset, stored_size, blob_index, codec, reserved = struct.unpack_from("<QIHBB", BLOB, table_at)
    assert (offset, stored_size, blob_index, codec, reserved) == (0, 36, 0, 2, 0)
    device = lz4.block.decompress(BLOB[:36], uncompressed_size=4096)
    digest = BLOB[table_at + 16 : table_at + 48]
    assert blake3(device).digest() == digest
    identity = hashlib.sha256(b"lazyfs-device-1\0" + struct.pack("<IQ", chunk_size, device_size) + digest).hexdigest()
    assert f"sha256:{identity}" in DOCUMENT
    raw = zstandard.ZstdDecompressor().decompress(BLOB[meta_at : meta_at + meta_size])
    assert raw.startswith(bytes.fromhex("9598 02c4 0365 7463"))
    etc, motd, issue, sh, old = msgspec.msgpack.decode(raw)
    assert etc == [2, b"etc", 0o755, 0, 0, 1_700_000_000, 0, []]
    assert motd == [1, b"etc/motd", 0o644, 0, 0, 1_700_000_000, 5, [[b"user.a", b"b"]], 3000, 12, [[0, 1, 0]]]
    assert (issue, sh[0], sh[-1], old) == ([8, b"etc/issue", b"etc/motd"], 7, b"bin/sh", [9, b"old"])
    assert device[:3000] == b"hello\n" * 500
    assert not any(device[3000:])


def test_blob_by_our_code() -> None:
    table, entries = parse_tail(BLOB[36:], len(BLOB))
    assert [(entry.path, entry.kind, entry.type) for entry in entries] == [
        (b"etc", EntryKind.NODE, FileType.DIRECTORY), (b"etc/motd", EntryKind.NODE, FileType.REGULAR),
        (b"etc/issue", EntryKind.HARDLINK, FileType.REGULAR), (b"sh", EntryKind.NODE, FileType.SYMLINK),
        (b"old", EntryKind.WHITEOUT, FileType.REGULAR),
    ]
    assert table.device_digest().text in DOCUMENT


def test_hot_part_by_the_text_alone_and_by_our_code() -> None:
    data = bytes.fromhex("".join(example("hot.bin").split()))
    head = struct.unpack_from("<8sHHIQII32s", data)
    magic, version, reserved, chunk_size, device_size, chunks, extents, digest = head
    assert (magic, version, reserved) == (b"LAZYHOT\0", 1, 0)
    assert (chunk_size, device_size, chunks, extents) == (1 << 20, 4096, 1, 1)
    assert struct.unpack_from("<QIHBB", data, 64) == (0, 36, 1, 2, 0)
    content = blake3(lz4.block.decompress(BLOB[:36], uncompressed_size=4096)).digest()
    assert data[80:112] == content
    named = b"lazyfs-device-1\0" + struct.pack("<IQ", chunk_size, device_size) + content
    assert digest == hashlib.sha256(named).digest()
    assert struct.unpack("<IHH", data[112:]) == (0, 0, 1)
    part = parse_hot(data, [4096], [len(BLOB), 36 + FOOTER_BYTES], 1)
    assert pack_hot(part) == data
    assert f"{HEAD_BYTES} bytes of head" in DOCUMENT
    for name, (dtype, offset, *_) in EXTENT.fields.items():
        assert re.search(rf"^\| {offset} \| {dtype.itemsize} \| `{name}`", DOCUMENT, re.MULTILINE)


def test_descriptor_and_image_json() -> None:
    raw = json.loads(example("blob descriptor"))
    assert raw["mediaType"] == BLOB_TYPE
    blob = Descriptor(raw["mediaType"], Digest(raw["digest"]), raw["size"], raw["annotations"])
    last = Descriptor(BOOTSTRAP_TYPE, Digest.of(b""), 10, {PREFIX + "version": "1", PREFIX + "bootstrap": "1",
                                                           PREFIX + "bootstrap.size": "20"})
    notes = {PREFIX + "version": "1", PREFIX + "source": Digest.of(b"").text}
    lazy = parse_lazy_manifest(Manifest("", blob, (blob, last), notes))
    assert (lazy.layers[0].tail_size, lazy.layers[0].options) == (35716, "v1.2,lz4,6,262144")
    assert lazy.bootstrap == LazyBootstrap(Digest.of(b""), 10, 20)
    image = json.loads(example("image.json"))
    assert list(image) == ["version", "blobs", "devices"]
    assert list(image["blobs"][0]) == ["digest", "size", "hot"]
    assert list(image["devices"][0]) == ["digest", "size", "chunkSize", "chunkCount"]


def test_every_annotation_and_media_type_is_described() -> None:
    keys = [value for name, value in vars(manifest_module).items() if name.endswith("_KEY")]
    assert len(keys) == 10
    for key in keys:
        assert f"`{key.removeprefix(PREFIX)}`" in DOCUMENT, key
    assert f"`{BLOB_TYPE}`" in DOCUMENT
    assert f"`{BOOTSTRAP_TYPE}`" in DOCUMENT
    assert PREFIX in DOCUMENT


def test_limits_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| [^|]+ \| (\d+)(?: bytes)? \| `([A-Z_]+)` \|$", DOCUMENT, re.MULTILINE)
    assert len(rows) >= 15
    for value, name in rows:
        assert getattr(limits, name) == int(value), name


def test_tables_of_structures_are_those_of_the_code() -> None:
    for codec in Codec:
        assert re.search(rf"^\| {int(codec)} \| {codec.name.lower()} \|", DOCUMENT, re.MULTILINE)
    for name in ("blob_offset", "stored_size", "blob_index", "codec"):
        dtype, offset = ROW.fields[name][:2]
        assert re.search(rf"^\| {offset} \| {dtype.itemsize} \| `{name}`", DOCUMENT, re.MULTILINE)
    assert f"last {FOOTER_BYTES} bytes" in DOCUMENT


def test_prefetch_example() -> None:
    entries = parse_prefetch(example("prefetch")).entries
    assert entries[1].ranges == ((0, 65536), (1048576, None))
    assert entries[2].components == (b"usr", b"lib", b"python3.11", b"**", b"*.py")
    assert entries[3].components == (b"opt", b"a b", b"\xff[draft][*].txt")
    assert [(entry.share, entry.first_ms) for entry in entries] == [(1, 0), (1, 2.5), (0.67, None), (1, None)]
    header = parse_prefetch(example("prefetch")).header
    assert (header.image[:23], header.tool, header.runs) == ("registry.example/python", "lazyfs 0.1.0", 3)
