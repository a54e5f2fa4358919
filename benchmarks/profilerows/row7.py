"""
Row 7: what it costs that the worker notes what is read: cold starts with and without.

There is no switch for it: "without" is a worker in which the noting function does nothing, put there by a
`sitecustomize` module of the benchmark's own. The starts "with" load one as well that changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, ratio
from benchmarks.profilerows.starts import start_hot
from benchmarks.session import NUMPY

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "cold start with recording against without"
_STARTS_PER_RUN = 4
_PATCH = "from lazyfs.node.recorder import Recorder\n"
_SILENT = "Recorder.note = lambda *_: None\n"


def measure(session: Session) -> list[Figure]:
    environments = {}
    for name, text in (("with", _PATCH), ("without", _PATCH + _SILENT)):
        folder = session.place.folder(f"recording-{name}")
        (folder / "sitecustomize.py").write_text(text)
        environments[name] = {"PYTHONPATH": str(folder)}
    starts: dict[str, list[float]] = {name: [] for name in environments}
    cpu: dict[str, list[float]] = {name: [] for name in environments}
    for number in range(session.runs * _STARTS_PER_RUN):
        for name in sorted(environments, reverse=number % 2 == 0):     # neither is always the first
            start = start_hot(session, NUMPY, env=environments[name])
            starts[name].append(start.total_s)
            cpu[name].append(start.daemon_cpu_s)
    return [
        ratio("7", NUMPY.program, 1.02, starts["with"], starts["without"]),
        ratio("7-cpu", "the same, CPU of the daemon", None, cpu["with"], cpu["without"]),
    ]
