"""
Who makes way for whom: prefetch and read-ahead for reads, bulk readers for first reads, copies for everybody.

Layer: fetch. Who calls: fetch.scheduler and fetch.peering tell what begins and ends, on the loop. State: the traffic
under way, by kind; the brakes of what looks at it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from lazyfs.fetch.brake import Brake, Traffic
from lazyfs.fetch.copying import Copies
from lazyfs.fetch.transfer import Priority

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs.fetch.transfer import Transfer


class Courtesy:
    """
    Of one fetcher.

    :prefetch_brake: of all prefetch windows together.
    :ahead_brake: of read-ahead.
    :bulk_brake: of reads of images that have had much: for others' reads.
    :copies: the background copies, and what they make way for.
    """

    def __init__(self, prefetch_rate: int, read_count: Callable[[], int]) -> None:
        """`prefetch_rate`: bytes/s, 0: no bound; `read_count`: of all reads so far."""
        self._reads = Traffic()
        self._first_reads = Traffic()    # of images that have not had much yet
        self.prefetch_brake = Brake(self._reads, prefetch_rate)
        self.ahead_brake = Brake(self._reads)
        self.bulk_brake = Brake(self._first_reads)
        self.copies = Copies(read_count)
        self._ahead: set[Transfer] = set()    # under way, of priority BACKGROUND

    def begin(self, priority: Priority) -> None:
        """Something of that priority is asked for."""
        self.copies.begin(priority)
        if priority is Priority.FOREGROUND:
            self._reads.begin()

    def end(self, priority: Priority) -> None:
        """And it is over."""
        self.copies.end(priority, trio.current_time())
        if priority is Priority.FOREGROUND:
            self._reads.end()

    def may_read_ahead(self, stream_count: int, *, in_turn: bool) -> bool:
        """
        Whether another transfer may begin that no read waits for.

        `in_turn`: for a swarm. Its nodes share the registry's link, and what has come in part from each of several
        bodies nobody can pass on; so a node asks for the next one when the one before has nearly come.
        """
        return len(self._ahead) < stream_count and not (
            in_turn and any(not one.is_nearly_done() for one in self._ahead))

    def begin_transfer(self, transfer: Transfer) -> None:
        """The same of a transfer."""
        self.begin(transfer.priority)
        if transfer.priority is Priority.BACKGROUND:
            self._ahead.add(transfer)
        if transfer.priority is Priority.FOREGROUND and transfer.brake is None:
            self._first_reads.begin()

    def end_transfer(self, transfer: Transfer) -> None:
        """And it is over."""
        self.end(transfer.priority)
        self._ahead.discard(transfer)
        if transfer.priority is Priority.FOREGROUND and transfer.brake is None:
            self._first_reads.end()
