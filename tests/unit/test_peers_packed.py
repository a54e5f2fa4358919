"""Packed answers: frames of several makers are one answer; what is hostile is refused, in bounded memory."""

from __future__ import annotations

import contextlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.errors import FormatError
from lazyfs.peers.packed import pack, unpack

MIB = 1 << 20


@given(parts=st.lists(st.binary(max_size=2000), max_size=5))
def test_frames_one_after_the_other_are_one_answer(parts: list[bytes]) -> None:
    whole = b"".join(parts)
    assert unpack(b"".join(map(pack, parts)), len(whole)) == whole
    if whole:
        with pytest.raises(FormatError):
            unpack(b"".join(map(pack, parts)), len(whole) - 1)


@given(data=st.binary(max_size=300), cut=st.integers(0, 300), flip=st.integers(0, 300))
def test_what_is_damaged_is_refused_or_bounded(data: bytes, cut: int, flip: int) -> None:
    for bad in (data, pack(data)[:cut], bytearray(pack(data))):
        if isinstance(bad, bytearray):
            bad[flip % len(bad)] ^= 0x55
        with contextlib.suppress(FormatError):
            assert len(unpack(bytes(bad), 1000)) <= 1000


def test_bombs_are_no_larger_than_what_is_allowed() -> None:
    bomb = pack(bytes(64 * MIB))
    assert len(bomb) < MIB
    with pytest.raises(FormatError, match="more than 1048576 bytes"):
        unpack(bomb, MIB)
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    with pytest.raises(FormatError, match="damaged"):
        unpack(compressor.compress(b"x") + compressor.flush(), MIB)
