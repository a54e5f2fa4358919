"""What a comparison found: a table for the terminal, and the file that keeps it."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.compare.picture import draw
from benchmarks.figures import FOLDER

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.compare.peer import Outcome


@dataclass(frozen=True, slots=True)
class Measured:
    """All starts of one program by one system, in the order of the runs."""

    case: str
    peer: str
    about: str
    outcomes: tuple[Outcome, ...]

    @property
    def seconds(self) -> list[float]:
        return [outcome.total_s for outcome in self.outcomes]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def link_mb(self) -> float:
        return statistics.median(outcome.link_bytes for outcome in self.outcomes) / 1e6


def show(found: Sequence[Measured], conditions: str) -> None:
    """Print a table."""
    table = Table(title=f"from nothing on the node to the first useful output; {conditions}")
    for name in ("program", "system"):
        table.add_column(name)
    for name in ("s", "least to most", "image usable after s", "MB over the link"):
        table.add_column(name, justify="right")
    last = ""
    for one in found:
        image_s = statistics.median(outcome.image_s for outcome in one.outcomes)
        spread = f"{min(one.seconds):.2f} to {max(one.seconds):.2f}"
        name = one.case if one.case != last else ""
        table.add_row(name, one.about, f"{one.median_s:.2f}", spread, f"{image_s:.2f}", f"{one.link_mb:.1f}")
        last = one.case
    Console(width=120).print(table)


def save(found: Sequence[Measured], conditions: str, facts: dict[str, str], skipped: dict[str, str]) -> list[Path]:
    """
    Merge into `results/<date>-compare.json`, by conditions, program and system; and draw all of these conditions.

    Returns: the files written.
    """
    FOLDER.mkdir(exist_ok=True)
    date = time.strftime("%Y-%m-%d")
    path = FOLDER / f"{date}-compare.json"
    kept: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    kept["date"] = date
    here = kept.setdefault("conditions", {}).setdefault(conditions, {})
    here["skipped"] = skipped
    cases = here.setdefault("programs", {})
    for one in found:
        cases.setdefault(one.case, {})[one.peer] = {
            "about": one.about,
            "median_s": round(one.median_s, 3),
            "s": [round(outcome.total_s, 3) for outcome in one.outcomes],
            "image_s": [round(outcome.image_s, 3) for outcome in one.outcomes],
            "link_mb": [round(outcome.link_bytes / 1e6, 2) for outcome in one.outcomes],
            "measured": {**facts, "time": time.strftime("%H:%M:%S")},
        }
    picture = FOLDER / f"{date}-compare-{conditions.replace(' ', '').replace('/', '').replace(',', '-')}.svg"
    caption = f"{conditions}; {facts['cpu']}, Linux {facts['kernel']}; median, least and most"
    for target, text in ((path, json.dumps(kept, indent=1) + "\n"), (picture, draw(cases, caption))):
        temporary = target.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(target)
    return [path, picture]
