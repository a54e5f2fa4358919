"""
Row 3: a small first read while another container reads 1 GB cold over 1 Gbit/s, against the same read on an idle node.

Both images hold bytes that cannot be compressed, so that the link is what is shared. Each small read is of 4 KiB in a
chunk that nobody has read before: a chunk's whole way, with one reader, and with eight, of the other image beside it.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import time
from typing import TYPE_CHECKING

from benchmarks.faultrows.images import random_image
from benchmarks.figures import Figure
from benchmarks.kit.daemon import NodeDaemon
from benchmarks.kit.host import drop_page_cache
from benchmarks.kit.lazy import trust
from benchmarks.kit.proc import ToolError

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.session import Session

TITLE = "p99 of a small first read while another container reads 1 GB cold, 1 Gbit/s, against an idle node"
_BULK_BYTES, _SMALL_BYTES = 1_000_000_000, 400 << 20
_CHUNK_BYTES, _READ_BYTES = 1 << 20, 4096
_IDLE_COUNT = 120        # reads on the idle node, of the 400 chunks
_PAUSE_S = 0.02          # between two reads: somebody who starts something, not a second bulk reader
_BULK_TIMEOUT_S = 300.0
_TARGET = 5.0


def measure(session: Session) -> list[Figure]:
    """Figures 3 (one bulk reader) and 3-eight (eight at once, reported only)."""
    bulk = random_image(session, "bulk", _BULK_BYTES, session.far)
    small = random_image(session, "small", _SMALL_BYTES, session.far)
    figures = []
    for key, reader_count, target in (("3", 1, _TARGET), ("3-eight", 8, None)):
        idle, busy, rates = [], [], []
        for number in range(session.runs):
            before, beside, bulk_s = _once(session, bulk, small, reader_count)
            idle.append(_p99(before))
            busy.append(_p99(beside))
            rates.append(_BULK_BYTES / bulk_s / 1e6)
            session.say(f"{key} {number + 1}: idle p50 {statistics.median(before):.1f} p99 {idle[-1]:.1f} ms, "
                        f"beside p50 {statistics.median(beside):.1f} p99 {busy[-1]:.1f} ms, bulk {rates[-1]:.0f} MB/s")
        ratios = [one / other for one, other in zip(busy, idle, strict=True)]
        figures.append(Figure(key, f"beside {reader_count} reading", statistics.median(busy) / statistics.median(idle),
                              target, "x", len(busy), (min(ratios), max(ratios)),
                              {"busy_p99_ms": busy, "idle_p99_ms": idle, "bulk_mb_s": rates}))
    return figures


def _once(session: Session, bulk: str, small: str, reader_count: int) -> tuple[list[float], list[float], float]:
    """Milliseconds of reads on the idle node, of those beside the bulk, and the seconds that the bulk took."""
    trust(session.place, session.far.host)
    cache = session.place.folder("node-cache")
    daemon = NodeDaemon(session.place, cache)
    try:
        targets = {name: session.place.folder(f"{name}-mount") for name in ("bulk", "small")}
        daemon.ask_mount(bulk, targets["bulk"])
        daemon.ask_mount(small, targets["small"])
        drop_page_cache()
        offsets = [index * _CHUNK_BYTES for index in range(_SMALL_BYTES // _CHUNK_BYTES)]
        random.Random(3).shuffle(offsets)
        with (targets["small"] / "data").open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            before = [_timed(file.fileno(), offset) for offset in offsets[:_IDLE_COUNT]]
            begin = time.perf_counter()
            readers = _start_bulk(targets["bulk"] / "data", reader_count)
            beside = []
            for offset in offsets[_IDLE_COUNT:]:
                if all(one.poll() is not None for one in readers):
                    break
                beside.append(_timed(file.fileno(), offset))
            for one in readers:
                if one.wait(_BULK_TIMEOUT_S) != 0:
                    raise ToolError("the bulk reader failed")
            bulk_s = time.perf_counter() - begin
    finally:
        daemon.close()
    return before, beside, bulk_s


def _start_bulk(path: Path, count: int) -> list[subprocess.Popen[bytes]]:
    """So many processes that read a share of the file each, from its start to its end."""
    share = -(-_BULK_BYTES // (1 << 20) // count)
    return [
        subprocess.Popen(["dd", f"if={path}", "of=/dev/null", "bs=1M", f"skip={number * share}", f"count={share}"],
                         stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for number in range(count)
    ]


def _timed(descriptor: int, offset: int) -> float:
    """Milliseconds of a small read that nobody has made before."""
    time.sleep(_PAUSE_S)
    begin = time.perf_counter()
    data = os.pread(descriptor, _READ_BYTES, offset)
    took_ms = (time.perf_counter() - begin) * 1000
    if len(data) != _READ_BYTES:
        raise ToolError(f"a read of {_READ_BYTES} bytes gave {len(data)}")
    return took_ms


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[98]
