"""
`lazyfs inspect IMAGE`: what a lazy image is made of, for people or as JSON; of other images, their layers.

Layer: cli. Reads the manifest and the bootstrap, never the blobs. Heavy imports happen inside the command.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import TYPE_CHECKING, Any

import click

from lazyfs.cli.options import platform_option, registry_options
from lazyfs.cli.output import format_bytes, note, print_json
from lazyfs.errors import NotFoundError

if TYPE_CHECKING:
    from lazyfs.image.descriptor import Document
    from lazyfs.registry import RegistryOptions
    from lazyfs.registry.lazy import LazyImage
    from lazyfs.registry.place import ImageSource

_WIDTH_COLUMNS = 160
_EXAMPLES = """
\b
Examples:
  lazyfs inspect registry.example/app:1-lazy
  lazyfs inspect --json oci:/srv/images:web
  lazyfs inspect --platform linux/arm64 registry.example/app:1-lazy
"""


@click.command("inspect", epilog=_EXAMPLES)
@click.argument("image", metavar="IMAGE")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@functools.partial(platform_option, default="all of them")
@registry_options
def inspect_command(image: str, *, as_json: bool, platform: str | None, registry: RegistryOptions) -> None:
    """
    Show what a lazy image is made of: layers, sizes, codecs, hot part, entries.

    Of an index, all images are shown, or the one of --platform. Of an image that is not lazy, its layers.
    """
    from lazyfs.registry import open_source  # noqa: PLC0415

    with contextlib.closing(open_source(image, registry)) as source:
        described = [_describe(source, document) for document in _documents(source, platform)]
        if not described:
            raise NotFoundError(f"{source.name}: the index names no image", hint="check the tag")
    if as_json:
        print_json({"image": image, "images": described})
        return
    for one in described:
        _print_lazy(image, one) if one["lazy"] else _print_plain(image, one)


def _documents(source: ImageSource, platform: str | None) -> list[Document]:
    """The manifests to show, in the order of the index."""
    from lazyfs.image.manifest import is_index, parse_index  # noqa: PLC0415
    from lazyfs.registry.select import descriptor_platform, select_image  # noqa: PLC0415

    root = source.root()
    if platform is not None or not is_index(root.media_type, root.data):
        return [select_image(source, platform)]
    members = parse_index(root.data, root.media_type).manifests
    return [
        source.document(member.digest) for member in members
        if member.platform is None or descriptor_platform(member.platform) is not None
    ]


def _describe(source: ImageSource, document: Document) -> dict[str, Any]:
    from lazyfs.image.config import check_config_type, parse_config  # noqa: PLC0415
    from lazyfs.image.manifest import is_lazy, parse_manifest  # noqa: PLC0415
    from lazyfs.registry.lazy import load_lazy_image  # noqa: PLC0415
    from lazyfs.registry.select import Platform  # noqa: PLC0415

    manifest = parse_manifest(document.data, document.media_type)
    check_config_type(manifest)
    config = parse_config(source.read_blob(manifest.config.digest, manifest.config.size), len(manifest.layers))
    base: dict[str, Any] = {
        "digest": document.digest.text,
        "platform": str(Platform(config.os, config.architecture, config.variant)),
        "lazy": is_lazy(manifest),
    }
    if not base["lazy"]:
        layers = [{"digest": layer.digest.text, "mediaType": layer.media_type, "size": layer.size}
                  for layer in manifest.layers]
        return {**base, "size": sum(layer.size for layer in manifest.layers), "layers": layers}
    return {**base, **_describe_lazy(load_lazy_image(source, document))}


def _describe_lazy(image: LazyImage) -> dict[str, Any]:
    devices = image.bootstrap.devices
    layers = [
        {
            "source": blob.source_digest.text,
            "blob": blob.digest.text,
            "size": blob.size,
            "uncompressedSize": device.table.device_size,
            "ratio": round(device.table.device_size / blob.size, 3),
            "chunkSize": device.table.chunk_size,
            "chunks": device.table.chunk_count,
            "codecs": _codecs(device.table.rows["codec"]),
            "options": blob.options,
        }
        for blob, device in zip(image.lazy.layers, devices, strict=True)
    ]
    lazy = image.lazy
    blobs = {blob.digest: blob.size for blob in image.bootstrap.blobs}
    return {
        "source": lazy.source_digest.text,
        "tool": lazy.tool,
        "size": sum(blobs.values()) + lazy.bootstrap.size,
        "uncompressedSize": sum(device.table.device_size for device in devices),
        "layers": layers,
        "hot": _describe_hot(image),
        "bootstrap": {
            "digest": lazy.bootstrap.digest.text,
            "size": lazy.bootstrap.size,
            "uncompressedSize": lazy.bootstrap.raw_size,
            "erofsSize": len(image.bootstrap.erofs),
        },
        "inodes": image.tree.inode_count,
        "entries": _entries(image),
    }


def _codecs(codes: Any) -> dict[str, int]:
    """How many chunks are stored with which codec."""
    import numpy as np  # noqa: PLC0415

    from lazyfs.image.codec import Codec  # noqa: PLC0415

    values, counts = np.unique(codes, return_counts=True)
    return {Codec(value).name.lower(): count for value, count in zip(values.tolist(), counts.tolist(), strict=True)}


def _describe_hot(image: LazyImage) -> dict[str, Any] | None:
    """The hot part; `share`: its stored bytes against those of the layers' chunks."""
    part = image.bootstrap.hot
    if image.lazy.hot is None or part is None:
        return None
    return {
        "digest": image.lazy.hot.digest.text,
        "size": image.lazy.hot.size,
        "uncompressedSize": part.table.device_size,
        "chunkSize": part.table.chunk_size,
        "chunks": part.table.chunk_count,
        "extents": len(part.extents),
        "share": part.share(device.table for device in image.bootstrap.devices),
    }


