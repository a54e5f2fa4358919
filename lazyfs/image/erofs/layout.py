"""
Where everything goes in an EROFS image: from the model's tree to placed inodes.

Layer: lazyfs.image, pure. Used by writer.py only. Order of an image: superblock, device table, directories (each with
the tail of its entries), all other inodes, then whole blocks of large directories and long symlinks. Directories come
in depth-first order, their files in the order of the directories, so that a walk reads forward; like next to like
compresses well. The root is first, since its number has 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazyfs import limits
from lazyfs.errors import FormatError
from lazyfs.image.erofs import ondisk, xattr
from lazyfs.image.erofs.ondisk import BLOCK_BYTES, DIRENT_BYTES, INDEX_BYTES, INODE_BYTES, SLOT_BYTES, round_up
from lazyfs.image.model import FileType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazyfs.image.model import DataMap, Inode


@dataclass(slots=True, eq=False)
class Placed:
    """
    An inode with its place in the image.

    `name` and `parent`: the first of its names. Directories only: `names` (sorted, with . and ..) and, in the same
    order, `targets`; `block_starts`: index of the first name in each block. `data_bytes` is what i_size will say.
    `tail_bytes` follow the inode; `first_block` is that of `whole_blocks` elsewhere.
    """

    inode: Inode
    name: bytes
    parent: Placed | None
    depth: int
    path_bytes: int
    xattrs: bytes = b""
    link_count: int = 0
    names: Sequence[bytes] = ()
    targets: Sequence[Placed] = ()
    block_starts: Sequence[int] = ()
    data_bytes: int = 0
    tail_bytes: int = 0
    whole_blocks: int = 0
    first_block: int = 0
    index_count: int = 0
    unit_shift: int = ondisk.BLOCK_SHIFT
    offset: int = 0

    @property
    def nid(self) -> int:
        return self.offset // SLOT_BYTES

    @property
    def body_offset(self) -> int:
        """Where inode and xattrs end."""
        return self.offset + INODE_BYTES + len(self.xattrs)

    def path(self) -> str:
        """For messages."""
        parts: list[bytes] = []
        node: Placed | None = self
        while node is not None and node.parent is not None:
            parts.append(node.name)
            node = node.parent
        return "/" + b"/".join(reversed(parts)).decode("utf-8", "backslashreplace")


@dataclass(frozen=True, slots=True)
class Layout:
    """All inodes in the order of their offsets, and the size of the image they make (bytes, whole blocks)."""

    inodes: list[Placed]
    image_bytes: int


def lay_out(root: Inode, metadata_start: int) -> Layout:
    """
    Place all inodes of a tree behind byte `metadata_start`.

    Raises:
        FormatError: the tree is not a tree, a name is invalid, or something is too large.

    """
    directories, others = _collect(root)
    inodes = directories + others
    areas: dict[tuple[tuple[bytes, bytes], ...], bytes] = {}
    offset = round_up(metadata_start, SLOT_BYTES)
    for placed in inodes:
        _measure(placed, areas)
        offset = _place(placed, offset)
    next_block = round_up(offset, BLOCK_BYTES) // BLOCK_BYTES
    for placed in inodes:
        if placed.whole_blocks:
            placed.first_block = next_block
            next_block += placed.whole_blocks
    image_bytes = next_block * BLOCK_BYTES
    if image_bytes > limits.BOOTSTRAP_BYTES_MAX:
        raise FormatError(
            f"metadata takes {image_bytes} bytes, at most {limits.BOOTSTRAP_BYTES_MAX} are supported",
            hint="the image has too many entries, or sparse files whose data lies in too many small pieces",
        )
    return Layout(inodes, image_bytes)


def _collect(root: Inode) -> tuple[list[Placed], list[Placed]]:
    if root.type is not FileType.DIRECTORY:
        raise FormatError("the root of an image must be a directory")
    known: dict[int, Placed] = {}
    directories: list[Placed] = []
    others: list[Placed] = []
    top = Placed(root, b"", None, 0, 0)
    known[id(root)] = top
    stack = [top]
    while stack:
        directory = stack.pop()
        directories.append(directory)
        subdirectories = _link_children(directory, known, others)
        stack += reversed(subdirectories)
        if len(directories) + len(others) > limits.ENTRY_COUNT_MAX:
            raise FormatError(f"more than {limits.ENTRY_COUNT_MAX} inodes")
    return directories, others


def _link_children(directory: Placed, known: dict[int, Placed], others: list[Placed]) -> list[Placed]:
    """Fill in `names` and `targets`; returns the subdirectories in order."""
    children = directory.inode.children
    _check_names(directory)
    directory.names = names = sorted([*children, b".", b".."])
    subdirectories: list[Placed] = []
    targets: list[Placed] = []
    path_bytes, depth = directory.path_bytes + (directory.depth > 0), directory.depth + 1
    for name in names:
        child = children.get(name)
        if child is None:
            targets.append(directory if name == b"." else directory.parent or directory)
            continue
        placed = known.get(id(child))
        if placed is None:
            placed = known[id(child)] = Placed(child, name, directory, depth, path_bytes + len(name))
            (subdirectories if child.type is FileType.DIRECTORY else others).append(placed)
        elif child.type is FileType.DIRECTORY:
            raise FormatError(f"directory {placed.path()} has a second name in {directory.path()}")
        placed.link_count += 1
        targets.append(placed)
    directory.targets = targets
    directory.link_count = 2 + len(subdirectories)
    return subdirectories


def _check_names(directory: Placed) -> None:
    children = directory.inode.children
    if not children:
        return
    together = b"".join(children)
    longest = max(map(len, children))
    if b"/" in together or b"\0" in together or longest > limits.NAME_BYTES_MAX or {b"", b".", b".."} & children.keys():
        raise FormatError(f"{directory.path()} has an entry with a name that no file can have")
    if directory.path_bytes + 1 + longest > limits.PATH_BYTES_MAX or directory.depth >= limits.PATH_DEPTH_MAX:
        raise FormatError(f"{directory.path()[:200]}... has an entry whose path is too long or too deep")


def _measure(placed: Placed, areas: dict[tuple[tuple[bytes, bytes], ...], bytes]) -> None:
    inode = placed.inode
    xattrs = inode.attributes.xattrs
    if xattrs:
        area = areas.get(xattrs)
        if area is None:
            try:
                area = areas[xattrs] = xattr.encode_area(xattrs)
            except FormatError as error:
                raise FormatError(f"{placed.path()}: {error}") from error
        placed.xattrs = area
    if inode.type is FileType.REGULAR:
        _measure_file(placed, inode.data)
    elif inode.type is FileType.DIRECTORY:
        _measure_directory(placed)
        _choose_tail(placed)
    elif inode.type is FileType.SYMLINK:
        placed.data_bytes = len(inode.target)
        _choose_tail(placed)


def _measure_file(placed: Placed, data: DataMap) -> None:
    size = placed.data_bytes = placed.inode.size
    if not 0 <= size <= limits.FILE_BYTES_MAX:
        raise FormatError(f"{placed.path()} has {size} bytes, expected 0 to {limits.FILE_BYTES_MAX}")
    shift = data.unit_shift
    if not data.runs:       # nothing but holes: as few units as possible, whatever the map says
        shift = min(max((size - 1).bit_length(), ondisk.BLOCK_SHIFT), ondisk.UNIT_SHIFT_MAX)
    if not ondisk.BLOCK_SHIFT <= shift <= ondisk.UNIT_SHIFT_MAX:
        raise FormatError(f"{placed.path()} is mapped in units of 2^{shift} bytes, which EROFS cannot express")
    placed.unit_shift = shift
    placed.index_count = -(-size >> shift)


def _measure_directory(placed: Placed) -> None:
    """Cut the names into blocks: as many as fit, in order."""
    used = BLOCK_BYTES
    starts: list[int] = []
    for index, size in enumerate(map(len, placed.names)):
        used += DIRENT_BYTES + size
        if used > BLOCK_BYTES:
            starts.append(index)
            used = DIRENT_BYTES + size
    placed.block_starts = starts
    placed.data_bytes = (len(starts) - 1) * BLOCK_BYTES + used


def _choose_tail(placed: Placed) -> None:
    """The last part of the data follows the inode if all of that fits in one block; else it has its own block."""
    tail_bytes = placed.data_bytes % BLOCK_BYTES
    blocks = placed.data_bytes // BLOCK_BYTES
    if tail_bytes and INODE_BYTES + len(placed.xattrs) + tail_bytes <= BLOCK_BYTES:
        placed.tail_bytes, placed.whole_blocks = tail_bytes, blocks
    else:
        placed.tail_bytes, placed.whole_blocks = 0, blocks + (tail_bytes > 0)


def _place(placed: Placed, offset: int) -> int:
    """Give the inode its offset; returns where the next one may begin."""
    if placed.tail_bytes:
        # The kernel wants a tail within one block; we keep the whole inode there.
        length = INODE_BYTES + len(placed.xattrs) + placed.tail_bytes
        if offset % BLOCK_BYTES + length > BLOCK_BYTES:
            offset = round_up(offset, BLOCK_BYTES)
        placed.offset = offset
        return round_up(offset + length, SLOT_BYTES)
    placed.offset = offset
    end = placed.body_offset
    if placed.index_count:
        end = ondisk.index_table_offset(end) + placed.index_count * INDEX_BYTES
    return round_up(end, SLOT_BYTES)
