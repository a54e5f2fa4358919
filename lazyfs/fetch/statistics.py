"""Counters of the fetch engine, for people and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lazyfs.fetch.transfer import Priority

if TYPE_CHECKING:
    from lazyfs.fetch.transfer import Transfer

SOURCE_COUNT_MAX = 32            # told apart; a node has a registry or three, and their mirrors
OTHER = "other"


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
    chunks_copied: int = 0          # of these: by a background copy
    copied_stored_bytes: int = 0    # received for background copies, repetitions and bad chunks included
    fetched_stored_bytes: int = 0   # received from sources, repetitions and bad chunks included
    touched_stored_bytes: int = 0   # of the chunks that reads asked for, each once a device
    retries: int = 0                # transfers that are tried again
    bad_chunks: int = 0             # arrived with another digest or undecodable
    not_stored: int = 0             # landed, but only in memory: disk full
    errors: int = 0                 # reads that failed
    peer_chunks: int = 0            # of chunks_fetched: peers gave them
    peer_bytes: int = 0             # of these, as they are (not compressed); not in fetched_stored_bytes
    passed_on: int = 0              # chunks that were fetched because peers asked for them
    bytes_by_source: dict[str, int] = field(default_factory=dict)   # fetched_stored_bytes by the server that gave them

    def count(self, transfer: Transfer) -> None:
        """A transfer is over."""
        self.fetched_stored_bytes += transfer.received_bytes
        self.count_source(transfer.server, transfer.received_bytes)
        self.chunks_fetched += transfer.landed_count
        if transfer.priority is Priority.PREFETCH:
            self.chunks_prefetched += transfer.landed_count
        elif transfer.priority is Priority.BACKGROUND:
            self.chunks_read_ahead += transfer.landed_count
        elif transfer.priority is Priority.COPY:
            self.chunks_copied += transfer.landed_count
            self.copied_stored_bytes += transfer.received_bytes

    def count_peer(self, priority: Priority, size: int) -> None:
        """A chunk came from a peer; `size`: its bytes."""
        self.chunks_fetched += 1
        self.peer_chunks += 1
        self.peer_bytes += size
        if priority is Priority.PREFETCH:
            self.chunks_prefetched += 1
        elif priority is Priority.BACKGROUND:
            self.chunks_read_ahead += 1
        elif priority is Priority.COPY:
            self.chunks_copied += 1

    def count_source(self, server: str, size_bytes: int) -> None:
        """So many bytes came from that server."""
        if size_bytes:
            if server not in self.bytes_by_source and len(self.bytes_by_source) >= SOURCE_COUNT_MAX:
                server = OTHER
            self.bytes_by_source[server] = self.bytes_by_source.get(server, 0) + size_bytes

    @property
    def bytes_from_source(self) -> int:
        return self.fetched_stored_bytes
