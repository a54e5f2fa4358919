"""
Lazy images for tests of the snapshotter: converted, in a registry, and their bootstraps unpacked as containerd does.

    push_lazy(tmp_path, host, "app", {"f0": b"..."})       # converts; returns "host/app:lazy"
    unpack_bootstrap(image, directory)                      # its bootstrap layer, unpacked; returns the diff-id
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import zstandard

from lazyfs.image.digest import Digest
from lazyfs.image.manifest import parse_manifest
from lazyfs.registry import RegistryOptions, open_source
from tests.convertkit import Layout, run_convert
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

OPTIONS = RegistryOptions(insecure=True)


def push_lazy(directory: Path, host: str, name: str, files: Mapping[str, bytes]) -> str:
    """Make an image of one layer with these files, convert it, push it; its reference."""
    layout = Layout(directory / f"{name}-source")
    tar = TarBuilder()
    for path, data in files.items():
        tar.file(path, data)
    layout.add_image(name, [tar.build()])
    image = f"{host}/{name}:lazy"
    run_convert(layout.reference(name), f"docker://{image}", registry=OPTIONS)
    return image


def unpack_bootstrap(image: str, directory: Path) -> str:
    """Unpack its bootstrap layer, as containerd does; the digest of the layer's tar."""
    source = open_source(image, OPTIONS)
    try:
        manifest = parse_manifest(source.root().data, source.root().media_type)
        layer = manifest.layers[-1]
        tar = zstandard.ZstdDecompressor().decompress(source.read_blob(layer.digest, layer.size))
    finally:
        source.close()
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "x", "-C", str(directory)], input=tar, check=True)
    return Digest.of(tar).text
