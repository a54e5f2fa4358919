"""
Which chunks a sequential reader will want next. Pure; one object a device. Who calls: fetch.engine.

A reader is sequential when it touches chunks in a row; what is read ahead is never more than it has read in a row so
far (of what peers bring: twice that), so that a wrong guess costs at most as much again. A start from a prefetch list
does not read ahead at all (the engine asks only while no prefetch runs): the list knows better.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from lazyfs.fetch.constants import READAHEAD_STREAM_COUNT_MAX

_AT_ONCE = 2    # readers that are believed soon: of random reads one in twelve continues one of sixteen by chance


@dataclass(slots=True)
class _Stream:
    touch_count: int = 0
    ahead_end: int = 0    # the chunk after the last one read ahead


class Readahead:
    """`advance` is called once for each chunk, when it is touched for the first time."""

    def __init__(self, window_count_max: int, sequence_count_min: int) -> None:
        """
        Both count chunks.

        Args:
            window_count_max: read ahead at most.
            sequence_count_min: touched in a row before anything is read ahead.

        """
        self._window_count_max = window_count_max
        self._sequence_count_min = sequence_count_min
        self._streams: dict[int, _Stream] = {}    # by the chunk expected next; oldest first

    def advance(self, index: int, *, missing: bool, times: int = 1) -> range:
        """
        The chunks to fetch ahead now that chunk `index` is touched (often none; may reach beyond the device).

        Args:
            index: of the chunk.
            missing: it was not in the cache. A reader that finds everything there needs no help.
            times: above 1: what is far away, for it passes other nodes. The window is so many times the usual one at
                most and begins so much sooner, and is twice what was read in a row: where nothing else was touched
                in between, but for one other reader in a row.

        """
        if index not in islice(reversed(self._streams), _AT_ONCE):
            times = 1
        stream = self._streams.pop(index, None)
        if stream is None:
            stream = _Stream()
            if len(self._streams) >= READAHEAD_STREAM_COUNT_MAX:
                del self._streams[next(iter(self._streams))]
        stream.touch_count += 1
        helped = missing or index < stream.ahead_end
        self._streams[index + 1] = stream
        if not helped or stream.touch_count < max(2, self._sequence_count_min // times):
            return range(0)
        window = min(stream.touch_count * min(times, 2), self._window_count_max * times)
        begin = max(index + 1, stream.ahead_end)
        if begin - (index + 1) > window // 2:
            return range(0)    # more than half of it is still to be read
        stream.ahead_end = index + 1 + window
        return range(begin, stream.ahead_end)
