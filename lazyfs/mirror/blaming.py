"""
Who gave wrong pieces of blobs, and what this node makes of it.

Layer: mirror. Who calls: mirror.peering. Pieces of blobs have no digests of their own, so a wrong one is found when the
whole digest was wrong, and who gave it may be innocent: it passed on what it had got, as this node did until now. So:

- who says that it has all of the blob has checked all of it: its piece is a lie, or its disk has rotted. It is left
  alone, and reported, at once (peers.health: as with a chunk that is wrong).
- anybody else is so at the second blob that began after the first was found wrong: an innocent one has found its own
  liar by then, and passes on nothing of it any more. Blobs that were wrong together, as layers of one image are, count
  once. One alone is counted and shown, no more: else a single liar would have all members leave their parents alone.

State: of each member that gave something wrong once, when; at most SUSPECT_COUNT_MAX. On the loop.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from lazyfs.mirror.download import Download
    from lazyfs.peers.swarm import Swarm

SUSPECT_COUNT_MAX: Final = 4096
FORGET_S: Final = 3600.0         # a second one after so long is a first one


class Blaming:
    """See the module. `swarm`: whose health and views are used."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._found_at: OrderedDict[str, float] = OrderedDict()

    def blame(self, member: str, download: Download) -> None:
        """pieces.Blobs.blame."""
        now, key = trio.current_time(), download.resource.key
        why = f"{key}: a piece that is not the origin's"
        view = self._swarm.view(key)
        before = self._found_at.get(member)
        is_second = before is not None and before < download.began and now - before < FORGET_S
        if is_second or (view is not None and member in view.complete):
            self._found_at.pop(member, None)
            self._swarm.health.lied(member, why, now)
            return
        health = self._swarm.health.of(member)
        health.wrong_pieces += 1
        health.last_error = f"{why}, perhaps passed on"
        if before is None or now - before >= FORGET_S:
            self._found_at[member] = now
            self._found_at.move_to_end(member)
            if len(self._found_at) > SUSPECT_COUNT_MAX:
                self._found_at.popitem(last=False)
