"""
The bootstrap layer: an ordinary small tar with all metadata of an image and where every chunk of it is.

Members, in this order (docs/format.md):

    lazyfs/              directory
    lazyfs/image.json    version, blobs, devices
    lazyfs/tables.bin    the chunk tables of all devices, one after another; blob_index counts image.json's blobs
    lazyfs/hot.bin       the hot part (image.hot), where there is one
    lazyfs/image.erofs   the merged tree; its extra device i + 1 is device i of image.json

Layer: lazyfs.image, no I/O. Who calls: the converter (pack), every mount and `lazyfs inspect` (parse).
Invariant: parse_bootstrap() checks everything except the EROFS image, which image.erofs checks against the devices.
Cost: tables are checked by numpy, nothing is done entry by entry.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec
import zstandard

from lazyfs import limits, shapes
from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.image.digest import Digest
from lazyfs.image.hot import HotPart, pack_hot, parse_hot
from lazyfs.image.table import ROW_BYTES, ChunkTable, check_chunk_size, chunk_count, parse_table
from lazyfs.image.ustar import Member, pack_ustar, parse_ustar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BOOTSTRAP_VERSION = 1
BOOTSTRAP_LEVEL = 9              # zstd; 30,000 entries: 517 KB in 0.12 s of CPU (3: 581 KB; 19: 447 KB, 3.1 s)
HOT_MEMBER = "lazyfs/hot.bin"
_DIRECTORY, _JSON, _TABLES, _EROFS = "lazyfs/", "lazyfs/image.json", "lazyfs/tables.bin", "lazyfs/image.erofs"
_JSON_BYTES_MAX = limits.MIB     # 1,024 blobs and 512 devices make 200 KiB

_Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


@dataclass(frozen=True, slots=True)
class BlobRef:
    """A blob that tables name. `size`: bytes of the whole blob. `hot`: it holds the hot device's chunks."""

    digest: Digest
    size: int
    hot: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Device:
    """The uncompressed data of one source layer. `digest` is table.device_digest()."""

    digest: Digest
    table: ChunkTable


@dataclass(frozen=True, slots=True, eq=False)
class Bootstrap:
    """All an image is, but for its data. `devices`: one a source layer, lowest first. `blobs`: each once."""

    blobs: tuple[BlobRef, ...]
    devices: tuple[Device, ...]
    erofs: bytes | memoryview
    hot: HotPart | None = None


class _JsonBlob(msgspec.Struct):
    digest: str
    size: _Size
    hot: bool


class _JsonDevice(msgspec.Struct, rename="camel"):
    digest: str
    size: _Size
    chunk_size: _Size
    chunk_count: _Size


class _JsonImage(msgspec.Struct):
    version: int
    blobs: list[_JsonBlob]
    devices: list[_JsonDevice]


class _JsonVersion(msgspec.Struct):
    version: int


def pack_bootstrap(bootstrap: Bootstrap) -> bytes:
    """The tar of a bootstrap, uncompressed. Deterministic."""
    image = _JsonImage(
        BOOTSTRAP_VERSION,
        [_JsonBlob(blob.digest.text, blob.size, blob.hot) for blob in bootstrap.blobs],
        [
            _JsonDevice(device.digest.text, device.table.device_size, device.table.chunk_size, device.table.chunk_count)
            for device in bootstrap.devices
        ],
    )
    return pack_ustar(
        (
            Member(_DIRECTORY, b""),
            Member(_JSON, msgspec.json.encode(image)),
            Member(_TABLES, b"".join(device.table.rows.tobytes() for device in bootstrap.devices)),
            *([] if bootstrap.hot is None else [Member(HOT_MEMBER, pack_hot(bootstrap.hot))]),
            Member(_EROFS, bootstrap.erofs),
        )
    )


def pack_unpacked(read: Callable[[str], bytes | None]) -> bytes:
    """
    The tar of a bootstrap whose members lie unpacked somewhere: the bytes it was unpacked from.

    Args:
        read: gives the content of the member with that path; None for HOT_MEMBER: there is none.

    """
    contents = [(name, read(name)) for name in (_JSON, _TABLES, HOT_MEMBER, _EROFS)]
    return pack_ustar(
        (Member(_DIRECTORY, b""), *(Member(name, content) for name, content in contents if content is not None))
    )


def parse_bootstrap(data: bytes | memoryview) -> Bootstrap:
    """
    Read and check the tar of a bootstrap. The result's arrays are views of `data`.

    Raises:
        UnsupportedError: a version this lazyfs does not know.
        FormatError: anything is off.

    """
    if len(data) > limits.BOOTSTRAP_BYTES_MAX:
        raise FormatError(f"bootstrap of {len(data)} bytes, at most {limits.BOOTSTRAP_BYTES_MAX} are allowed")
    names = (_DIRECTORY, _JSON, _TABLES, HOT_MEMBER, _EROFS)
    members = {member.name: memoryview(member.data)
               for member in parse_ustar(data, names, optional=frozenset({HOT_MEMBER}))}
    image = _parse_json(members[_JSON])
    blobs = _check_blobs(image.blobs)
    devices = _parse_tables(image.devices, members[_TABLES], [blob.size for blob in blobs])
    return Bootstrap(blobs, devices, members[_EROFS], _parse_hot(members.get(HOT_MEMBER), blobs, devices))


