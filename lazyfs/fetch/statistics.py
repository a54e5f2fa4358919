"""Counters of the fetch engine, for people and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class FetchStatistics:
    """Since the worker's start, all devices together. Bytes are stored (compressed) bytes."""

    hits: int = 0                   # reads answered from the cache at once
    misses: int = 0                 # reads that had to wait for a chunk
    hot_reads: int = 0              # of both: answered by the hot device, in whole or in part
    waits: int = 0                  # chunks that a read found on their way already
    requests: int = 0               # range requests sent
    chunks_fetched: int = 0         # chunks that landed
    chunks_prefetched: int = 0      # of these: by a window of the hot blob
    chunks_read_ahead: int = 0      # of these: for a sequential reader
    fetched_stored_bytes: int = 0   # received from sources, repetitions and bad chunks included
    touched_stored_bytes: int = 0   # of the chunks that reads asked for, each once a device
    retries: int = 0                # transfers that are tried again
    bad_chunks: int = 0             # arrived with another digest or undecodable
    not_stored: int = 0             # landed, but only in memory: disk full
    errors: int = 0                 # reads that failed

    @property
    def bytes_from_source(self) -> int:
        return self.fetched_stored_bytes
