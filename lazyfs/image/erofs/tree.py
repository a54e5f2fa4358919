"""
Validate the directory tree of an EROFS image, one level of the tree at a time, with numpy.

Layer: lazyfs.image, pure. Used by reader.py only. What holds afterwards: the directories form a tree (each has one
parent; . and .. are right), names are valid, strictly ascending within a directory, and no path is longer or deeper
than our limits. Entry types are only claims until inodes.py has compared them with the inodes.

Work and memory are linear in the image: no directory is read twice, and all directories' data together may not be
larger than the image (regions.py shows later that they do not overlap).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lazyfs import limits
from lazyfs.errors import FormatError
from lazyfs.image.erofs import ondisk
from lazyfs.image.erofs.ondisk import (
    BLOCK_BYTES,
    DIRENT_BYTES,
    INODE_BYTES,
    SLOT_BYTES,
    Bools,
    Int64s,
    Records,
    Views,
    first_wrong,
    positions_within,
)
from lazyfs.image.model import FileType

_DOT = ord(".")
_DIRENT_COUNT_MAX = 3 * limits.ENTRY_COUNT_MAX     # with . and .. of every directory
_DIRECTORY_MODE = ondisk.MODE_OF_TYPE[FileType.DIRECTORY]


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """
    All directories, parents before children (0 is the root), and their entries without . and ..

    Entries of directory i are rows `first_entry[i]` to `first_entry[i + 1]` of the entry arrays. An entry's name is
    `names[name_start : name_start + name_bytes]`.
    """

    directory_nids: Int64s
    parent_nids: Int64s
    first_entry: Int64s
    entry_nids: Int64s
    entry_types: npt.NDArray[np.uint8]
    entry_owners: Int64s
    name_starts: Int64s
    name_bytes: Int64s
    names: bytes


@dataclass(frozen=True, slots=True, eq=False)
class _Level:
    """All dirents (with . and ..) of the directories of one depth; owners are indexes into that level."""

    owners: Int64s
    nids: Int64s
    types: npt.NDArray[np.uint8]
    name_starts: Int64s
    name_bytes: Int64s
    names: bytes
    dots: npt.NDArray[np.uint8]    # 1 for ".", 2 for "..", else 0
    data_bytes: int


class TreeWalk:
    """The walk from the root down. Use once: `TreeWalk(views).run(root_nid)`."""

    def __init__(self, views: Views) -> None:
        self._views = views
        self._seen: Bools = np.zeros(len(views.inodes), dtype=np.bool_)
        self._levels: list[_Level] = []
        self._owner_bases: list[int] = []
        self._directories: list[Int64s] = []
        self._parents: list[Int64s] = []
        self._data_bytes = 0
        self._dirent_count = 0

    def run(self, root_nid: int) -> Tree:
        nids = parents = np.array([root_nid], dtype=np.int64)
        path_bytes = np.zeros(1, dtype=np.int64)
        count = 0
        while len(nids):
            self._admit(nids)
            level = _read_level(self._views, nids)
            self._owner_bases.append(count)
            count += len(nids)
            self._data_bytes += level.data_bytes
            if self._data_bytes > self._views.size:
                raise FormatError("EROFS directories overlap: together they are larger than the image")
            self._dirent_count += len(level.nids)
            if self._dirent_count > _DIRENT_COUNT_MAX:
                raise FormatError(f"EROFS image has more than {_DIRENT_COUNT_MAX} directory entries")
            self._levels.append(level)
            self._directories.append(nids)
            self._parents.append(parents)
            below = _check_dots(level, nids, parents)
            lengths = path_bytes[level.owners] + level.name_bytes + (len(self._levels) > 1)
            _check_depth(lengths[level.dots == 0], len(self._levels))
            parents = nids[level.owners[below]]
            nids = level.nids[below]
            path_bytes = lengths[below]
        return self._finish()

    def _admit(self, nids: Int64s) -> None:
        """Each directory once: neither twice in this level nor in one above (a cycle, or two parents)."""
        if nids.min() < 0 or nids.max() >= len(self._seen):
            raise FormatError("EROFS directory entry names an inode outside the image")
        if self._seen[nids].any() or len(np.unique(nids)) != len(nids):
            raise FormatError("EROFS directory has two parents, or contains itself")
        self._seen[nids] = True

    def _finish(self) -> Tree:
        levels = self._levels
        owners = np.concatenate([level.owners + base for level, base in zip(levels, self._owner_bases, strict=True)])
        bases = np.cumsum([0] + [len(level.names) for level in levels])
        starts = np.concatenate([level.name_starts + base for level, base in zip(levels, bases, strict=False)])
        lengths = np.concatenate([level.name_bytes for level in levels])
        names = b"".join(level.names for level in levels)
        _check_order(names, starts, lengths, owners)
        keep = np.concatenate([level.dots for level in levels]) == 0
        directories = np.concatenate(self._directories)
        owners = owners[keep]
        per_directory = np.bincount(owners, minlength=len(directories))
        return Tree(
            directories,
            np.concatenate(self._parents),
            np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(per_directory)]),
            np.concatenate([level.nids for level in levels])[keep],
            np.concatenate([level.types for level in levels])[keep],
            owners,
            starts[keep],
            lengths[keep],
            names,
        )


def _read_level(views: Views, nids: Int64s) -> _Level:
    starts, lengths, owners = _directory_blocks(views, nids)
    dirents, counts = _dirents(views, starts, lengths)
    firsts = np.cumsum(counts) - counts
    offsets = dirents["name_offset"].astype(np.int64)
    areas = _name_areas(views, starts + offsets[firsts], starts + lengths)
    area_bytes = np.fromiter(map(len, areas), dtype=np.int64, count=len(areas))
    ends = np.empty_like(offsets)
    ends[:-1] = offsets[1:]
    lasts = firsts + counts - 1
    ends[lasts] = offsets[firsts] + area_bytes
    name_bytes = ends - offsets
    wrong = first_wrong((name_bytes < 1) | (name_bytes > limits.NAME_BYTES_MAX) | (dirents["reserved"] != 0))
    if wrong >= 0:
        nid = nids[owners[np.repeat(np.arange(len(counts)), counts)[wrong]]]
        raise FormatError(f"EROFS directory {nid} has an entry with an empty, overlong or misplaced name")
    names = b"".join(areas)
    if b"/" in names:
        raise FormatError("EROFS directory has an entry with '/' in its name")
    # Beyond 2^63 is as wrong as any other number too large, and stays so as a negative one.
    entry_nids = dirents["nid"].astype(np.int64)
    name_starts = np.cumsum(name_bytes) - name_bytes
    return _Level(
        np.repeat(owners, counts),
        entry_nids,
        dirents["type"],
        name_starts,
        name_bytes,
        names,
        _find_dots(names, name_starts, name_bytes),
        int(lengths.sum()),
    )


def _directory_blocks(views: Views, nids: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """Offset, size in bytes and owner of every block of the directories, in order."""
    inodes: Records = views.inodes[nids]
    form, raw_size = inodes["format"], inodes["size"]
    inline = form == ondisk.FORMAT_INLINE
    wrong = (inodes["mode"] >> 12 != _DIRECTORY_MODE) | ~(inline | (form == ondisk.FORMAT_PLAIN))
    wrong |= (raw_size < DIRENT_BYTES) | (raw_size > views.size)
    _refuse(wrong, nids, "is not a directory, or has an impossible format or size")
    size = raw_size.astype(np.int64)
    offset = nids * SLOT_BYTES
    units = inodes["xattr_units"].astype(np.int64)
    body = offset + INODE_BYTES + np.where(units > 0, 8 + 4 * units, 0)
    counts = (size + BLOCK_BYTES - 1) // BLOCK_BYTES
    tail = size - (counts - 1) * BLOCK_BYTES
    first = inodes["u"].astype(np.int64) * BLOCK_BYTES
    outside = inline & (body + tail > offset // BLOCK_BYTES * BLOCK_BYTES + BLOCK_BYTES)
    outside |= (counts - inline > 0) & (first + (counts - inline) * BLOCK_BYTES > views.size)
    _refuse(outside, nids, "has its entries outside the image, or a tail outside its block")
    if int(size.sum()) > views.size:
        raise FormatError("EROFS directories overlap: together they are larger than the image")
    owners = np.repeat(np.arange(len(nids), dtype=np.int64), counts)
    number = positions_within(counts)
    last = number == counts[owners] - 1
    starts = np.where(last & inline[owners], body[owners], first[owners] + number * BLOCK_BYTES)
    lengths = np.where(last, tail[owners], BLOCK_BYTES)
    _refuse(lengths <= DIRENT_BYTES, nids[owners], "has a block too short for an entry")
    return starts, lengths, owners


def _dirents(views: Views, starts: Int64s, lengths: Int64s) -> tuple[Records, Int64s]:
    """All dirents of the blocks, and how many each block has; the first one's name offset says that."""
    first = views.dirents["name_offset"][starts // 4].astype(np.int64)
    if ((first < DIRENT_BYTES) | (first >= lengths) | (first % DIRENT_BYTES != 0)).any():
        raise FormatError("EROFS directory block has an impossible first name offset")
    counts = first // DIRENT_BYTES
    if int(counts.sum()) > _DIRENT_COUNT_MAX:
        raise FormatError(f"EROFS image has more than {_DIRENT_COUNT_MAX} directory entries")
    positions = np.repeat(starts // 4, counts) + positions_within(counts) * (DIRENT_BYTES // 4)
    return views.dirents[positions], counts


def _name_areas(views: Views, starts: Int64s, ends: Int64s) -> list[bytes]:
    """The bytes of all names of each block: to the block's end, or to the NUL that ends the last name."""
    data = views.data
    areas = [bytes(data[start:end]) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    return [area.partition(b"\0")[0] for area in areas]


def _find_dots(names: bytes, starts: Int64s, lengths: Int64s) -> npt.NDArray[np.uint8]:
    """1 for the name ".", 2 for "..", else 0."""
    text = np.frombuffer(names, dtype=np.uint8)
    first = text[starts] == _DOT
    second = text[np.minimum(starts + 1, len(text) - 1)] == _DOT
    found: npt.NDArray[np.uint8] = (first & (lengths == 1)) + 2 * (first & second & (lengths == 2)).astype(np.uint8)
    return found


def _check_dots(level: _Level, nids: Int64s, parents: Int64s) -> Int64s:
    """Every directory has the right . and ..; returns the rows of its subdirectories."""
    for number, targets in ((1, nids), (2, parents)):
        rows = np.flatnonzero(level.dots == number)
        if len(rows) != len(nids) or (level.owners[rows] != np.arange(len(nids))).any():
            raise FormatError(f"EROFS directory without exactly one {'.' * number!r}")
        _refuse(level.nids[rows] != targets, nids, f"has a wrong {'.' * number!r}")
    directory = level.types == FileType.DIRECTORY
    if not directory[level.dots > 0].all():
        raise FormatError("EROFS directory has a '.' or '..' that is not of type directory")
    return np.flatnonzero(directory & (level.dots == 0))


def _check_depth(path_bytes: Int64s, depth: int) -> None:
    if len(path_bytes) and (depth > limits.PATH_DEPTH_MAX or path_bytes.max() > limits.PATH_BYTES_MAX):
        raise FormatError(f"EROFS image has a path deeper than {limits.PATH_DEPTH_MAX} or longer than PATH_MAX")


def _check_order(names: bytes, starts: Int64s, lengths: Int64s, owners: Int64s) -> None:
    """
    Names strictly ascending within each directory.

    Compares neighbours eight bytes at a time, as big-endian numbers; only those still equal go on. A name holds no
    NUL, so one that ends early (padded with zeros) is smaller, as it should be.
    """
    words = np.ndarray((len(names) + 1,), dtype=">u8", buffer=names + bytes(8), strides=(1,))
    left = np.flatnonzero(owners[1:] == owners[:-1])
    for position in range(0, limits.NAME_BYTES_MAX + 1, 8):
        a = _word(words, starts[left], lengths[left], position)
        b = _word(words, starts[left + 1], lengths[left + 1], position)
        if (a > b).any():
            raise FormatError("EROFS directory is not sorted by name")
        left = left[a == b]
        if not len(left):
            return
    raise FormatError("EROFS directory has two entries of one name")


def _word(
    words: npt.NDArray[np.uint64], starts: Int64s, lengths: Int64s, position: int
) -> npt.NDArray[np.uint64]:
    """Bytes [position, position + 8) of each name, zero beyond its end."""
    rest = lengths - position
    value = words[np.minimum(starts + position, len(words) - 1)].astype(np.uint64)
    shift = np.clip((8 - rest) * 8, 0, 56).astype(np.uint64)
    kept: npt.NDArray[np.uint64] = np.where(rest > 0, value >> shift << shift, np.uint64(0))
    return kept


def _refuse(wrong: Bools, nids: Int64s, what: str) -> None:
    index = first_wrong(wrong)
    if index >= 0:
        raise FormatError(f"EROFS inode {nids[index]} {what}")
