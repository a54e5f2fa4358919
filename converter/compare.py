"""
`lazyfs check`: a lazy image against itself, and against the source image it claims to be.

1. every stored chunk of every blob (converter.verify);
2. without a source: the tree against the entries that the blobs themselves record, merged again;
   with one: its layers are read again, each once, merged, and compared with the tree that a mount shows: names, types,
   metadata, hard links, bytes; and its config.

Layer: converter. Who calls: lazyfs.cli.check.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from converter.differences import Differences, show_path
from converter.filesums import LazySums, Sums, first_difference, source_sums
from converter.layerstream import LayerStream
from converter.overlay import merge
from converter.tar.reader import TarReader
from converter.treediff import Pair, compare_trees
from converter.verify import verify_blobs
from lazyfs.errors import FormatError, IntegrityError, NotFoundError
from lazyfs.image.config import comparable
from lazyfs.image.manifest import check_source, is_index, parse_manifest, source_diff_ids
from lazyfs.image.model import DataMap, EntryKind, FileType, LayerEntry
from lazyfs.registry.lazy import LazyImage, load_lazy_image
from lazyfs.registry.select import select_image

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs.image.descriptor import Descriptor, Document
    from lazyfs.image.digest import Digest
    from lazyfs.image.manifest import Manifest
    from lazyfs.registry.place import ImageSource


@dataclass(frozen=True, slots=True, eq=False)
class CheckResult:
    """What was looked at, and what differs. `file_count`: files whose bytes were compared with the source's."""

    image: LazyImage
    differences: Differences
    chunk_count: int
    entry_count: int
    file_count: int


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """`on_...`: told of the tasks "blobs" and "source": total bytes at the start, bytes as they are read, the end."""

    jobs: int
    on_start: Callable[[str, int], None]
    on_bytes: Callable[[str, int], None]
    on_end: Callable[[str], None]


def check_image(
    source: ImageSource, document: Document, options: CheckOptions, original: ImageSource | None,
    platform: str | None = None,
) -> CheckResult:
    """
    Check a lazy image.

    Args:
        source: where the lazy image is.
        document: its manifest.
        options: how.
        original: where the source image is; None: do without.
        platform: of the source image, if it is an index that does not name the manifest this was made of.

    Raises:
        LazyfsError: the check could not be made. What it found is in the result.

    """
    image, differences = load_lazy_image(source, document), Differences()
    options.on_start("blobs", sum(blob.size for blob in image.bootstrap.blobs))
    chunk_count, entries = verify_blobs(
        image, source, differences, jobs=options.jobs, on_bytes=lambda size: options.on_bytes("blobs", size)
    )
    options.on_end("blobs")
    if original is None:
        _compare_with_blobs(image, entries, differences)
        return CheckResult(image, differences, chunk_count, image.tree.inode_count, 0)
    source_document = _source_document(original, image, platform)
    manifest = parse_manifest(source_document.data, source_document.media_type)
    check_source(manifest)
    options.on_start("source", sum(device.table.device_size for device in image.bootstrap.devices))
    layers = [
        _read_layer(original, layer, number, lambda size: options.on_bytes("source", size))
        for number, layer in enumerate(manifest.layers, 1)
    ]
    options.on_end("source")
    root = merge([layer.entries for layer in layers], names=[layer.digest.short for layer in manifest.layers])
    pairs = compare_trees(root, image.tree.to_tree(), differences)
    _compare_content(pairs, layers, image, source, differences)
    _compare_configs(original, manifest, source, image, differences)
    return CheckResult(image, differences, chunk_count, image.tree.inode_count, len(pairs))


def _compare_with_blobs(
    image: LazyImage, entries: dict[Digest, list[LayerEntry]], differences: Differences
) -> None:
    """The bootstrap's tree against the entries that the blobs record (unless one of them is damaged, as was told)."""
    if all(blob.digest in entries for blob in image.lazy.layers):
        names = [f"blob {blob.digest.short}" for blob in image.lazy.layers]
        root = merge([entries[blob.digest] for blob in image.lazy.layers], names=names)
        compare_trees(root, image.tree.to_tree(), differences)


@dataclass(slots=True)
class _SourceLayer:
    """`sums`: of the regular files, in archive order; a file's entry names its place by `data.runs[0][0]`."""

    entries: list[LayerEntry]
    sums: list[Sums]


def _read_layer(
    original: ImageSource, layer: Descriptor, number: int, on_bytes: Callable[[int], None]
) -> _SourceLayer:
    name = f"source layer {number} ({layer.digest.short})"
    found = _SourceLayer([], [])
    with (
        original.open_blob(layer.digest, layer.size) as raw,
        LayerStream(raw, layer.media_type, size=layer.size, digest=layer.digest, name=name) as stream,
    ):
        with stream.blaming():
            reader = TarReader(stream, name=name)
            for member in reader:
                entry = member.entry
                if entry.kind is EntryKind.NODE and entry.type is FileType.REGULAR:
                    # There is no device here: the map carries the number of the file's sums through the merge.
                    entry = replace(entry, data=DataMap(12, ((len(found.sums), 1, 0),)))
                    found.sums.append(source_sums(member.segments, reader.read_data))
                    on_bytes(sum(length for _, length in member.segments))
                found.entries.append(entry)
        stream.finish()
    return found


def _source_document(original: ImageSource, image: LazyImage, platform: str | None) -> Document:
    """The manifest that the lazy image says it was made of, if it is there; else the one of the platform."""
    root = original.root()
    if root.digest != image.lazy.source_digest and is_index(root.media_type, root.data):
        try:
            return original.document(image.lazy.source_digest)
        except NotFoundError:
            return select_image(original, platform)
    return root


def _compare_content(
    pairs: list[Pair], layers: list[_SourceLayer], image: LazyImage, source: ImageSource, differences: Differences
) -> None:
    """Files in the order of their data, so that each chunk is fetched about once."""
    nids = dict(image.tree.walk())
    sums = LazySums(image, source)

    def place(pair: Pair) -> tuple[int, int]:
        return pair.lazy.device, min((block for _, _, block in pair.lazy.data.runs), default=0)

    for pair in sorted(pairs, key=place):
        wanted = layers[pair.source.device].sums[pair.source.data.runs[0][0]]
        try:
            at = first_difference(wanted, sums.of(nids[pair.path], pair.lazy.size))
        except (FormatError, IntegrityError, NotFoundError) as error:
            differences.add("content", f"{show_path(pair.path)}: cannot be read: {error}")
            continue
        if at is not None:
            differences.add("content", f"{show_path(pair.path)}: other bytes, first in the 64 KiB from byte {at}")


def _compare_configs(
    original: ImageSource, manifest: Manifest, source: ImageSource, image: LazyImage, differences: Differences
) -> None:
    ours = original.read_blob(manifest.config.digest, manifest.config.size)
    theirs = source.read_blob(image.lazy.config.digest, image.lazy.config.size)
    wanted, found = comparable(ours), comparable(theirs)
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            differences.add("config", f"config field {key!r} differs")
    if tuple(blob.source_diff_id for blob in image.lazy.layers) != source_diff_ids(ours, len(manifest.layers)):
        differences.add("config", "the lazy image was made of other layers (diff_ids differ)")
    for key, value in sorted(manifest.annotations.items()):
        if image.manifest.annotations.get(key) != value:
            differences.add("config", f"manifest annotation {key!r} differs")
