"""
What `lazyfs check` found, by kind: counted all, the first ones kept.

Layer: converter. Who calls: converter.verify, converter.compare (add), lazyfs.cli.check (show).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from lazyfs.errors import (
    CheckError,
    ChunkDamagedError,
    ConfigDiffersError,
    ContentDiffersError,
    MetadataDiffersError,
    TreeDiffersError,
)

KEPT_COUNT_MAX = 20
KINDS: dict[str, type[CheckError]] = {
    "chunk": ChunkDamagedError,
    "tree": TreeDiffersError,
    "metadata": MetadataDiffersError,
    "content": ContentDiffersError,
    "config": ConfigDiffersError,
}
"""In the order of their weight: the first kind that was found gives the exit code."""


@dataclass(slots=True)
class Differences:
    """Thread-safe. `lines`: (kind, text) of the first ones found; `counts`: all, by kind."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, text: str) -> None:
        with self._lock:
            self.counts[kind] += 1
            if self.counts[kind] <= KEPT_COUNT_MAX:     # of each kind, so that one does not hide another
                self.lines.append((kind, text))

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def first(self) -> list[tuple[str, str]]:
        """At most KEPT_COUNT_MAX lines, the weightiest kinds first."""
        order = list(KINDS)
        return sorted(self.lines, key=lambda line: order.index(line[0]))[:KEPT_COUNT_MAX]

    def error(self) -> CheckError | None:
        """The error that stands for all of them; None if there are none."""
        for kind, error in KINDS.items():
            if self.counts[kind]:
                found = ", ".join(f"{count} {name}" for name, count in self.counts.items() if count)
                return error(f"differences found: {found}", hint="convert the image again with --no-reuse")
        return None


def show_path(path: bytes) -> str:
    """A path of an image for a message; odd bytes escaped."""
    return "/" + path.decode("utf-8", "backslashreplace")
