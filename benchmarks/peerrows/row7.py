"""
Row 7: the peer path, one core each side: from a cache through loopback into another cache, each chunk checked.

Random bytes (nothing is compressed) in chunks of 1 MiB; `benchmarks.peerload` says what each side does. MB/s by the
clock is the figure; what a core would do if it had nothing else to do is told for each side by its CPU time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks.figures import Figure, plain
from benchmarks.kit.proc import ToolError, run
from benchmarks.peerload import Spec

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "peer path, one core each side, loopback, chunks in cache: uncompressed payload"
_SIZE = 512 << 20
_TARGET_MB_S = 400.0
_CORES = (0, 1)                  # who serves, who gets
_TIMEOUT_S = 300.0


def measure(session: Session) -> list[Figure]:
    """Figure 7, and the same into a file whose pages are not in memory yet."""
    figures = []
    for key, target in (("7", _TARGET_MB_S), ("7-fresh", None)):
        found: dict[str, list[float]] = {"wall": [], "getter_cpu": [], "server_cpu": []}
        for number in range(session.runs):
            for name, value in _once(session, fresh=target is None).items():
                found[name].append(value)
            session.say(f"{key} {number + 1}: "
                        + ", ".join(f"{name} {values[-1]:.0f} MB/s" for name, values in found.items()))
        figure = plain(key, TITLE, target, "MB/s", found.pop("wall"), **found)
        figures.append(replace(figure, better="higher"))
    return figures


def _once(session: Session, *, fresh: bool) -> dict[str, float]:
    """MB/s of one run: by the clock, and by the CPU time of each side."""
    serving = Spec(str(session.place.folder("peer-serving")), _CORES[0], _SIZE)
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.peerload", "serve", serving.text()],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = process.stdout.readline()
        if not port:
            raise ToolError("peerload serve ended before it listened")
        getting = Spec(str(session.place.folder("peer-getting")), _CORES[1], _SIZE, int(port), fresh=fresh)
        got = json.loads(run([sys.executable, "-m", "benchmarks.peerload", "get", getting.text()],
                             timeout_s=_TIMEOUT_S).stdout)
        gave = json.loads(process.communicate(timeout=_TIMEOUT_S)[0])
    finally:
        process.kill()
        process.communicate()
        session.place.folder("peer-serving")     # empty again: the disk is the next row's
        session.place.folder("peer-getting")
    megabytes = _SIZE / 1e6
    return {"wall": megabytes / got["wall_s"], "getter_cpu": megabytes / got["cpu_s"],
            "server_cpu": megabytes / gave["cpu_s"]}
