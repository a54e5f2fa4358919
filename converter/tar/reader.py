"""
TarReader: walks a layer's archive, one entry at a time, and hands out the stored data.

Called by converter (layer by layer, over a LayerStream) and by `lazyfs check`. Accepts what POSIX ustar and PAX, GNU
and V7 tars write; refuses everything that two readers might take for two different things. Where readers disagree on
an honest archive, Go's archive/tar is followed, because container runtimes use it:
- a name with a `/` at its end makes a directory of type NUL (V7), but not of type `0` (GNU tar: of both);
- the archive ends at two zero blocks, or where the stream ends: at a block boundary, or right after a member's data;
- directories, links and devices with data, and global PAX headers that change entries, are refused.
Sources: POSIX.1-2017 pax; GNU tar manual "Tar Internals"; OCI image-spec v1.1 layer.md.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn, Protocol

from converter.tar import header as header_format
from converter.tar import pax as pax_format
from converter.tar import sparse, xattrs
from converter.tar.fields import bounded, check_checksum, number
from converter.tar.header import BLOCK, SIZE_FIELD, TYPE_OFFSET, Extended, Header
from converter.tar.names import WHITEOUT, check_length, link_target, normalise, symlink_target, whiteout
from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.image.model import EntryKind, FileType, LayerEntry
from lazyfs.limits import ENTRY_COUNT_MAX, KIB, LAYER_BYTES_MAX, TAR_HEADER_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator

_ZEROS = bytes(BLOCK)
_READ_BYTES = 1024 * KIB      # asked of the stream at once; LayerStream gives its blocks of that size without a copy
_WARNING_COUNT_MAX = 20       # more are only counted
_MESSAGE_BYTES_MAX = 200      # of a path in a message
_EXTENSIONS = frozenset(b"xXgLK")
_HARDLINK = b"1"
_SYMLINK_MODE = 0o777
_TYPES = {
    b"0": FileType.REGULAR, b"\0": FileType.REGULAR, b"7": FileType.REGULAR, b"S": FileType.REGULAR,
    b"2": FileType.SYMLINK, b"3": FileType.CHARACTER, b"4": FileType.BLOCK, b"5": FileType.DIRECTORY,
    b"6": FileType.FIFO,
}
_NOTHING: tuple[tuple[int, int], ...] = ()
_REGULAR, _DIRECTORY, _NODE = FileType.REGULAR, FileType.DIRECTORY, EntryKind.NODE  # enum attributes are slow


class Readable(Protocol):
    """All that is needed of a stream: up to `size` bytes, b"" only at the end."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(slots=True)
class TarMember:
    """
    An entry, and where a regular file's stored bytes belong.

    `segments`: (offset in the file, length), sorted, apart, not empty; what lies between them is zeros. The bytes
    that TarReader.read_data() gives are theirs, one after another.
    """

    entry: LayerEntry
    segments: tuple[tuple[int, int], ...]


