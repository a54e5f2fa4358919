"""Blob tails and footers: what is written comes back; every single wrong byte of a footer is found or harmless."""

from __future__ import annotations

import struct

import pytest

from lazyfs.errors import BugError, FormatError, UnsupportedError
from lazyfs.image.blob import FOOTER_BYTES, pack_hot_tail, pack_tail, parse_footer, parse_tail
from lazyfs.image.model import DataMap, LayerEntry
from tests.formatkit import CHUNK_SIZE, make_blob

DEVICE = bytes(range(256)) * 16 * 33 + bytes(CHUNK_SIZE * 2)    # 33 blocks, then zeros
ENTRIES = [LayerEntry(b"a", size=132 * 1024, data=DataMap(18, ((0, 1, 0),))), LayerEntry(b"b")]
BLOB, TABLE, TAIL = make_blob(DEVICE, ENTRIES)


def test_tail_comes_back() -> None:
    table, entries = parse_tail(TAIL, len(BLOB))
    assert entries == ENTRIES
    assert (table.rows == TABLE.rows).all()
    assert table.device_digest() == TABLE.device_digest()


def test_footer_says_where_the_parts_are() -> None:
    tail = parse_footer(BLOB[-FOOTER_BYTES:], len(BLOB))
    assert tail.tail_size == len(TAIL)
    assert tail.blob_size == len(BLOB)
    assert tail.data_size == len(BLOB) - len(TAIL)
    assert (tail.chunk_size, tail.device_size) == (CHUNK_SIZE, len(DEVICE))
    assert (tail.entry_count, tail.chunk_count, tail.hot) == (2, TABLE.chunk_count, False)


def test_a_layer_without_data() -> None:
    blob, _, tail = make_blob(b"", [LayerEntry(b"e")])
    table, entries = parse_tail(tail, len(blob))
    assert blob == tail
    assert (table.chunk_count, table.device_size, len(entries)) == (0, 0, 1)


def test_hot_tail() -> None:
    footer = pack_hot_tail(TABLE, 1000)
    tail = parse_footer(footer, 1000 + FOOTER_BYTES)
    assert (tail.hot, tail.chunk_count, tail.data_size, tail.device_size) == (
        True, TABLE.chunk_count, 1000, TABLE.device_size)
    with pytest.raises(FormatError, match="hot blob"):
        parse_tail(footer, 1000 + FOOTER_BYTES)


def test_every_byte_of_the_footer_matters() -> None:
    """But a device that ends elsewhere in its last chunk: only the tail's digest tells that."""
    for position in range(FOOTER_BYTES):
        for flip in (0x01, 0x80, 0xFF):
            footer = bytearray(BLOB[-FOOTER_BYTES:])
            footer[position] ^= flip
            try:
                table, _ = parse_tail(TAIL[:-FOOTER_BYTES] + bytes(footer), len(BLOB))
            except FormatError:
                continue
            assert 16 <= position < 24
            assert table.device_size != len(DEVICE)
            assert table.chunk_count == TABLE.chunk_count


@pytest.mark.parametrize("size", [len(BLOB) - 1, len(BLOB) + 1, 0, FOOTER_BYTES])
def test_a_blob_of_another_size(size: int) -> None:
    with pytest.raises(FormatError):
        parse_tail(TAIL, size)


@pytest.mark.parametrize("tail", [b"", TAIL[:-1], TAIL[1:], b"\0" + TAIL, TAIL + b"\0"])
def test_a_tail_of_another_size(tail: bytes) -> None:
    with pytest.raises(FormatError):
        parse_tail(tail, len(BLOB))


@pytest.mark.parametrize(("offset", "value"), [(8, 2), (10, 3), (12, 12345), (80, 1)])
def test_a_newer_footer_is_unsupported_not_damaged(offset: int, value: int) -> None:
    footer = bytearray(BLOB[-FOOTER_BYTES:])
    struct.pack_into("<H", footer, offset, value)
    with pytest.raises(UnsupportedError):
        parse_footer(footer, len(BLOB))


def test_metadata_of_another_layer_does_not_fit() -> None:
    other, _, _ = make_blob(DEVICE[:4096], [])
    beyond = [LayerEntry(b"a", size=4096, data=DataMap(12, ((0, 1, 1),)))]
    blob, _, tail = make_blob(DEVICE[:4096], beyond)
    assert len(other) != len(blob)
    with pytest.raises(FormatError, match="beyond the layer device"):
        parse_tail(tail, len(blob))


def test_own_table_names_no_other_blob() -> None:
    moved = TABLE.rows.copy()
    moved["blob_index"] = 1
    with pytest.raises(BugError):
        pack_tail(type(TABLE)(CHUNK_SIZE, len(DEVICE), moved), b"", 0, 0)
