"""
`scripts/bench`: measure the table of targets, in one run, ours and others' in turns, and keep the figures.

`python -m benchmarks [--suite image|node|profile|faults|peers] [--runs N] [--no-save] [ROW ...]`. A suite is the table
of one issue. Rows can be run alone; a row that fails is told and does not stop the others (exit code 1). A missed
target is no failure: it is a figure.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import traceback

from benchmarks.figures import Figure, save, show
from benchmarks.kit.host import commit, describe
from benchmarks.kit.proc import ToolError
from benchmarks.kit.workspace import Interrupted, exit_by_signal, workspace
from benchmarks.session import Session

SUITES = {"image": ("benchmarks.rows", 10), "node": ("benchmarks.noderows", 6),   # package, rows
          "profile": ("benchmarks.profilerows", 7), "faults": ("benchmarks.faultrows", 6),
          "peers": ("benchmarks.peerrows", 10)}
RUNS_MIN = 3


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure the rows of the table of targets.")
    parser.add_argument("rows", nargs="*", type=int, metavar="ROW", help="a row's number; all when none is named")
    parser.add_argument("--suite", choices=list(SUITES), default="image", help="which table")
    parser.add_argument("--runs", type=int, default=RUNS_MIN, help="of each measurement; the median counts")
    parser.add_argument("--no-save", action="store_true", help="only print")
    options = parser.parse_args()
    count = SUITES[options.suite][1]
    rows = options.rows or list(range(1, count + 1))
    if any(not 1 <= row <= count for row in rows) or options.runs < 1:
        parser.error(f"rows are 1 to {count}, runs at least 1")
    if options.runs < RUNS_MIN and not options.no_save:
        parser.error(f"figures are kept from {RUNS_MIN} runs on: use --no-save")
    if os.geteuid() != 0:
        print("bench: needs root (network namespace, mounts, containers)", file=sys.stderr)
        return 1
    try:
        return measure(options.suite, rows, options.runs, keep=not options.no_save)
    except Interrupted as error:
        print("bench: interrupted; everything it had made is gone again", file=sys.stderr)
        exit_by_signal(error)
        return 1


def measure(suite: str, rows: list[int], runs: int, *, keep: bool) -> int:
    """Measure and print; figures are kept row by row, so that a failure loses nothing."""
    machine, version = describe(), commit()
    print("\n".join(f"{key:16} {value}" for key, value in {**machine, "commit": version}.items()))
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"note: the load average is {load:.1f}; figures of a busy machine say little")
    failed = []
    figures: list[Figure] = []
    with workspace() as place:
        session = Session(place, runs)
        for number in rows:
            module = importlib.import_module(f"{SUITES[suite][0]}.row{number}")
            print(f"\nrow {number}: {module.TITLE}", flush=True)
            begin = time.perf_counter()
            try:
                found = module.measure(session)
            except (ToolError, OSError) as error:
                print(f"  FAILED: {error}")
                failed.append(number)
                continue
            except Exception:  # noqa: BLE001 - one row's bug must not cost the others their figures
                traceback.print_exc(file=sys.stdout)
                failed.append(number)
                continue
            print("\n".join(show(figure) for figure in found))
            print(f"    ({time.perf_counter() - begin:.0f} s)", flush=True)
            figures += found
            if keep:
                save(found, suite, machine, version)
    missed = [figure.key for figure in figures if figure.met is False]
    print(f"\nmissed: {', '.join(missed) or 'none'}; failed rows: {', '.join(map(str, failed)) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