class TarReader:
    """
    Iterate to get TarMembers (once); between two of them read_data() gives the current one's bytes.

    Args:
        stream: the uncompressed archive, from its start. Not closed here; what follows the archive's end is not read.
        name: of the layer, for messages.

    Attributes:
        dropped: how much was left out, by reason ("AUFS metadata", "overlay xattr", "xattr namespace",
            "xattr of another file type", "text label").
        warnings: one line each for the first of them.

    """

    def __init__(self, stream: Readable, *, name: str) -> None:
        self.warnings: list[str] = []
        self.dropped: Counter[str] = Counter()
        self._stream = stream
        self._name = name
        self._block = b""          # the part of the stream that is in memory ...
        self._position = 0         # ... and how far it is used
        self._base = 0             # offset in the archive of its first byte
        self._left = 0             # stored bytes of the current member that nobody has read yet
        self._padding = 0          # zeros after them
        self._path = b""           # of the current member, for messages; b"" before it is known
        self._start = 0            # offset in the archive of the current member's header
        self._members = self._walk()

    def __iter__(self) -> Iterator[TarMember]:
        return self._members

    def read_data(self, size: int) -> bytes:
        """
        Return the current member's next stored bytes: `size`, fewer only at its end, b"" after it.

        Raises:
            FormatError: the archive ends before the member does.

        """
        size = min(size, self._left)
        start = self._position
        end = start + size
        if end <= len(self._block):
            data = self._block[start:end]
            self._position = end
        else:
            try:
                data = self._take(size)
            except FormatError as error:
                self._fail(error)
        self._left -= size
        return data

    # --- the walk -------------------------------------------------------------------------------------------------
    def _walk(self) -> Iterator[TarMember]:
        count = 0
        while True:
            try:
                self._skip_member()
                self._path, self._start = b"", self._base + self._position
                extended = Extended()
                block = self._next_header(extended)
                if block is None:
                    return
                count = bounded("the number of entries", count + 1, ENTRY_COUNT_MAX)
                member = self._member(header_format.parse(block, extended))
            except FormatError as error:
                self._fail(error)
            if member is not None:
                yield member

    def _next_header(self, extended: Extended) -> bytes | None:
        """The next entry's header block, with what extension members before it said; None at the archive's end."""
        while True:
            block = self._read_block()
            if not block or block == _ZEROS:
                if extended:
                    raise FormatError("the archive ends after an extended header, where its entry is expected")
                if block and self._read_block() not in {b"", _ZEROS}:
                    raise FormatError("a single zero block within the archive")
                return None
            check_checksum(block)
            if block[TYPE_OFFSET] not in _EXTENSIONS:
                return block
            self._extend(extended, block)

    def _extend(self, extended: Extended, block: bytes) -> None:
        """Read one extension member. Each kind may come once before an entry: which one counts is not agreed on."""
        kind = block[TYPE_OFFSET : TYPE_OFFSET + 1]
        size = bounded("the size of an extended header", number(block[SIZE_FIELD]), TAR_HEADER_BYTES_MAX)
        body = self._take(size)
        self._skip(-size % BLOCK)
        if kind == b"g":
            if extended:
                raise FormatError("a global PAX header between an extended header and its entry")
            pax_format.check_global(body)
            return
        if kind in {b"x", b"X"}:
            twice, extended.pax = extended.pax is not None, pax_format.parse(body)
        elif kind == b"L":
            twice, extended.name = extended.name is not None, body.rstrip(b"\0")
        else:
            twice, extended.link = extended.link is not None, body.rstrip(b"\0")
        if twice:
            raise FormatError(f"two extended headers of type {kind!r} before one entry")

    def _member(self, header: Header) -> TarMember | None:
        """Make a member of a header, and prepare read_data() for it. None: AUFS metadata."""
        self._path = header.name
        size = stored = header.size
        segments = ((0, size),) if size else _NOTHING
        if header.is_sparse:
            size, segments, stored = self._sparse(header)
        self._left, self._padding = stored, -stored % BLOCK
        kind = _TYPES.get(header.kind)
        if header.kind == b"\0" and header.name.endswith(b"/"):
            kind = _DIRECTORY
        if header.size and kind is not _REGULAR:
            raise FormatError(f"an entry of type {header.kind!r} with {header.size} bytes, only regular files have any")
        path = normalise(header.name)
        if WHITEOUT in path:
            found = whiteout(path)
            if found is None:
                self._drop("AUFS metadata", "")
                return None
            if found[0] is not _NODE:
                check_length(found[1])
                return TarMember(LayerEntry(found[1], found[0]), _NOTHING)
        check_length(path)
        if kind is None:
            if header.kind == _HARDLINK:
                return TarMember(LayerEntry(path, EntryKind.HARDLINK, target=link_target(header.link)), _NOTHING)
            raise UnsupportedError(f"an entry of type {header.kind!r}, which is not known here")
        if not path and kind is not _DIRECTORY:
            raise FormatError("the root of the image is not a directory")
        return TarMember(self._node(header, path, kind, size), segments)

    def _node(self, header: Header, path: bytes, kind: FileType, size: int) -> LayerEntry:
        pax = header.pax
        kept: tuple[tuple[bytes, bytes], ...] = ()
        if pax is not None and (pax.xattrs or pax.dropped):
            kept = xattrs.select(pax.xattrs, kind, self._drop_xattr)
            for key in pax.dropped:
                self._drop("text label", repr(key[:60]))
        found = header_format.attributes(header, kept)
        if kind is _REGULAR:
            return LayerEntry(path, _NODE, kind, found, size)
        if kind is _DIRECTORY or kind is FileType.FIFO:
            return LayerEntry(path, _NODE, kind, found)
        if kind is FileType.SYMLINK:
            # Linux has one mode of symlinks, whatever an archive says.
            found = found if found.mode == _SYMLINK_MODE else replace(found, mode=_SYMLINK_MODE)
            return LayerEntry(path, _NODE, kind, found, target=symlink_target(header.link))
        return LayerEntry(path, _NODE, kind, found, rdev=header_format.device(header))

    def _sparse(self, header: Header) -> tuple[int, tuple[tuple[int, int], ...], int]:
        """(size, segments, stored bytes) of a sparse file; may rename it."""
        pax = header.pax
        in_pax = pax is not None and bool(pax.sparse or pax.sparse_pairs)
        if header.kind == b"S":
            if in_pax or not header.is_gnu:
                raise FormatError("a sparse file of type b'S', but its header is not GNU's")
            size, segments = sparse.read_gnu(header.tail, header.size, self._take)
            return size, segments, header.size
        if pax is None or _TYPES.get(header.kind) is not _REGULAR:
            raise FormatError(f"an entry of type {header.kind!r} with the records of a sparse file")
        path, size, segments, map_size = sparse.read_pax(pax, header.size, self._take)
        if path is not None:
            header.name = self._path = path
        return size, segments, header.size - map_size

    # --- the stream -----------------------------------------------------------------------------------------------
    def _read_block(self) -> bytes:
        """One block, or b"" at the end of the stream."""
        start = self._position
        end = start + BLOCK
        if end <= len(self._block):
            self._position = end
            return self._block[start:end]
        if start == len(self._block) and not self._fill():
            return b""
        return self._take(BLOCK)

    def _take(self, size: int) -> bytes:
        """Exactly `size` bytes."""
        parts = []
        missing = size
        while missing:
            if self._position == len(self._block) and not self._fill():
                raise FormatError(f"the archive ends at byte {self._base}, {missing} bytes short")
            part = self._block[self._position : self._position + missing]
            self._position += len(part)
            missing -= len(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _skip(self, size: int) -> None:
        while size:
            if self._position == len(self._block) and not self._fill():
                raise FormatError(f"the archive ends at byte {self._base}, {size} bytes short")
            step = min(size, len(self._block) - self._position)
            self._position += step
            size -= step

    def _skip_member(self) -> None:
        """Pass over what is left of the current member. The zeros after the last one's data may be missing."""
        end = self._position + self._left + self._padding
        if end <= len(self._block):
            self._position = end
            self._left = self._padding = 0
            return
        if self._left:
            self._skip(self._left)
            self._left = 0
        if self._padding and (self._position < len(self._block) or self._fill()):
            self._skip(self._padding)
        self._padding = 0

    def _fill(self) -> bool:
        """Get the next part of the stream; False at its end."""
        self._base += len(self._block)
        self._position = 0
        self._block = self._stream.read(_READ_BYTES)
        if self._base + len(self._block) > LAYER_BYTES_MAX:
            raise FormatError(f"the archive has more than {LAYER_BYTES_MAX} bytes")
        return bool(self._block)

    # --- messages -------------------------------------------------------------------------------------------------
    def _where(self) -> str:
        if self._path:
            return f"{self._name}: entry {self._path[:_MESSAGE_BYTES_MAX]!r}"
        return f"{self._name}: at byte {self._start} of the archive"

    def _fail(self, error: FormatError) -> NoReturn:
        raise type(error)(f"{self._where()}: {error}", hint=error.hint) from error

    def _drop(self, reason: str, what: str) -> None:
        self.dropped[reason] += 1
        if len(self.warnings) < _WARNING_COUNT_MAX:
            self.warnings.append(f"{self._where()}: left out, {reason} {what}".rstrip())

    def _drop_xattr(self, reason: str, name: bytes) -> None:
        self._drop(reason, repr(name[:60]))
