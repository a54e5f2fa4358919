"""
Figures: what a row of the table measures, and the files that keep them.

`results/<date>-<suite>.json` holds everything of a day (samples, machine, versions, figures without a target too);
`results/figures.json` the newest value of each target, as `<suite>.<row>[letter]`.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, slots=True)
class Figure:
    """
    One measured value.

    Attributes:
        key: row and letter (`1a`), or with a suffix where the table has no target for it (`1a-hot`).
        value: median over the runs (of a ratio: median against median).
        target: at most this (at least, where `better` is "higher"); None: reported only.
        spread: smallest and largest single value.
        samples: what was measured, by name, in the order of the runs.

    """

    key: str
    title: str
    value: float
    target: float | None
    unit: str
    runs: int
    spread: tuple[float, float]
    samples: dict[str, list[float]] = field(default_factory=dict)
    better: str = "lower"

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.better == "higher" else self.value <= self.target


def ratio(
    key: str, title: str, target: float | None, ours: list[float], theirs: list[float], **samples: list[float]
) -> Figure:
    """Ours against theirs, measured in turns; the spread is over the pairs."""
    assert len(ours) == len(theirs) > 0
    pairs = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    value = statistics.median(ours) / statistics.median(theirs)
    kept = {"ours": ours, "theirs": theirs, **samples}
    return Figure(key, title, value, target, "x", len(ours), (min(pairs), max(pairs)), kept)


def plain(key: str, title: str, target: float | None, unit: str, values: list[float], **samples: list[float]) -> Figure:
    """A value that is compared with nothing."""
    kept = {"ours": values, **samples}
    value = statistics.median(values)
    return Figure(key, title, value, target, unit, len(values), (min(values), max(values)), kept)


def show(figure: Figure) -> str:
    """One line for people."""
    low, high = figure.spread
    sign = ">=" if figure.better == "higher" else "<="
    wanted = "" if figure.target is None else f"   target {sign} {figure.target:g}: {'met' if figure.met else 'MISSED'}"
    return f"  {figure.key:12} {figure.title}: {figure.value:.3g} {figure.unit} ({low:.3g} to {high:.3g}){wanted}"


def save(figures: list[Figure], suite: str, machine: dict[str, str], commit: str) -> Path:
    """Merge into the day's file and into figures.json; returns the day's file."""
    FOLDER.mkdir(exist_ok=True)
    date = time.strftime("%Y-%m-%d")
    path = FOLDER / f"{date}-{suite}.json"
    day = _read(path)
    day.setdefault("figures", {})
    day["date"] = date
    day["machine"] = machine
    newest = _read(FOLDER / "figures.json")
    for figure in figures:
        day["figures"][figure.key] = {**asdict(figure), "commit": commit, "time": time.strftime("%H:%M:%S")}
        if figure.target is not None:
            newest[f"{suite}.{figure.key}"] = {
                "value": round(figure.value, 4),
                "target": figure.target,
                "better": figure.better,
                "unit": figure.unit,
                "runs": figure.runs,
                "spread": [round(end, 4) for end in figure.spread],
                "commit": commit,
                "date": date,
            }
    _write(path, day)
    _write(FOLDER / "figures.json", dict(sorted(newest.items())))
    return path


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    return data


def _write(path: Path, data: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    temporary.replace(path)
