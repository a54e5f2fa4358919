"""
Choose defaults by measurement: `python -m benchmarks.sweep convert|start [--runs N]`.

`convert`: time and size of the large image by codec, level and chunk size. `start`: cold start of both programs by
codec and chunk size. Kept in `results/<date>-sweep-<what>.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

from benchmarks.figures import FOLDER
from benchmarks.kit.host import commit, describe
from benchmarks.kit.workspace import measured
from benchmarks.rows.row7 import convert_fresh
from benchmarks.rows.starts import start_lazy
from benchmarks.session import NUMPY, TENSORFLOW, Session, layers_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.kit.workspace import Workspace

LEVELS = {"lz4": (1, 3, 6, 9), "zstd": (1, 3, 6, 9)}
CHUNK_SIZES = ("64k", "128k", "256k", "512k", "1m")


def sweep_convert(session: Session, levels: dict[str, tuple[int, ...]], sizes: tuple[str, ...]) -> Iterator[Any]:
    """Seconds and megabytes of each combination."""
    layout = session.layout(TENSORFLOW)
    for codec, size in itertools.product(levels, sizes):
        for level in levels[codec]:
            words = ["--level", str(level), "--chunk-size", size]
            times = [convert_fresh(session, layout, codec, *words) for _ in range(session.runs)]
            megabytes = layers_bytes(session.place.top / "converted", "lazy") / 1e6
            yield {"codec": codec, "level": level, "chunk": size, "s": times, "mb": round(megabytes, 1)}


def sweep_start(session: Session, levels: dict[str, tuple[int, ...]], sizes: tuple[str, ...]) -> Iterator[Any]:
    """Seconds and megabytes over the link of each combination, default levels."""
    for subject, codec, size in itertools.product((NUMPY, TENSORFLOW), levels, sizes):
        tag = f"sweep-{codec}-{size}"
        starts = [
            start_lazy(session, subject, tag, "--codec", codec, "--chunk-size", size) for _ in range(session.runs)
        ]
        yield {
            "program": subject.program,
            "codec": codec,
            "chunk": size,
            "s": [round(start.total_s, 3) for start in starts],
            "mb": round(statistics.median(start.link_bytes for start in starts) / 1e6, 1),
            "touched_mb": round(statistics.median(start.touched_bytes for start in starts) / 1e6, 1),
        }


SWEEPS = {"convert": sweep_convert, "start": sweep_start}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("what", choices=SWEEPS)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--chunks", nargs="*", default=CHUNK_SIZES)
    parser.add_argument("--codecs", nargs="*", default=list(LEVELS), choices=list(LEVELS))
    options = parser.parse_args()
    levels: dict[str, tuple[int, ...]] = {codec: LEVELS[codec] for codec in options.codecs}
    path = FOLDER / f"{time.strftime('%Y-%m-%d')}-sweep-{options.what}.json"
    kept: dict[str, Any] = {"machine": describe(), "commit": commit(), "rows": []}

    def measure_all(place: Workspace) -> None:
        for row in SWEEPS[options.what](Session(place, options.runs), levels, tuple(options.chunks)):
            print(json.dumps(row), flush=True)
            kept["rows"].append(row)
            path.write_text(json.dumps(kept, indent=1) + "\n")

    return measured("sweep", measure_all)


if __name__ == "__main__":
    sys.exit(main())
