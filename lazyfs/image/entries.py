"""
The entries of one source layer as its blob records them: typed msgpack arrays in one zstd frame.

With them a layer that was converted once can be merged into any later image without reading its archive again.
Wire form, in docs/format.md: an array of entries; an entry is an array whose first item is its tag (1-7: a node of
that FileType, 8: hard link, 9: whiteout, 10: opaque directory). Only the fields that mean something are there, so
equal entries give equal bytes.

Layer: lazyfs.image, no I/O. Who calls: lazyfs.image.blob (and through it the converter).
Invariant: what parse_entries() returns has been checked as strictly as what comes out of the tar reader; paths are
normal, maps lie within the device, xattrs are sorted.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated, TypeAlias

import msgspec
import zstandard

from lazyfs import limits, shapes
from lazyfs.errors import BugError, FormatError
from lazyfs.image.model import EMPTY_MAP, Attributes, DataMap, EntryKind, FileType, LayerEntry

if TYPE_CHECKING:
    from collections.abc import Sequence

ENTRIES_LEVEL = 9                # zstd; 30,000 entries: 412 KB in 0.08 s of CPU (15: 395 KB, 0.42 s)
ENTRIES_BYTES_MAX = 8 * limits.GIB
_EXPANSION_MAX = 2048            # a frame that claims to expand more than this is a bomb (real ones: 5 to 100)
_EXPANSION_FREE_BYTES = limits.MIB
UNIT_SHIFT_MIN, UNIT_SHIFT_MAX = 12, 43
MAJOR_MAX, MINOR_MAX = (1 << 12) - 1, (1 << 20) - 1  # Linux dev_t, as EROFS stores it
_TAG_HARDLINK, _TAG_WHITEOUT, _TAG_OPAQUE = 8, 9, 10

_Path = Annotated[bytes, msgspec.Meta(max_length=limits.PATH_BYTES_MAX)]
_Target = Annotated[bytes, msgspec.Meta(min_length=1, max_length=limits.SYMLINK_BYTES_MAX)]
_Id = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
_Mode = Annotated[int, msgspec.Meta(ge=0, le=0o7777)]
_Seconds = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
_Nanoseconds = Annotated[int, msgspec.Meta(ge=0, le=999_999_999)]
_XattrName = Annotated[bytes, msgspec.Meta(min_length=1, max_length=limits.XATTR_NAME_BYTES_MAX)]
_XattrValue = Annotated[bytes, msgspec.Meta(max_length=limits.XATTR_VALUE_BYTES_MAX)]
_Xattrs: TypeAlias = tuple[tuple[_XattrName, _XattrValue], ...]
_Size = Annotated[int, msgspec.Meta(ge=0, le=limits.FILE_BYTES_MAX)]
_Shift = Annotated[int, msgspec.Meta(ge=UNIT_SHIFT_MIN, le=UNIT_SHIFT_MAX)]
_Unit = Annotated[int, msgspec.Meta(ge=0, le=1 << 52)]
_Block = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFE)]
_Runs: TypeAlias = tuple[tuple[_Unit, _Unit, _Block], ...]
_Major = Annotated[int, msgspec.Meta(ge=0, le=MAJOR_MAX)]
_Minor = Annotated[int, msgspec.Meta(ge=0, le=MINOR_MAX)]


class _Wire(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    path: _Path


class _Node(_Wire, frozen=True):
    mode: _Mode
    uid: _Id
    gid: _Id
    mtime_s: _Seconds
    mtime_ns: _Nanoseconds
    xattrs: _Xattrs


class _Regular(_Node, frozen=True, tag=int(FileType.REGULAR)):
    size: _Size
    unit_shift: _Shift
    runs: _Runs


class _Directory(_Node, frozen=True, tag=int(FileType.DIRECTORY)):
    pass


class _CharacterDevice(_Node, frozen=True, tag=int(FileType.CHARACTER)):
    major: _Major
    minor: _Minor


class _BlockDevice(_Node, frozen=True, tag=int(FileType.BLOCK)):
    major: _Major
    minor: _Minor


class _Fifo(_Node, frozen=True, tag=int(FileType.FIFO)):
    pass


class _Socket(_Node, frozen=True, tag=int(FileType.SOCKET)):
    pass


class _Symlink(_Node, frozen=True, tag=int(FileType.SYMLINK)):
    target: _Target


class _Hardlink(_Wire, frozen=True, tag=_TAG_HARDLINK):
    target: _Path


class _Whiteout(_Wire, frozen=True, tag=_TAG_WHITEOUT):
    pass


class _Opaque(_Wire, frozen=True, tag=_TAG_OPAQUE):
    pass


_AnyWire: TypeAlias = (
    _Regular
    | _Directory
    | _CharacterDevice
    | _BlockDevice
    | _Fifo
    | _Socket
    | _Symlink
    | _Hardlink
    | _Whiteout
    | _Opaque
)
_DECODER = shapes.msgpack_decoder(list[_AnyWire])
_ENCODER = msgspec.msgpack.Encoder()
_PLAIN_NODES = {FileType.DIRECTORY: _Directory, FileType.FIFO: _Fifo, FileType.SOCKET: _Socket}
_DEVICE_NODES = {FileType.CHARACTER: _CharacterDevice, FileType.BLOCK: _BlockDevice}
_PLAIN_TYPES = {wire: type_ for type_, wire in _PLAIN_NODES.items()}
_DEVICE_TYPES = {wire: type_ for type_, wire in _DEVICE_NODES.items()}

def is_normal_path(path: bytes) -> bool:
    """Whether a path is relative, without empty, `.` and `..` components and NUL, within the limits of lengths."""
    framed = b"/" + path + b"/"
    if len(path) > limits.PATH_BYTES_MAX or b"\0" in path:
        return False
    if b"//" in framed or b"/./" in framed or b"/../" in framed:
        return not path
    return len(path) <= limits.NAME_BYTES_MAX or max(map(len, path.split(b"/"))) <= limits.NAME_BYTES_MAX


def pack_entries(entries: Sequence[LayerEntry]) -> bytes:
    """The entries as one zstd frame that states its content size. Deterministic. Fields without a meaning are left."""
    encode = _ENCODER.encode
    raw = b"".join([_array_header(len(entries)), *[encode(_to_wire(entry)) for entry in entries]])
    return zstandard.ZstdCompressor(level=ENTRIES_LEVEL, write_content_size=True).compress(raw)


def parse_entries(data: bytes | memoryview, *, device_size: int = limits.DEVICE_BYTES_MAX) -> list[LayerEntry]:
    """
    The entries of a layer, in the order of its archive.

    Args:
        data: exactly one zstd frame.
        device_size: bytes of the layer device that the files' maps must lie in.

    Raises:
        FormatError: anything is off; the message names the entry.

    """
    raw = _expand(data)
    try:
        wires = _DECODER.decode(raw)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FormatError(f"layer metadata is malformed: {error}") from error
    if len(wires) > limits.ENTRY_COUNT_MAX:
        raise FormatError(f"layer metadata has {len(wires)} entries, at most {limits.ENTRY_COUNT_MAX} are allowed")
    shared: dict[Attributes, Attributes] = {}
    return [_from_wire(wire, device_size, shared) for wire in wires]


def check_entry_path(path: bytes) -> None:
    """Raises FormatError unless the path is normal (see is_normal_path)."""
    if not is_normal_path(path):
        raise FormatError(f"layer metadata holds the path {path[:200]!r}, which is not normal")


def check_map(data: DataMap, size: int, device_size: int) -> str:
    """What is wrong with a file's map, or "" if nothing is (see DataMap for the rules)."""
    shift, end_unit = data.unit_shift, 0
    used = -(-size // limits.BLOCK_SIZE_BYTES) * limits.BLOCK_SIZE_BYTES
    for first, count, block in data.runs:
        if first < end_unit or count < 1:
            return "runs that overlap, are empty or not sorted"
        end_unit = first + count
        if (end_unit - 1) << shift >= size:
            return "a run beyond the end of the file"
        length = min(end_unit << shift, used) - (first << shift)
        if block * limits.BLOCK_SIZE_BYTES + length > device_size:
            return f"a run beyond the layer device of {device_size} bytes"
    return ""


def _expand(data: bytes | memoryview) -> bytes:
    try:
        size = zstandard.get_frame_parameters(data).content_size
        if not 0 < size <= ENTRIES_BYTES_MAX or size > _EXPANSION_FREE_BYTES + len(data) * _EXPANSION_MAX:
            raise FormatError(f"layer metadata of {len(data)} bytes claims to expand to {size} bytes")
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"layer metadata of {len(data)} bytes is not a zstd frame: {error}") from error


