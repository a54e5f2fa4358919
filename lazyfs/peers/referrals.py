"""
Who gets a piece from whom, when reads want it: a tree in the order in which they asked, kept by a piece's directory.

The trees of topology are the same whoever reads first: whoever is far from the root and reads first has every member on
its way fetch the piece, one after the other, and of nodes that read the same things, but not in step, another one is
first each time. So a read asks the directory (its root; the third above it in a deep tree) for the piece, and is told
who: the Nth that asked goes to the one that asked as number (N-1)/2, which has the piece by then or is getting it. The
first goes to the origin. Who is sent to another waits for a flight that was told of earlier than its own, or for the
directory, which is before it in the group's order: so nobody waits in a ring.

Layer: peers. Who calls: swarm. Pure; no clock. State: the askers of each piece, those asked for lately.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PIECES_MAX = 16_384              # of which it is known who asked; a list of a few ids each
ASKERS_MAX = 64                  # of a piece, 14 as a rule: those after them go to one of these, in turns
EACH = 2                         # that are sent to one: as the children of topology


class Referrals:
    """Of one node."""

    def __init__(self) -> None:
        self._askers: OrderedDict[tuple[str, int], list[str]] = OrderedDict()
        self._turn = 0

    def source(self, key: str, index: int, asker: str, *, here: Callable[[], str],
               usable: Callable[[str], bool]) -> str:
        """
        Whom a member is to ask for a piece.

        Args:
            key: Resource.key.
            index: of the piece.
            asker: its id.
            here: the id of the directory itself, if it has the piece or gets it for who asks; else "".
            usable: whether others can be sent to that member.

        Returns:
            A member's id. The asker's own: nobody has it, so the origin is to be asked. "": it was told before, so
            something has failed.

        """
        askers = self._askers.get((key, index))
        if askers is None:
            askers = self._askers[key, index] = []
            while len(self._askers) > PIECES_MAX:
                self._askers.popitem(last=False)
        self._askers.move_to_end((key, index))
        if asker in askers:
            return ""
        if not any(map(usable, askers)):
            askers[:] = [first] if (first := here()) and first != asker else []
        count = len(askers)
        place = max(0, count - 1) // EACH
        if count < ASKERS_MAX:
            askers.append(asker)
        else:
            self._turn = place = (self._turn + 1) % count
        nearest = (*range(place, -1, -1), *range(place + 1, count))    # all of them were told before
        return next((askers[at] for at in nearest if usable(askers[at])), asker)

    def forget(self, key: str) -> None:
        """The resource is no longer shared."""
        for known in [known for known in self._askers if known[0] == key]:
            del self._askers[known]
