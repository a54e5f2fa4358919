"""Row 3: how many images the registry sends to a simulated cluster that starts at once; also while nodes die."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks.figures import Figure, plain
from benchmarks.peerrows.simulated import HALF_A_THOUSAND, TEN_THOUSAND, results, seeds

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "bytes of the registry ÷ image, simulated: 500 and 10,000 nodes, 5 % dying"
_DYING = 0.05


def measure(session: Session) -> list[Figure]:
    """Figures 3a (500), 3b (10,000, one draw: minutes), 3c (500, of which 5 % die)."""
    cases = [
        ("3a", "500 nodes", 1.05, seeds(HALF_A_THOUSAND, session.runs)),
        ("3b", "10,000 nodes", 1.10, [TEN_THOUSAND]),
        ("3c", "500 nodes, 5 % die", 1.3, seeds(replace(HALF_A_THOUSAND, dying=_DYING), session.runs)),
    ]
    found = results([setting for *_, settings in cases for setting in settings])
    figures = []
    for key, title, target, settings in cases:
        mine, found = found[:len(settings)], found[len(settings):]
        figures.append(plain(key, title, target, "x", [one.origin_images for one in mine],
                             unfinished=[float(one.unfinished) for one in mine],
                             slowest_ratio=[one.slowest_ratio for one in mine]))
    return figures