def _entries(image: LazyImage) -> dict[str, int]:
    """Names by type; a file with several names counts several times."""
    from collections import Counter  # noqa: PLC0415

    from lazyfs.image.model import FileType  # noqa: PLC0415

    counts: Counter[str] = Counter()
    directories = [image.tree.root_nid]
    while directories:
        for _, nid, kind in image.tree.entries(directories.pop()):
            counts[kind.name.lower()] += 1
            if kind is FileType.DIRECTORY:
                directories.append(nid)
    return {kind.name.lower(): counts[kind.name.lower()] for kind in FileType if counts[kind.name.lower()]}


def _print_plain(image: str, one: dict[str, Any]) -> None:
    from lazyfs.image.manifest import NOT_LAZY_HINT  # noqa: PLC0415

    click.echo(f"{image}: not a lazy image ({one['platform']}, {len(one['layers'])} layers, "
               f"{format_bytes(one['size'])})")
    for layer in one["layers"]:
        click.echo(f"  {layer['digest']}  {format_bytes(layer['size']):>8}  {layer['mediaType']}")
    note(f"hint: {NOT_LAZY_HINT}")


def _print_lazy(image: str, one: dict[str, Any]) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    click.echo(f"{image}: lazy image, {one['platform']}")
    click.echo(f"  manifest   {one['digest']}\n  made of    {one['source']}\n  made by    {one['tool']}")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("layer", "source", "blob", "stored", "uncompressed", "ratio", "chunks", "codecs"):
        table.add_column(name, justify="left" if name in ("source", "blob", "codecs") else "right", no_wrap=True)
    for number, layer in enumerate(one["layers"], 1):
        codecs = ", ".join(f"{name} {count}" for name, count in layer["codecs"].items())
        table.add_row(str(number), layer["source"][:19], layer["blob"][:19], format_bytes(layer["size"]),
                      format_bytes(layer["uncompressedSize"]), f"{layer['ratio']:.2f}", str(layer["chunks"]), codecs)
    # Not cut where nobody looks at a terminal of that width (a pipe, a log).
    Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_COLUMNS).print(table)
    hot, bootstrap = one["hot"], one["bootstrap"]
    if hot is not None:
        click.echo(f"  hot part   {format_bytes(hot['size'])} ({format_bytes(hot['uncompressedSize'])} uncompressed in "
                   f"{hot['extents']} pieces), {hot['chunks']} chunks, {hot['share'] * 100:.1f} % of the stored data")
    click.echo(f"  bootstrap  {format_bytes(bootstrap['size'])} ({format_bytes(bootstrap['uncompressedSize'])} "
               f"uncompressed)\n  total      {format_bytes(one['size'])} stored, "
               f"{format_bytes(one['uncompressedSize'])} uncompressed")
    entries = ", ".join(f"{count} {name}" for name, count in one["entries"].items())
    click.echo(f"  entries    {entries} ({one['inodes']} inodes)")
