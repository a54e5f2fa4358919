"""
`scripts/compare`: lazyfs beside what a user would pick instead; a table, a picture and a file of all that was measured.

`python -m benchmarks.compare [--images NAME,...] [--peers NAME,...] [--runs N] [--rate MBIT] [--rtt MS] [--no-save]`.
All systems take turns, so that a change of the machine hits all of them. A system that this machine lacks is skipped
and named; one that fails is told, and does not stop the others (exit code 1). Kept program by program.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING

from benchmarks.compare.cases import CASES, Case
from benchmarks.compare.nydus import Nydus
from benchmarks.compare.ours import Lazy
from benchmarks.compare.report import Measured, save, show
from benchmarks.compare.stargz import Stargz
from benchmarks.compare.whole import Overlayfs, file_system_images
from benchmarks.kit.host import commit, describe
from benchmarks.kit.proc import ToolError
from benchmarks.kit.workspace import Interrupted, exit_by_signal, workspace
from benchmarks.session import Session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.compare.peer import Outcome, Peer

RUNS_MIN = 3


def all_peers() -> dict[str, Peer]:
    """By name, in the order of the table."""
    peers: list[Peer] = [
        Overlayfs("gzip"), Overlayfs("zstd"), *file_system_images(), Nydus(listed=False), Nydus(listed=True),
        Stargz(listed=False), Stargz(listed=True), Lazy(listed=False), Lazy(listed=True),
    ]  # fmt: skip
    return {peer.name: peer for peer in peers}


def main() -> int:
    peers = all_peers()
    parser = argparse.ArgumentParser(prog="scripts/compare", description="Compare cold starts side by side.")
    parser.add_argument("--images", default=",".join(CASES), help="programs, by comma; default: %(default)s")
    parser.add_argument("--peers", default=",".join(peers), help="systems, by comma; default: %(default)s")
    parser.add_argument("--runs", type=int, default=RUNS_MIN, help="of each start; the median counts")
    parser.add_argument("--rate", type=int, default=1000, metavar="MBIT", help="of the link; default: %(default)s")
    parser.add_argument("--rtt", type=int, default=0, metavar="MS", help="added; default: none")
    parser.add_argument("--no-save", action="store_true", help="only print")
    options = parser.parse_args()
    images, names = options.images.split(","), options.peers.split(",")
    unknown = [name for name in images if name not in CASES] + [name for name in names if name not in peers]
    if unknown or min(options.runs, options.rate) < 1 or options.rtt < 0:
        parser.error(f"not known: {', '.join(unknown)}" if unknown else "runs and rate are at least 1")
    if options.runs < RUNS_MIN and not options.no_save:
        parser.error(f"figures are kept from {RUNS_MIN} runs on: use --no-save")
    if os.geteuid() != 0:
        print("compare: needs root (network namespace, mounts, containers)", file=sys.stderr)
        return 1
    try:
        with workspace() as place:
            session = Session(place, options.runs)
            session.link.set_rate(options.rate * 1_000_000)
            session.rtt_ms = options.rtt
            chosen = [peers[name] for name in names]
            conditions = f"{options.rate} Mbit/s, {options.rtt} ms"
            return compare(session, [CASES[name] for name in images], chosen, conditions, keep=not options.no_save)
    except Interrupted as error:
        print("compare: interrupted; everything it had made is gone again", file=sys.stderr)
        exit_by_signal(error)
        return 1


def compare(session: Session, cases: Sequence[Case], peers: Sequence[Peer], conditions: str, *, keep: bool) -> int:
    """Measure, print, keep; returns the exit code."""
    facts = {**describe(), "commit": commit()}
    print("\n".join(f"{key:16} {value}" for key, value in facts.items()))
    skipped = {peer.name: why for peer in peers if (why := peer.missing()) is not None}
    for name, why in skipped.items():
        print(f"skipped: {name}: {why}")
    there = [peer for peer in peers if peer.name not in skipped]
    found: list[Measured] = []
    failed: list[str] = []
    for case in cases:
        begin = time.perf_counter()
        print(f"\n{case.name}: {' '.join(case.subject.command)}", flush=True)
        mine = _measure(session, case, there, failed)
        print(f"    ({time.perf_counter() - begin:.0f} s)", flush=True)
        found += mine
        if keep:
            for path in save(mine, conditions, facts, skipped):
                session.say(f"kept in {path}")
    print()
    show(found, conditions)
    print(f"failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def _measure(session: Session, case: Case, peers: Sequence[Peer], failed: list[str]) -> list[Measured]:
    """Every system's starts, in turns."""
    outcomes: dict[str, list[Outcome]] = {}
    for peer in peers:
        try:
            peer.prepare(session, case)
        except (ToolError, OSError) as error:
            print(f"  FAILED: {peer.name}: {error}")
            failed.append(f"{case.name}/{peer.name}")
            continue
        outcomes[peer.name] = []
    for number in range(session.runs):
        for peer in peers:
            if peer.name not in outcomes:
                continue
            try:
                outcomes[peer.name].append(peer.start(session, case))
            except (ToolError, OSError) as error:
                print(f"  FAILED: {peer.name}: {error}")
                failed.append(f"{case.name}/{peer.name}")
                del outcomes[peer.name]
        shown = ", ".join(f"{name} {found[-1].total_s:.2f}" for name, found in outcomes.items())
        session.say(f"{number + 1}: {shown}")
    return [
        Measured(case.name, peer.name, peer.about, tuple(outcomes[peer.name])) for peer in peers
        if peer.name in outcomes
    ]


if __name__ == "__main__":
    sys.exit(main())
