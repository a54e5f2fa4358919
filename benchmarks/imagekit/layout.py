"""Write an OCI image layout (OCI image-spec v1.1: image-layout.md, manifest.md, config.md)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Literal, cast

from benchmarks.kit.proc import ToolError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Compression = Literal["gzip", "zstd"]
_COMMANDS: dict[Compression, list[str]] = {
    "gzip": ["gzip", "-6", "-n"],  # the level that docker build and buildah use; -n: no time in the header
    "zstd": ["zstd", "-q", "-3", "-c"],
}
_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+"
_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
_CREATED = "2025-01-01T00:00:00Z"  # a fixed date: the same tree gives the same image


@dataclass(frozen=True, slots=True)
class Layer:
    """One finished layer blob."""

    digest: str
    size_bytes: int
    media_type: str
    diff_id: str
    entry_count: int
    tar_bytes: int
    comment: str


class _HashingPipe:
    """A file object that hashes and counts what goes into a compressor."""

    def __init__(self, sink: IO[bytes], aborted: threading.Event) -> None:
        self._sink, self._aborted = sink, aborted
        self.hash = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes) -> int:
        if self._aborted.is_set():
            raise ToolError("the image is given up")
        self.hash.update(data)
        self.size_bytes += len(data)
        self._sink.write(data)
        return len(data)


def _hash_file(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}", path.stat().st_size


class LayoutWriter:
    """An OCI layout directory being made. Thread-safe for layers; `finish` comes last."""

    def __init__(self, top: Path) -> None:
        self._top = top
        self._blobs = top / "blobs" / "sha256"
        self._blobs.mkdir(parents=True)
        self._aborted = threading.Event()

    def abort(self) -> None:
        """Have the layers that other threads are writing fail soon."""
        self._aborted.set()

    def add_layer(self, comment: str, fill: Callable[[IO[bytes]], int], compression: Compression = "gzip") -> Layer:
        """
        Compress what `fill` writes (it returns the count of entries) into a layer blob.

        Raises:
            ToolError: the compressor failed.

        """
        path = self._blobs / f".{threading.get_ident()}.part"
        with path.open("wb") as out:
            compressor = subprocess.Popen(
                _COMMANDS[compression], stdin=subprocess.PIPE, stdout=out, start_new_session=True
            )
            assert compressor.stdin is not None
            try:
                with compressor.stdin as stdin:
                    pipe = _HashingPipe(stdin, self._aborted)
                    entry_count = fill(cast("IO[bytes]", pipe))
            except BaseException:
                compressor.kill()
                raise
            finally:
                code = compressor.wait()
        if code != 0:
            raise ToolError(f"{compression}: exit code {code}")
        digest, size = _hash_file(path)
        path.rename(self._blobs / digest.removeprefix("sha256:"))
        diff_id = f"sha256:{pipe.hash.hexdigest()}"
        return Layer(digest, size, _LAYER_TYPE + compression, diff_id, entry_count, pipe.size_bytes, comment)

    def finish(self, layers: list[Layer], *, tag: str, command: list[str], env: list[str]) -> None:
        """Write config, manifest and index."""
        config = {
            "created": _CREATED,
            "architecture": _architecture(),
            "os": "linux",
            "config": {"Env": env, "Cmd": command},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
            "history": [{"created": _CREATED, "created_by": layer.comment} for layer in layers],
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST_TYPE,
            "config": self._add_json(config, _CONFIG_TYPE),
            "layers": [
                {"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size_bytes} for layer in layers
            ],
        }
        entry = self._add_json(manifest, _MANIFEST_TYPE)
        entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
        (self._top / "index.json").write_bytes(_json({"schemaVersion": 2, "manifests": [entry]}))
        (self._top / "oci-layout").write_bytes(_json({"imageLayoutVersion": "1.0.0"}))

    def _add_json(self, value: object, media_type: str) -> dict[str, Any]:
        data = _json(value)
        name = hashlib.sha256(data).hexdigest()
        (self._blobs / name).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(data)}


def recompress(source: Path, target: Path, compression: Compression, tag: str) -> None:
    """Copy a gzip layout made here with its layers compressed otherwise. `target` must not exist."""
    writer = LayoutWriter(target)
    index = json.loads((source / "index.json").read_bytes())
    manifest = read_json(source, index["manifests"][0]["digest"])
    config = read_json(source, manifest["config"]["digest"])
    layers = []
    for entry, history in zip(manifest["layers"], config["history"], strict=True):
        blob = blob_path(source, entry["digest"])

        def fill(sink: IO[bytes], blob: Path = blob) -> int:
            with subprocess.Popen(["gzip", "-dc", blob], stdout=subprocess.PIPE, start_new_session=True) as gunzip:
                assert gunzip.stdout is not None
                shutil.copyfileobj(gunzip.stdout, sink, 1 << 20)
            return 0

        layers.append(writer.add_layer(history["created_by"], fill, compression))
    writer.finish(layers, tag=tag, command=config["config"]["Cmd"], env=config["config"]["Env"])


def extend(source: Path, target: Path, comment: str, fill: Callable[[IO[bytes]], int], tag: str) -> None:
    """Copy a layout made here, with one more layer on top. `target` must not exist, and lies on the same disk."""
    writer = LayoutWriter(target)
    index = json.loads((source / "index.json").read_bytes())
    manifest = read_json(source, index["manifests"][0]["digest"])
    config = read_json(source, manifest["config"]["digest"])
    layers = []
    for entry, diff_id, history in zip(
        manifest["layers"], config["rootfs"]["diff_ids"], config["history"], strict=True
    ):
        os.link(blob_path(source, entry["digest"]), blob_path(target, entry["digest"]))
        layers.append(
            Layer(entry["digest"], entry["size"], entry["mediaType"], diff_id, 0, 0, history["created_by"])
        )
    layers.append(writer.add_layer(comment, fill))
    writer.finish(layers, tag=tag, command=config["config"]["Cmd"], env=config["config"]["Env"])


def blob_path(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")


def read_json(layout: Path, digest: str) -> Any:
    return json.loads(blob_path(layout, digest).read_bytes())


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _architecture() -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
