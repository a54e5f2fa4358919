"""How long a read waits before it asks somebody else."""

from __future__ import annotations

import pytest

from lazyfs.peers.model import Priority
from lazyfs.peers.pace import Pace


def test_a_read_waits_for_what_is_usual_but_no_longer_than_a_few_pieces_take_a_link() -> None:
    pace = Pace()
    for _ in range(16):
        pace.add(Priority.BACKGROUND, 0.8)
    assert pace.urgent_s(Priority.BACKGROUND) == pytest.approx(1.2)                 # nobody knows the links
    assert pace.urgent_s(Priority.BACKGROUND, piece_s=0.04) == pytest.approx(0.5)   # 1 MiB at 200 Mbit/s
    assert pace.urgent_s(Priority.BACKGROUND, piece_s=0.3) == pytest.approx(0.9)
    assert pace.urgent_s(Priority.BACKGROUND, piece_s=9.0) == pytest.approx(1.2)
