"""
Maps of sparse files: old GNU (type S) and the three PAX forms 0.0, 0.1 and 1.0.

Pure but for `take`, through which more of the archive is read where a map lies there. Called by the reader. Result:
segments as TarMember has them. Source: GNU tar manual, "Sparse Formats"; Go and GNU tar agree on what is checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from converter.tar.fields import bounded, decimal, number
from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.limits import FILE_BYTES_MAX, SPARSE_SEGMENT_COUNT_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from converter.tar.pax import PaxHeader

Segments = tuple[tuple[int, int], ...]
BLOCK = 512
_NUMBER_BYTES_MAX = 20             # digits of a 64-bit number
_PAIR_BYTES = 24
_HEADER_PAIRS = slice(41, 137)     # of the header's last 167 bytes: 4 pairs
_HEADER_MORE = 137
_HEADER_SIZE = slice(138, 150)
_EXTENSION_PAIRS = slice(0, 504)   # of an extension block: 21 pairs
_EXTENSION_MORE = 504


def check(pairs: Sequence[int], real_size: int, stored_size: int) -> Segments:
    """
    Segments from offsets and lengths that alternate: sorted, apart, inside the file, and all of the stored data.

    Segments of no length (GNU tar marks the end of the file by one) are left out, neighbours are joined.
    """
    bounded("the size of a sparse file", real_size, FILE_BYTES_MAX)
    segments: list[tuple[int, int]] = []
    end = total = 0
    for offset, length in zip(pairs[::2], pairs[1::2], strict=True):
        if offset < end or length < 0 or offset + length > real_size:
            raise FormatError(
                f"a sparse file's segment ({offset}, {length}) is outside {end} to {real_size}, what is left for it"
            )
        if length and segments and offset == end:
            segments[-1] = segments[-1][0], segments[-1][1] + length
        elif length:
            segments.append((offset, length))
        end = offset + length
        total += length
    if total != stored_size:
        raise FormatError(f"a sparse file's segments have {total} bytes, {stored_size} are stored")
    return tuple(segments)


def read_gnu(tail: bytes, stored_size: int, take: Callable[[int], bytes]) -> tuple[int, Segments]:
    """
    Old GNU format.

    Args:
        tail: the last 167 bytes of the header.
        stored_size: of its data in the archive.
        take: reads the extension blocks that follow the header.

    Returns:
        (the file's size, segments)

    """
    pairs: list[int] = []
    more = _add_gnu_pairs(pairs, tail[_HEADER_PAIRS]) and bool(tail[_HEADER_MORE])
    if tail[_HEADER_MORE] and not more:
        raise FormatError("a sparse file's map ends before its extension")
    while more:
        block = take(BLOCK)
        full = _add_gnu_pairs(pairs, block[_EXTENSION_PAIRS])
        more = bool(block[_EXTENSION_MORE])
        if more and not full:
            raise FormatError("a sparse file's map ends before its extension")
        if len(pairs) > 2 * SPARSE_SEGMENT_COUNT_MAX:
            raise FormatError(f"a sparse file of more than {SPARSE_SEGMENT_COUNT_MAX} segments")
    real_size = number(tail[_HEADER_SIZE])
    return real_size, check(pairs, real_size, stored_size)


def _add_gnu_pairs(pairs: list[int], area: bytes) -> bool:
    """Add the pairs of one area, up to the first unused one; False: there was an unused one."""
    for start in range(0, len(area), _PAIR_BYTES):
        if not area[start]:
            if any(area[start:]):
                raise FormatError("a sparse file's map goes on after its end")
            return False
        pairs += number(area[start : start + 12]), number(area[start + 12 : start + _PAIR_BYTES])
    return True


def read_pax(
    pax: PaxHeader, stored_size: int, take: Callable[[int], bytes]
) -> tuple[bytes | None, int, Segments, int]:
    """
    A file whose extended header has GNU.sparse records.

    Args:
        pax: the extended header.
        stored_size: of its data in the archive; format 1.0 has the map at its start.
        take: reads that map.

    Returns:
        (its path if the records have one, its size, segments, bytes of the map in front of the data)

    """
    keys = pax.sparse
    version = keys.get(b"major", b""), keys.get(b"minor", b"")
    if version not in {(b"", b""), (b"0", b"0"), (b"0", b"1"), (b"1", b"0")}:
        raise UnsupportedError(f"a sparse file of version {version[0][:20]!r}.{version[1][:20]!r}")
    raw_size = keys.get(b"realsize") if version[0] == b"1" else keys.get(b"size", keys.get(b"realsize"))
    if raw_size is None:
        raise FormatError("a sparse file whose size is not stated")
    real_size = decimal(b"GNU.sparse.size", raw_size)
    path = keys.get(b"name") or None
    map_size = 0
    if version[0] == b"1":
        pairs, map_size = _read_map(stored_size, take)
    else:
        pairs = _pairs_of_records(pax)
    return path, real_size, check(pairs, real_size, stored_size - map_size), map_size


def _pairs_of_records(pax: PaxHeader) -> list[int]:
    """Formats 0.0 (a record a number) and 0.1 (one record with commas)."""
    texts = pax.sparse_pairs
    if b"map" in pax.sparse:
        if texts:
            raise FormatError("a sparse file with two maps")
        texts = pax.sparse[b"map"].split(b",") if pax.sparse[b"map"] else []
    if len(texts) % 2:
        raise FormatError("a sparse file's map holds an odd number of numbers")
    count = pax.sparse.get(b"numblocks")
    if count is not None and decimal(b"GNU.sparse.numblocks", count) != len(texts) // 2:
        raise FormatError(f"a sparse file's map has {len(texts) // 2} segments, its header says {count[:20]!r}")
    return [decimal(b"GNU.sparse.map", item) for item in texts]


def _read_map(stored_size: int, take: Callable[[int], bytes]) -> tuple[list[int], int]:
    """Format 1.0: lines with the count and then the numbers, up to the end of a block."""
    numbers: list[int] = []
    wanted = 1
    rest = b""
    size = 0
    while len(numbers) < wanted:
        if size + BLOCK > stored_size:
            raise FormatError("a sparse file's map is longer than its data")
        *lines, rest = (rest + take(BLOCK)).split(b"\n")
        size += BLOCK
        if not lines and len(rest) > _NUMBER_BYTES_MAX:
            raise FormatError("a sparse file's map is not made of lines")
        for line in lines:
            if len(numbers) == wanted:
                break
            numbers.append(decimal(b"GNU.sparse.map", line))
            if len(numbers) == 1:
                wanted += 2 * bounded("the number of a sparse file's segments", numbers[0], SPARSE_SEGMENT_COUNT_MAX)
    return numbers[1:], size
