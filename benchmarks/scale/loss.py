"""
Lost packets, as TCP meets them: what a connection can carry at best, and what a lost last packet costs.

Called by benchmarks.scale.network and node. Pure. By Mathis (1997): of random loss p a connection carries no more than
1.22 segments a round trip over the root of p, however fast the link; one loss in the middle of a stream is mended
within that. What nothing follows, a question or the end of a piece, waits for a timer. Losses come one by one, not in
bursts, and links are still filled whole piece by piece: several connections share one as if each had its own queue.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import random

SEGMENT_BYTES: Final = 1448
MATHIS: Final = 1.22
TIMER_S: Final = 0.2             # Linux' least, TCP_RTO_MIN


class Loss:
    """`share`: of packets, 0: none. `draw`: which."""

    def __init__(self, share: float, draw: random.Random) -> None:
        self._share, self._draw = share, draw

    def rate(self, rtt_s: float) -> float:
        """Bytes/s of one connection at most."""
        return MATHIS * SEGMENT_BYTES / (rtt_s * math.sqrt(self._share)) if self._share and rtt_s else math.inf

    def timer_s(self, rtt_s: float) -> float:
        """What the last packet of something waits for: nothing as a rule; a timer, doubled each time, if it is lost."""
        waited, timer = 0.0, max(TIMER_S, 2 * rtt_s)
        while self._share and self._draw.random() < self._share:
            waited += timer
            timer *= 2
        return waited
