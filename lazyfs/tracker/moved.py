"""
Members that are now here, now there: two nodes with one name, mostly machines copied with their host name.

Layer: tracker. Who calls: tracker.service, with each member that says another address than before. State: where such
members were before, bounded. One that moves once has been restarted; one that comes back is two, and neither is
found by the others half of the time. Nobody is refused for it: which of the two is right, only the operator knows.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from lazyfs.peers.announce import Announced

_WITHIN_S = 300.0                # a beat of each comes every minute at least
_SAY_AGAIN_S = 60.0
_COUNT_MAX = 1024
_log = logging.getLogger("lazyfs.tracker")


class Moved:
    """See the module."""

    def __init__(self) -> None:
        self._before: OrderedDict[tuple[str, str], tuple[str, float]] = OrderedDict()
        self._said_at = float("-inf")

    def note(self, cluster: str, old: Announced, new: Announced) -> None:
        """A member said `old` until now, and says `new`."""
        if old.address == new.address:
            return
        now = trio.current_time()
        before, left_at = self._before.pop((cluster, new.id), ("", 0.0))
        if before == new.address and now - left_at < _WITHIN_S and now - self._said_at >= _SAY_AGAIN_S:
            self._said_at = now
            _log.warning("member %s of cluster %s is at %s and at %s: two nodes with one name? peers.node must be "
                         "unique", new.id, cluster, old.address, new.address)
        self._before[cluster, new.id] = old.address, now
        if len(self._before) > _COUNT_MAX:
            self._before.popitem(last=False)
