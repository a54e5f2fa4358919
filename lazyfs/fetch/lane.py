"""Chunks that wait to be fetched from one source, in the order they came. Pure. Who calls: fetch.lanes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lazyfs.fetch.flight import Flight
    from lazyfs.image.digest import Digest


class FlightQueue:
    """
    Flights in the order they came; taken out in runs that are neighbours in a blob.

    Invariant: `_by_start` and `_by_end` hold only flights that are in `_flights`. Two flights may have the same
    stored bytes (equal chunks stored once); only the first of them is indexed then, the other goes by itself.
    """

    def __init__(self) -> None:
        self._flights: dict[Flight, None] = {}
        self._by_start: dict[tuple[Digest, int], Flight] = {}
        self._by_end: dict[tuple[Digest, int], Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, flight: Flight) -> bool:
        return flight in self._flights

    def push(self, flight: Flight) -> None:
        self._flights[flight] = None
        self._by_start.setdefault((flight.blob, flight.stored_start), flight)
        self._by_end.setdefault((flight.blob, flight.stored_end), flight)

    def discard(self, flight: Flight) -> bool:
        """Take it out; False if it was not there."""
        if flight not in self._flights:
            return False
        del self._flights[flight]
        start, end = (flight.blob, flight.stored_start), (flight.blob, flight.stored_end)
        if self._by_start.get(start) is flight:
            del self._by_start[start]
        if self._by_end.get(end) is flight:
            del self._by_end[end]
        return True

    def pop_run(self, bytes_max: int) -> list[Flight]:
        """
        The oldest flight with all its queued neighbours, in the order of the blob; [] when empty.

        Args:
            bytes_max: of stored bytes in the run (a single flight may be larger).

        """
        if not self._flights:
            return []
        oldest = next(iter(self._flights))
        self.discard(oldest)
        run = [oldest]
        total = oldest.stored_size
        for index, key in ((self._by_start, "stored_end"), (self._by_end, "stored_start")):
            forward = index is self._by_start
            edge = oldest
            while (found := index.get((oldest.blob, getattr(edge, key)))) is not None:
                total += found.stored_size
                if total > bytes_max:
                    return run
                self.discard(found)
                run.insert(len(run) if forward else 0, found)
                edge = found
        return run

    def clear(self) -> list[Flight]:
        flights = list(self._flights)
        for flight in flights:
            self.discard(flight)
        return flights
