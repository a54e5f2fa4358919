"""
Source images for conversion tests, as OCI image-layout directories, and a conversion in one call.

    layout = Layout(tmp_path / "in")
    layout.add_image("app", [TarBuilder().file("a", b"x").build()])       # tag, layer archives, lowest first
    report = run_convert(layout.reference("app"), f"oci:{tmp_path}/out:app")
    Lazy(f"oci:{tmp_path}/out:app").read(b"a")                            # what a reader would get
    with registry_with(tmp_path, {"app": [tar_of({"a": b"x"})]}) as registry:    # docker://{registry.host}/app:lazy

Everything can be made wrong: `diff_ids`, `config`, `corrupt()`; `index()` makes an index of several images.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import zstandard

from converter.build import convert
from converter.encode import Encoding
from converter.journal import Journal
from converter.report import ConvertOptions, ConvertReport, Events
from lazyfs.image.blob import FOOTER_BYTES, parse_footer
from lazyfs.image.bootstrap import Bootstrap, decompress_layer, parse_bootstrap
from lazyfs.image.codec import Codec, decompress
from lazyfs.image.digest import Digest, chunk_digest
from lazyfs.image.erofs import ErofsImage
from lazyfs.image.manifest import parse_lazy_manifest, parse_manifest
from lazyfs.limits import BLOCK_SIZE_BYTES
from lazyfs.registry import RegistryOptions, open_destination, open_source
from lazyfs.registry.select import select_image
from tests.registrykit import Registry, running_registry
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from lazyfs.image.table import ChunkTable

LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
OPTIONS = ConvertOptions(Encoding(Codec.LZ4, 1, 64 * 1024), jobs=2)


class Layout:
    """An OCI image-layout directory, written by hand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blobs = path / "blobs" / "sha256"
        self.blobs.mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        self._entries: list[dict[str, Any]] = []

    def reference(self, tag: str) -> str:
        return f"oci:{self.path}:{tag}"

    def put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        (self.blobs / digest).write_bytes(data)
        return f"sha256:{digest}"

    def layer(self, tar: bytes, compression: str = "gzip") -> dict[str, Any]:
        data, suffix = tar, ""
        if compression == "gzip":
            data, suffix = gzip.compress(tar, 1, mtime=0), "+gzip"
        elif compression == "zstd":
            data, suffix = zstandard.ZstdCompressor(level=1).compress(tar), "+zstd"
        return {"mediaType": LAYER_TYPE + suffix, "digest": self.put(data), "size": len(data)}

    def add_image(
        self, tag: str, tars: Sequence[bytes], *, compression: str = "gzip", architecture: str = "amd64",
        diff_ids: Sequence[str] | None = None, config: dict[str, Any] | None = None, **manifest: Any,
    ) -> dict[str, Any]:
        """Returns the manifest's descriptor. Without a tag it is not in index.json."""
        if diff_ids is None:
            diff_ids = ["sha256:" + hashlib.sha256(tar).hexdigest() for tar in tars]
        full = {"architecture": architecture, "os": "linux", "config": {"Cmd": ["/bin/sh"], "Env": ["A=b"]},
                "rootfs": {"type": "layers", "diff_ids": list(diff_ids)}, **(config or {})}
        packed = json.dumps(full).encode()
        document = {
            "schemaVersion": 2, "mediaType": MANIFEST_TYPE,
            "config": {"mediaType": CONFIG_TYPE, "digest": self.put(packed), "size": len(packed)},
            "layers": [self.layer(tar, compression) for tar in tars], **manifest,
        }
        return self.add_document(tag, document, MANIFEST_TYPE)

    def index(self, tag: str, members: Sequence[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        document = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": list(members), **fields}
        return self.add_document(tag, document, INDEX_TYPE)

    def add_document(self, tag: str, document: dict[str, Any], media_type: str) -> dict[str, Any]:
        data = json.dumps(document).encode()
        descriptor = {"mediaType": media_type, "digest": self.put(data), "size": len(data)}
        if tag:
            self._entries = [entry for entry in self._entries
                             if entry["annotations"]["org.opencontainers.image.ref.name"] != tag]
            self._entries.append({**descriptor, "annotations": {"org.opencontainers.image.ref.name": tag}})
            index = {"schemaVersion": 2, "manifests": self._entries}
            (self.path / "index.json").write_text(json.dumps(index))
        return descriptor

    def corrupt(self, digest: str, data: bytes) -> None:
        """Put other bytes in a blob's place."""
        (self.blobs / digest.removeprefix("sha256:")).write_bytes(data)


def run_convert(
    source: str, destination: str, options: ConvertOptions = OPTIONS, *, journal: Path | None = None,
    registry: RegistryOptions | None = None, events: Events | None = None, **changes: Any,
) -> ConvertReport:
    """Convert as the command line does; `changes` are fields of ConvertOptions."""
    registry = registry or RegistryOptions()
    opened = open_source(source, registry)
    try:
        target = open_destination(destination, registry)
        try:
            return convert(opened, target, replace(options, **changes), events=events,
                           journal=None if journal is None else Journal(journal))
        finally:
            target.close()
    finally:
        opened.close()


@contextlib.contextmanager
def registry_with(directory: Path, images: Mapping[str, Sequence[bytes]]) -> Iterator[Registry]:
    """A registry that holds, converted, each of `images` (layer archives, lowest first) as NAME:lazy."""
    with running_registry(directory / "registry") as running:
        source = Layout(directory / "source")
        for name, tars in images.items():
            source.add_image(name, tars)
            run_convert(source.reference(name), f"docker://{running.host}/{name}:lazy")
        yield running


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """A layer of these files."""
    tar = TarBuilder()
    for name, data in files.items():
        tar.file(name, data)
    return tar.build()


class Lazy:
    """A lazy image, read by the format's rules alone: every chunk verified."""

    def __init__(self, reference: str, *, platform: str | None = None, registry: RegistryOptions | None = None) -> None:
        self.source = open_source(reference, registry or RegistryOptions())
        self.document = select_image(self.source, platform)
        self.raw_manifest = json.loads(self.document.data)
        self.manifest = parse_lazy_manifest(parse_manifest(self.document.data, self.document.media_type))
        self.config = json.loads(self.source.read_blob(self.manifest.config.digest, self.manifest.config.size))
        packed = self.source.read_blob(self.manifest.bootstrap.digest, self.manifest.bootstrap.size)
        self.bootstrap: Bootstrap = parse_bootstrap(decompress_layer(packed, self.manifest.bootstrap.raw_size))
        self.tables = [device.table for device in self.bootstrap.devices]
        self.image = ErofsImage.parse(bytes(self.bootstrap.erofs), [table.device_size for table in self.tables])
        self._blobs: dict[Digest, bytes] = {}

    def close(self) -> None:
        self.source.close()

    def blob(self, index: int) -> bytes:
        ref = self.bootstrap.blobs[index]
        if ref.digest not in self._blobs:
            data = self.source.read_blob(ref.digest, ref.size)
            parse_footer(data[-FOOTER_BYTES:], ref.size)
            self._blobs[ref.digest] = data
        return self._blobs[ref.digest]

    def chunk(self, device: int, index: int) -> bytes:
        return self._chunk(self.tables[device], index)

    def _chunk(self, table: ChunkTable, index: int) -> bytes:
        row = table.rows[index]
        offset, size = int(row["blob_offset"]), int(row["stored_size"])
        stored = self.blob(int(row["blob_index"]))[offset : offset + size] if size else b""
        data = bytes(decompress(stored, Codec(int(row["codec"])), table.chunk_bytes(index)))
        assert chunk_digest(data) == bytes(row["digest"])
        return data

    def verify(self) -> int:
        """Every chunk of every device, and the hot blocks; returns how many chunks the layers have."""
        self.hot_blocks()
        return sum(len([self.chunk(device, index) for index in range(table.chunk_count)])
                   for device, table in enumerate(self.tables))

    def hot_blocks(self) -> list[tuple[int, int]]:
        """(device, block) in the order of the hot device; each is compared with the layer's."""
        part = self.bootstrap.hot
        if part is None:
            return []
        hot = b"".join(self._chunk(part.table, index) for index in range(part.table.chunk_count))
        blocks = [(device, block) for first, device, count in part.extents.tolist()
                  for block in range(first, first + count)]
        assert len(hot) == len(blocks) * BLOCK_SIZE_BYTES
        for place, (device, block) in enumerate(blocks):
            found = hot[place * BLOCK_SIZE_BYTES : (place + 1) * BLOCK_SIZE_BYTES]
            assert found == self._device_bytes(device, block * BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES)
        return blocks

    def nid(self, path: bytes) -> int:
        nid = self.image.root_nid
        for name in filter(None, path.split(b"/")):
            child = self.image.lookup(nid, name)
            assert child is not None, f"{path!r} is not there"
            nid = child
        return nid

    def read(self, path: bytes, offset: int = 0, size: int | None = None) -> bytes:
        nid = self.nid(path)
        end = self.image.stat(nid).size
        size = end - offset if size is None else min(size, end - offset)
        out = bytearray()
        for device, place, length in self.image.extents(nid, offset, size):
            out += bytes(length) if device < 0 else self._device_bytes(device, place, length)
        assert len(out) == size
        return bytes(out)

    def tree(self) -> set[bytes]:
        """All paths."""
        found, todo = set(), [(b"", self.image.root_nid)]
        while todo:
            base, nid = todo.pop()
            for name, child, kind in self.image.entries(nid):
                path = base + b"/" + name if base else name
                found.add(path)
                if kind == 2:
                    todo.append((path, child))
        return found

    def _device_bytes(self, device: int, place: int, length: int) -> bytes:
        chunk_size = self.tables[device].chunk_size
        first, last = place // chunk_size, (place + length - 1) // chunk_size
        data = b"".join(self.chunk(device, index) for index in range(first, last + 1))
        return data[place - first * chunk_size :][:length]
