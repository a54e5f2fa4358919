"""
Row 1: wrong bytes served while everything that can go wrong does, at random.

The soak of the tests (tests/soakkit.py: a node, its registry, readers of every kind, faults every few seconds) as a
process of its own, once a run, each with another seed. A hang, or a reader that died, counts as a failure to measure.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.figures import plain
from benchmarks.kit.proc import ToolError

if TYPE_CHECKING:
    from benchmarks.figures import Figure
    from benchmarks.session import Session

TITLE = "wrong bytes served, over all faults"
SOAK_S = 120
_END_S = 600.0                   # making the node, and waiting until all is well again
_ROOT = Path(__file__).resolve().parents[2]


def measure(session: Session) -> list[Figure]:
    """Figure 1. The samples say how much was compared, and how long the longest read took."""
    reports = []
    for seed in range(1, session.runs + 1):
        words = [sys.executable, "-m", "tests.soakkit", str(SOAK_S), str(seed)]
        done = subprocess.run(words, cwd=_ROOT, capture_output=True, text=True, check=False, timeout=SOAK_S + _END_S)
        if done.returncode:
            raise ToolError(f"{' '.join(words)}: exit code {done.returncode}: {done.stderr[-2000:]}")
        report = json.loads(done.stdout)
        if report["hung"] or report["dead"]:
            raise ToolError(f"seed {seed}: {report['hung']} {report['dead']}")
        session.say(f"seed {seed}: {report['compared_bytes'] / 1e9:.2f} GB compared, wrong: {len(report['wrong'])}, "
                    f"longest read {report['longest_s']:.1f} s, errors {report['errors']}")
        reports.append(report)
    return [plain("1", TITLE, 0.0, "reads", [float(len(report["wrong"])) for report in reports],
                  compared_gb=[report["compared_bytes"] / 1e9 for report in reports],
                  longest_read_s=[report["longest_s"] for report in reports],
                  errors=[float(sum(report["errors"].values())) for report in reports])]
