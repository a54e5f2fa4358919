"""Progress bars on a terminal (rich). Imported by lazyfs.cli.output only when stderr is a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

if TYPE_CHECKING:
    from types import TracebackType


class BarProgress:
    """One bar a task; a finished task leaves its line above the bars."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(), console=Console(stderr=True), transient=True,
        )
        self._ids: dict[str, TaskID] = {}

    def start(self, task: str, label: str, total_bytes: int) -> None:
        self._ids[task] = self._bars.add_task(label, total=total_bytes)

    def advance(self, task: str, size_bytes: int) -> None:
        self._bars.advance(self._ids[task], size_bytes)

    def finish(self, task: str, line: str) -> None:
        if task in self._ids:
            self._bars.remove_task(self._ids.pop(task))
        self.note(line)

    def note(self, line: str) -> None:
        self._bars.console.print(line, markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