def _array_header(count: int) -> bytes:
    """Of a msgpack array, in the shortest form (msgpack spec, array format family)."""
    if count < 16:
        return bytes([0x90 | count])
    return b"\xdc" + count.to_bytes(2, "big") if count < 1 << 16 else b"\xdd" + count.to_bytes(4, "big")


def _to_wire(entry: LayerEntry) -> _Wire:
    if entry.kind is EntryKind.NODE:
        return _node_to_wire(entry)
    if entry.kind is EntryKind.HARDLINK:
        return _Hardlink(entry.path, entry.target)
    return _Whiteout(entry.path) if entry.kind is EntryKind.WHITEOUT else _Opaque(entry.path)


def _node_to_wire(entry: LayerEntry) -> _Wire:
    a, type_ = entry.attributes, entry.type
    common = (entry.path, a.mode, a.uid, a.gid, a.mtime_s, a.mtime_ns, a.xattrs)
    if type_ is FileType.REGULAR:
        return _Regular(*common, entry.size, entry.data.unit_shift, entry.data.runs)
    if type_ is FileType.SYMLINK:
        return _Symlink(*common, entry.target)
    if type_ in _DEVICE_NODES:
        return _DEVICE_NODES[type_](*common, *entry.rdev)
    return _PLAIN_NODES[type_](*common)


