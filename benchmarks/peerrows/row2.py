"""Row 2: how many images the registry sends to sixteen real nodes that start at once, cold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, plain
from benchmarks.peerrows.sixteen import NODES, SIZE, sixteen

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = f"bytes of the registry ÷ image, {NODES} real nodes at once"


def measure(session: Session) -> list[Figure]:
    """Figure 2."""
    return [plain("2", "all bytes on the registry's link, headers too", 1.10, "x",
                  [one.origin_bytes / SIZE for one in sixteen(session)])]