def compress_layer(tar: bytes) -> bytes:
    """The layer as it is stored: one zstd frame that states its content size."""
    return zstandard.ZstdCompressor(level=BOOTSTRAP_LEVEL, write_content_size=True).compress(tar)


def decompress_layer(data: bytes | memoryview, size: int) -> bytes:
    """
    Expand a stored bootstrap layer to exactly `size` bytes (as its annotation promises).

    Raises:
        FormatError: not one zstd frame of exactly that content.

    """
    if not 0 < size <= limits.BOOTSTRAP_BYTES_MAX:
        raise FormatError(f"bootstrap of {size} bytes, at most {limits.BOOTSTRAP_BYTES_MAX} are allowed")
    try:
        stated = zstandard.get_frame_parameters(data).content_size
        if stated != size:
            raise FormatError(f"bootstrap layer states {stated} bytes, expected {size}")
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"bootstrap layer of {len(data)} bytes is not one whole zstd frame: {error}") from error


def _parse_json(data: bytes | memoryview) -> _JsonImage:
    if len(data) > _JSON_BYTES_MAX:
        raise FormatError(f"{_JSON} holds {len(data)} bytes, at most {_JSON_BYTES_MAX} are allowed")
    try:
        version = shapes.from_json(data, _JsonVersion).version
        if version != BOOTSTRAP_VERSION:
            raise UnsupportedError(
                f"bootstrap version {version}: this lazyfs reads version {BOOTSTRAP_VERSION}",
                hint="convert the image again, or use a newer lazyfs",
            )
        return shapes.from_json(data, _JsonImage)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FormatError(f"{_JSON} is malformed: {error}") from error


def _check_blobs(raw: list[_JsonBlob]) -> tuple[BlobRef, ...]:
    if len(raw) > limits.BLOB_COUNT_MAX:
        raise FormatError(f"bootstrap names {len(raw)} blobs, at most {limits.BLOB_COUNT_MAX} are allowed")
    blobs = tuple(BlobRef(Digest(blob.digest), blob.size, blob.hot) for blob in raw)
    if len({blob.digest for blob in blobs}) != len(blobs):
        raise FormatError("bootstrap names the same blob twice")
    if sum(blob.hot for blob in blobs) > 1:
        raise FormatError("bootstrap names more than one hot blob")
    return blobs


def _parse_tables(raw: list[_JsonDevice], tables: memoryview, blob_sizes: list[int]) -> tuple[Device, ...]:
    if len(raw) > limits.DEVICE_COUNT_MAX:
        raise FormatError(f"bootstrap has {len(raw)} devices, at most {limits.DEVICE_COUNT_MAX} are allowed")
    for device in raw:
        check_chunk_size(device.chunk_size)
        if device.chunk_count != chunk_count(device.size, device.chunk_size):
            raise FormatError(f"bootstrap states {device.chunk_count} chunks for a device of {device.size} bytes")
    ends = list(itertools.accumulate((device.chunk_count for device in raw), initial=0))
    if ends[-1] > limits.CHUNK_COUNT_MAX or ends[-1] * ROW_BYTES != len(tables):
        raise FormatError(f"{_TABLES} holds {len(tables)} bytes, expected {ends[-1]} rows of {ROW_BYTES}")
    return tuple(
        _parse_device(device, tables[start * ROW_BYTES : end * ROW_BYTES], blob_sizes, index)
        for index, (device, (start, end)) in enumerate(zip(raw, itertools.pairwise(ends), strict=True))
    )


def _parse_device(raw: _JsonDevice, rows: memoryview, blob_sizes: Sequence[int], index: int) -> Device:
    table = parse_table(rows, raw.chunk_size, raw.size, list(blob_sizes))
    digest = Digest(raw.digest)
    found = table.device_digest()
    if found != digest:
        raise FormatError(f"bootstrap device {index} should be {digest.short}, its table makes {found.short}")
    return Device(digest, table)


def _parse_hot(data: memoryview | None, blobs: tuple[BlobRef, ...], devices: tuple[Device, ...]) -> HotPart | None:
    """A hot blob and what says what it holds come together; no layer's data is in it alone."""
    index = next((number for number, blob in enumerate(blobs) if blob.hot), None)
    if index is None or data is None:
        if index is None and data is None:
            return None
        raise FormatError("bootstrap has a hot part without a hot blob, or the other way round")
    if any((device.table.rows["blob_index"] == index).any() for device in devices):
        raise FormatError("bootstrap: a layer's table names the hot blob")
    return parse_hot(data, [device.table.device_size for device in devices], [blob.size for blob in blobs], index)
