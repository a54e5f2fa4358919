"""
A process that reads the files of a mounted image and compares every byte: `python -m tests.soakreader ORDER`.

ORDER (JSON): `target`, `image` (its files are made from its name, see content_of), `way` (one of WAYS), `seed`,
`bound_s` (a longer read is a hang). It reads until its standard input ends, then prints one JSON object:
`compared_bytes`, `wrong` (descriptions), `errors` ({errno's name: count}), `longest_s`, `hung` (descriptions).
"""

from __future__ import annotations

import errno
import functools
import json
import mmap
import os
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

WAYS = ("sequential", "random", "mmap")
SIZES = {"small": 3_000, "page": 4096, "odd": 70_001, "medium": 400_000, "large": 2_500_000}
_POPULATE_READ = 22              # MADV_POPULATE_READ, Linux 5.14: an error instead of SIGBUS
_PIECE_BYTES = 128 * 1024
_PAUSE_S = 0.02                  # between files: two processors are shared by all
_PROBLEMS_MAX = 20


@functools.cache
def content_of(image: str) -> dict[str, bytes]:
    """The files of an image."""
    return {f"{name}{number}": random.Random(f"{image}/{name}{number}").randbytes(size)
            for name, size in SIZES.items() for number in range(3)}


class Reader:
    """See the module."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._target = Path(order["target"])
        self._files = content_of(order["image"])
        self._read = {"sequential": self._sequential, "random": self._random, "mmap": self._mmap}[order["way"]]
        self._chance = random.Random(order["seed"])
        self._bound_s = float(order["bound_s"])
        self._label = f"{order['image']} {order['way']}"
        self.result: dict[str, Any] = {"compared_bytes": 0, "wrong": [], "errors": Counter(), "longest_s": 0.0,
                                       "hung": []}

    def run(self, ended: threading.Event) -> None:
        while not ended.is_set():
            for name in self._chance.sample(sorted(self._files), len(self._files)):
                if ended.wait(_PAUSE_S):
                    return
                self._one(name)

    def _one(self, name: str) -> None:
        try:
            descriptor = os.open(self._target / name, os.O_RDONLY)
        except OSError as error:
            self._failed(error)
            return
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            self._read(descriptor, name, self._files[name])
        except OSError as error:
            self._failed(error)
        finally:
            os.close(descriptor)

    def _failed(self, error: OSError) -> None:
        self.result["errors"][errno.errorcode.get(error.errno or 0, str(error))] += 1

    def _timed(self, name: str, began: float) -> None:
        took_s = time.monotonic() - began
        self.result["longest_s"] = max(self.result["longest_s"], took_s)
        if took_s > self._bound_s:
            self._note("hung", f"{self._label} {name}: {took_s:.1f} s")

    def _note(self, kind: str, text: str) -> None:
        if len(self.result[kind]) < _PROBLEMS_MAX:
            self.result[kind].append(text)

    def _compare(self, name: str, offset: int, found: bytes, wanted: bytes) -> None:
        self.result["compared_bytes"] += len(wanted)
        if found != wanted:
            differ = (i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b)
            at = next(differ, min(len(found), len(wanted)))
            self._note("wrong", f"{self._label} {name} at {offset + at}: {len(found)} bytes of {len(wanted)}, "
                                f"{found[at : at + 8].hex()} instead of {wanted[at : at + 8].hex()}")

    def _pread(self, descriptor: int, name: str, offset: int, size: int, data: bytes) -> None:
        """A read that fails on its way says first what it has, as read(2) does: asking for the rest tells why."""
        found, wanted = b"", data[offset : offset + size]
        while True:
            began = time.monotonic()
            try:
                piece = os.pread(descriptor, size - len(found), offset + len(found))
            except OSError:
                self._compare(name, offset, found, wanted[: len(found)])
                raise
            finally:
                self._timed(name, began)
            found += piece
            if not piece or len(found) >= len(wanted):
                break
        self._compare(name, offset, found, wanted)

    def _sequential(self, descriptor: int, name: str, data: bytes) -> None:
        for offset in range(0, len(data) + 1, _PIECE_BYTES):      # the last one: the end is where it should be
            self._pread(descriptor, name, offset, _PIECE_BYTES, data)

    def _random(self, descriptor: int, name: str, data: bytes) -> None:
        for _ in range(6):
            offset, size = self._chance.randrange(len(data)), self._chance.choice((1, 4096, 50_000))
            self._pread(descriptor, name, offset, size, data)

    def _mmap(self, descriptor: int, name: str, data: bytes) -> None:
        with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapped:
            began = time.monotonic()
            try:
                mapped.madvise(_POPULATE_READ)
            finally:
                self._timed(name, began)
            self._compare(name, 0, mapped[:], data)


def main() -> None:
    reader = Reader(json.loads(sys.argv[1]))
    ended = threading.Event()
    worker = threading.Thread(target=reader.run, args=(ended,))
    worker.start()
    sys.stdin.read()
    ended.set()
    worker.join()
    print(json.dumps(reader.result), flush=True)


if __name__ == "__main__":
    main()
