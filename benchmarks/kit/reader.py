"""
Read a file and say how long each read took: the rows of peers start one on each node's mount.

    python -m benchmarks.kit.reader FILE [--held] [--random SEED] [--count N] [--step BYTES] [--size BYTES]

Prints JSON: [[end, seconds], ...], `end` on the machine's monotonic clock. In order, or in the order that the seed
draws: the same on all nodes, as containers of one image read alike. `--held`: says that it is ready, and begins when it
is told to, so that starting a process is not what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from benchmarks.kit.proc import ToolError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Reads = list[tuple[float, float]]


class Reading:
    """A reader under way, a process. Begins at once, or (`held`) with `go`: `wait_ready` first."""

    def __init__(self, path: Path, *words: str, held: bool = False) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.kit.reader", str(path), *words, *(["--held"] if held else [])],
            stdin=subprocess.PIPE if held else subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)

    def wait_ready(self) -> None:
        """Raises ToolError: it has ended instead."""
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise ToolError("a reader ended before it was told to begin")

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def result(self, timeout_s: float) -> Reads:
        """Its reads. Raises ToolError: it failed, or is not over in time (it is ended then)."""
        try:
            text, _ = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.close()
            raise ToolError(f"a reader is not over after {timeout_s:.0f} s") from None
        if self._process.returncode:
            raise ToolError(f"a reader ended with code {self._process.returncode}")
        return [(end, seconds) for end, seconds in json.loads(text)]

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def read_all(paths: Sequence[Path], timeout_s: float, *words: str) -> list[Reads]:
    """Of all files at once, each by a process. Raises ToolError."""
    readers = [Reading(path, *words) for path in paths]
    try:
        with ThreadPoolExecutor(len(readers)) as pool:
            return list(pool.map(lambda reader: reader.result(timeout_s), readers))
    finally:
        for reader in readers:
            reader.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kit.reader", description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--held", action="store_true")
    parser.add_argument("--random", type=int, metavar="SEED")
    parser.add_argument("--count", type=int, default=1 << 30, help="no more reads than this")
    parser.add_argument("--step", type=int, default=1 << 20, help="a read begins at a multiple of it")
    parser.add_argument("--size", type=int, default=1 << 20, help="of a read")
    options = parser.parse_args()
    if options.held:
        print("ready", flush=True)
        sys.stdin.readline()
    found = []
    with open(options.file, "rb", buffering=0) as file:  # noqa: PTH123 - unbuffered, and nothing else
        starts = list(range(0, os.fstat(file.fileno()).st_size, options.step))
        if options.random is not None:
            random.Random(options.random).shuffle(starts)
        for start in starts[:options.count]:
            begin, at, left = time.monotonic(), start, options.size
            while left and (data := os.pread(file.fileno(), left, at)):
                at, left = at + len(data), left - len(data)
            end = time.monotonic()
            found.append((round(end, 5), round(end - begin, 5)))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
