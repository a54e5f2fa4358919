"""
A run of chunks becomes stored bytes and digests; under codec lz4, some groups of runs become zstd.

lz4 looks back 64 KiB and has no entropy coder: for some data zstd needs half its bytes, for other data nearly as many.
What it will be cannot be told from samples of a chunk, but neighbouring chunks are alike (correlation of the ratio
0.67), so the first TRIAL_BYTES of each group of GROUP_RUNS runs are compressed both ways, and the outcome holds for
the group. Of the image `ml`, 32 % of the chunks become zstd: the image shrinks by a tenth, and decoding all of it takes
1.3 to 1.4 times as long as with lz4 alone (zstd alone: 2.1 to 2.3). Where groups begin depends on the layer only.

Who calls: converter.pool, in its threads. Layer: converter. No state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazyfs import limits
from lazyfs.image.codec import LEVEL_DEFAULTS, Codec, compress
from lazyfs.image.digest import chunk_digest

if TYPE_CHECKING:
    from concurrent.futures import Future

GROUP_RUNS = 4                  # 8 MiB: the trial costs a seventh of a group's time, and the next group differs often
TRIAL_BYTES = limits.MIB        # of a group's first run
ZSTD_PAYS_RATIO = 1.4           # lz4's bytes against zstd's from which on a group becomes zstd
_ZSTD_LEVEL = LEVEL_DEFAULTS[Codec.ZSTD]
_Stored = tuple[Codec, bytes | memoryview]


@dataclass(frozen=True, slots=True)
class Encoding:
    """How chunks are stored: what, with the layer and the tool's version, decides every byte of a blob."""

    codec: Codec
    level: int
    chunk_size: int

    @property
    def group_runs(self) -> int:
        """How many runs share the outcome of one trial; 1: there are no trials."""
        return GROUP_RUNS if self.codec is Codec.LZ4 else 1


@dataclass(frozen=True, slots=True)
class StoredChunk:
    codec: Codec
    digest: bytes
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Encoded:
    """A run's chunks. `codec`, `level`: what its group is compressed with."""

    chunks: list[StoredChunk]
    codec: Codec
    level: int


def encode_trial(run: memoryview, encoding: Encoding) -> Encoded:
    """Encode the first run of a group, and decide for all of it."""
    codec, level, begun = encoding.codec, encoding.level, None
    if codec is Codec.LZ4:
        chunks = _chunks(run[:TRIAL_BYTES], encoding)
        begun = [compress(chunk, codec, level) for chunk in chunks]
        smaller = [compress(chunk, Codec.ZSTD, _ZSTD_LEVEL) for chunk in chunks]
        if _stored_bytes(begun) > ZSTD_PAYS_RATIO * _stored_bytes(smaller):
            codec, level, begun = Codec.ZSTD, _ZSTD_LEVEL, smaller
    return _encode(run, encoding, codec, level, begun or [])


def encode_run(run: memoryview, encoding: Encoding, trial: Future[Encoded]) -> Encoded:
    """
    Encode another run of a group.

    Args:
        run: its bytes.
        encoding: how large chunks are.
        trial: of the group's first run, which a thread has at least begun with: waiting for it cannot deadlock.

    """
    first = trial.result()
    return _encode(run, encoding, first.codec, first.level, [])


def _encode(run: memoryview, encoding: Encoding, codec: Codec, level: int, begun: list[_Stored]) -> Encoded:
    """`begun`: what the run's first chunks have become already."""
    chunks = []
    for index, chunk in enumerate(_chunks(run, encoding)):
        used, data = begun[index] if index < len(begun) else compress(chunk, codec, level)
        chunks.append(StoredChunk(used, chunk_digest(chunk), data))
    return Encoded(chunks, codec, level)


def _chunks(data: memoryview, encoding: Encoding) -> list[memoryview]:
    return [data[start : start + encoding.chunk_size] for start in range(0, len(data), encoding.chunk_size)]


def _stored_bytes(chunks: list[_Stored]) -> int:
    return sum(len(data) for _, data in chunks)
