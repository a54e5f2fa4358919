"""
What commands print: sizes, JSON, progress. Cheap to import; rich only when there is a terminal to draw on.

Rule: results go to stdout, everything else to stderr; bars on a terminal only, plain lines otherwise.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_UNIT_STEP = 1000   # as registries and `docker images` count


def format_bytes(size_bytes: int) -> str:
    """For people: three digits or so, decimal units (439 MB)."""
    value = float(size_bytes)
    for unit in _UNITS:
        if abs(value) < _UNIT_STEP or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 100 else f"{value:.1f} {unit}"
        value /= _UNIT_STEP
    raise AssertionError(size_bytes)


def printable(text: str) -> str:
    """For a terminal: names of files, processes, registries may hold what it obeys, and line ends."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def note(text: str) -> None:
    """One line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


class Progress(Protocol):
    """Progress of several tasks, each a number of bytes. Calls may come from any thread."""

    def start(self, task: str, label: str, total_bytes: int) -> None: ...

    def advance(self, task: str, size_bytes: int) -> None: ...

    def finish(self, task: str, line: str) -> None:
        """`line`: what to say where there are no bars."""
        ...

    def note(self, line: str) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class QuietProgress:
    """Says nothing (--quiet)."""

    def start(self, task: str, label: str, total_bytes: int) -> None: ...

    def advance(self, task: str, size_bytes: int) -> None: ...

    def finish(self, task: str, line: str) -> None: ...

    def note(self, line: str) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class LineProgress(QuietProgress):
    """One line a finished task, for logs and pipes."""

    def finish(self, task: str, line: str) -> None:  # noqa: ARG002
        note(line)

    def note(self, line: str) -> None:
        note(line)


def make_progress(*, quiet: bool) -> Progress:
    """Bars on a terminal, lines elsewhere, nothing when quiet."""
    if quiet:
        return QuietProgress()
    if not sys.stderr.isatty():
        return LineProgress()
    from lazyfs.cli.bars import BarProgress  # noqa: PLC0415  (rich takes 50 ms to import)

    return BarProgress()
