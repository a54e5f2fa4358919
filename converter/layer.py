"""
One source layer becomes one blob, streaming: archive → device → chunks → blob file, then the tail.

LayerStream's threads read, decompress and hash; the thread that calls convert_layer() walks the archive and writes;
the pool's threads compress.
Memory is bounded by the pool's window, whatever the layer's size (the entries apart: some hundred bytes each).

Who calls: converter.build. Layer: converter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from converter.device import DeviceWriter
from converter.layerstream import LayerStream
from converter.pool import BlobWriter, CompressionPool
from converter.reuse import LayerContent
from converter.tar.reader import TarReader
from lazyfs.errors import UnsupportedError
from lazyfs.image.blob import TAIL_BYTES_MAX, pack_tail
from lazyfs.image.digest import Digest
from lazyfs.image.entries import pack_entries
from lazyfs.image.manifest import LayerBlob, options_key
from lazyfs.image.model import EntryKind, FileType, LayerEntry
from lazyfs.image.table import ChunkTable
from lazyfs.registry.staging import explain_os

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from converter.encode import Encoding
    from lazyfs.image.descriptor import Descriptor
    from lazyfs.registry.place import ByteStream, ImageSource


def convert_layer(
    source: ImageSource, layer: Descriptor, encoding: Encoding, pool: CompressionPool, *, path: Path,
    watch: Callable[[int], None],
) -> tuple[LayerContent, tuple[str, ...]]:
    """
    Convert a layer into the file `path`, which must not exist; it is gone again after an error.

    Args:
        source: where the layer's blob is.
        layer: the source layer.
        encoding: how chunks are stored.
        pool: the threads that compress.
        path: of the blob to write; its directory is also used for temporary files.
        watch: told how many bytes of the source were read; what it raises ends the conversion.

    Returns: the layer's content, and warnings of the archive's reader.

    Raises:
        FormatError: the archive is malformed.
        IntegrityError: it has another digest than `layer` says.
        SourceError: it could not be read.
        DiskFullError, TargetError: the blob could not be written.

    """
    name = f"layer {layer.digest.short}"
    raw = _Watched(source.open_blob(layer.digest, layer.size), watch)
    with LayerStream(raw, layer.media_type, size=layer.size, digest=layer.digest, name=name) as stream:
        try:
            with path.open("x+b") as file, stream.blaming():
                writer = BlobWriter(pool, file, encoding)
                try:
                    return _convert(stream, layer, writer, encoding, spool_dir=path.parent)
                finally:
                    writer.abandon()
        except OSError as error:
            path.unlink(missing_ok=True)
            raise explain_os(error, str(path.parent)) from error
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _convert(
    stream: LayerStream, layer: Descriptor, writer: BlobWriter, encoding: Encoding, *, spool_dir: Path
) -> tuple[LayerContent, tuple[str, ...]]:
    name = f"layer {layer.digest.short}"
    reader = TarReader(stream, name=name)
    device = DeviceWriter(writer, encoding.chunk_size, spool_dir)
    entries = _lay_out(reader, device)
    device_size = device.finish()
    metadata = pack_entries(entries)    # while the last chunks are compressed
    diff_id = stream.finish()       # reads to the end, so that both digests are known and checked
    table = ChunkTable(encoding.chunk_size, device_size, writer.finish())
    tail = pack_tail(table, metadata, len(entries), writer.blob_size)
    if len(tail) > TAIL_BYTES_MAX:
        raise UnsupportedError(f"{name}: {len(entries)} entries and {table.chunk_count} chunks are too many for a blob",
                               hint="a larger --chunk-size makes fewer chunks")
    writer.write(tail)
    blob = LayerBlob(
        writer.digest(), writer.blob_size, layer.digest, diff_id,
        options_key(encoding.codec, encoding.level, encoding.chunk_size), Digest.of(tail), len(tail),
    )
    return LayerContent(blob, table, entries), tuple(reader.warnings)


def _lay_out(reader: TarReader, device: DeviceWriter) -> list[LayerEntry]:
    entries = []
    add_file, read = device.add_file, reader.read_data
    for member in reader:
        entry = member.entry
        if entry.type is FileType.REGULAR and entry.size and entry.kind is EntryKind.NODE:
            data = add_file(entry.size, member.segments, read)
            entry = LayerEntry(entry.path, entry.kind, entry.type, entry.attributes, entry.size, data)
        entries.append(entry)
    return entries


class _Watched:
    """A stream that tells how much was read."""

    def __init__(self, stream: ByteStream, watch: Callable[[int], None]) -> None:
        self._stream = stream
        self._watch = watch

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._watch(len(data))
        return data

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