def _from_wire(wire: _AnyWire, device_size: int, shared: dict[Attributes, Attributes]) -> LayerEntry:
    path = wire.path
    check_entry_path(path)
    if isinstance(wire, _Node):
        return _node_from_wire(wire, device_size, shared)
    if isinstance(wire, _Opaque):
        return LayerEntry(path, EntryKind.OPAQUE)
    if not path:
        raise FormatError("layer metadata has a hard link or whiteout in place of the root directory")
    if isinstance(wire, _Whiteout):
        return LayerEntry(path, EntryKind.WHITEOUT)
    check_entry_path(wire.target)
    return LayerEntry(path, EntryKind.HARDLINK, target=wire.target)


def _node_from_wire(wire: _Node, device_size: int, shared: dict[Attributes, Attributes]) -> LayerEntry:
    path, kind = wire.path, EntryKind.NODE
    if wire.xattrs:
        _check_xattrs(wire.xattrs, path)
    attributes = Attributes(wire.mode, wire.uid, wire.gid, wire.mtime_s, wire.mtime_ns, wire.xattrs)
    attributes = shared.setdefault(attributes, attributes)   # a layer has few distinct ones
    if isinstance(wire, _Directory):
        return LayerEntry(path, kind, FileType.DIRECTORY, attributes)
    if not path:
        raise FormatError("layer metadata has something other than a directory as the root directory")
    if isinstance(wire, _Regular):
        data = DataMap(wire.unit_shift, wire.runs) if wire.runs or wire.unit_shift != UNIT_SHIFT_MIN else EMPTY_MAP
        if problem := check_map(data, wire.size, device_size):
            raise FormatError(f"layer metadata, file {path[:200]!r}: {problem}")
        return LayerEntry(path, kind, FileType.REGULAR, attributes, wire.size, data)
    if isinstance(wire, _Symlink):
        if b"\0" in wire.target:
            raise FormatError(f"layer metadata, symlink {path[:200]!r}: its target holds NUL")
        return LayerEntry(path, kind, FileType.SYMLINK, attributes, target=wire.target)
    if isinstance(wire, (_CharacterDevice, _BlockDevice)):
        return LayerEntry(path, kind, _DEVICE_TYPES[type(wire)], attributes, rdev=(wire.major, wire.minor))
    if isinstance(wire, (_Fifo, _Socket)):
        return LayerEntry(path, kind, _PLAIN_TYPES[type(wire)], attributes)
    raise BugError(f"no such wire type: {type(wire).__name__}")


def _check_xattrs(xattrs: _Xattrs, path: bytes) -> None:
    names = [name for name, _ in xattrs]
    if any(b"\0" in name for name in names) or any(a >= b for a, b in itertools.pairwise(names)):
        raise FormatError(f"layer metadata, {path[:200]!r}: xattr names are not sorted, unique and free of NUL")
    if sum(len(name) + len(value) for name, value in xattrs) > limits.XATTR_INODE_BYTES_MAX:
        raise FormatError(f"layer metadata, {path[:200]!r}: more xattrs than one inode can hold")


