"""Sixteen real nodes at once, as often as the session repeats: rows 2 and 4 look at the same runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.peerrows.realcluster import MIB, Together, start_together

if TYPE_CHECKING:
    from benchmarks.session import Session

NODES, SIZE = 16, 100 * MIB
_found: list[Together] = []


def sixteen(session: Session) -> list[Together]:
    """Measured by who asks first."""
    while len(_found) < session.runs:
        _found.append(start_together(session, NODES, SIZE))
    return _found
