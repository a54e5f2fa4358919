"""
Where the CPU time of this process goes, by Python stack: a sampler, and flame graphs of what it found.

A thread looks at all others some thousand times a second; a sample weighs as much CPU time as its thread has used
since it was looked at last, so a thread that waits weighs nothing. Time spent in C (the kernel, zstd, BLAKE3) counts
for the line that called it, whose text is the innermost frame. So that Python code is seen as often as C code, the
interpreter's switch interval is short meanwhile. Who calls: benchmarks.fetchload, fetchcpu.
"""

from __future__ import annotations

import html
import linecache
import os
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import FrameType, TracebackType

INTERVAL_S = 0.0003    # a thread that has just begun to wait is charged there with what it did in so long a time
_SWITCH_S = 1e-5
_DEPTH_MAX = 60
_WIDTH, _ROW, _LETTER = 1200, 18, 6.6    # pixels: of the picture, of a frame's height, of a letter
_SMALLEST = 0.4                          # of a frame that is drawn
_HUES = ("#e8743b", "#e3893f", "#dd9a45", "#d8ab50", "#e0653a")


class Sampler:
    """Samples from `__enter__` to `__exit__`, which writes `folded`: a line `frame;frame;... microseconds` a stack."""

    def __init__(self, folded: Path) -> None:
        self._folded = folded
        self._found: Counter[tuple[str, ...]] = Counter()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="sampler", daemon=True)

    def __enter__(self) -> Self:
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        sys.setswitchinterval(self._switch_s)
        lines = sorted(f"{';'.join(stack)} {weight}" for stack, weight in self._found.items() if weight)
        self._folded.write_text("\n".join(lines) + "\n")

    def _sample(self) -> None:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))   # this thread alone: not on the measured core
        used: dict[int, float] = {}
        names: dict[int, str] = {}
        while not self._ended.wait(INTERVAL_S):
            frames = sys._current_frames()  # noqa: SLF001 - there is no other way to another thread's stack
            names.update({thread.ident or 0: thread.name for thread in threading.enumerate()})
            for ident, frame in frames.items():
                if ident == self._thread.ident:
                    continue
                try:
                    now = time.clock_gettime(time.pthread_getcpuclockid(ident))
                except OSError:
                    continue   # it has ended
                weight = round((now - used.get(ident, now)) * 1e6)
                used[ident] = now
                if weight:
                    self._found[(_group(names.get(ident, "")), *_stack(frame))] += weight


def _group(name: str) -> str:
    return "fetch threads" if name.startswith("lazyfs-fetch") else "loop" if name == "MainThread" else "other threads"


def _stack(frame: FrameType) -> list[str]:
    """Outermost first; the innermost one is the text of the line that runs."""
    inner = linecache.getline(frame.f_code.co_filename, frame.f_lineno or 0).strip().replace(";", ",")
    names: list[str] = [inner[:80]]
    walk: FrameType | None = frame
    while walk is not None and len(names) < _DEPTH_MAX:
        names.append(f"{Path(walk.f_code.co_filename).stem}.{walk.f_code.co_qualname}")
        walk = walk.f_back
    return names[::-1]


@dataclass(slots=True)
class _Node:
    weight: int = 0
    children: dict[str, _Node] = field(default_factory=dict)


def flame_svg(folded: str, title: str) -> str:
    """The picture of folded stacks: as wide as their share of CPU time, callers below what they call."""
    root = _Node()
    for line in folded.splitlines():
        stack, _, weight = line.rpartition(" ")
        root.weight += int(weight)
        node = root
        for name in stack.split(";"):
            node = node.children.setdefault(name, _Node())
            node.weight += int(weight)
    boxes: list[str] = []
    deepest = _draw(root, 0.0, 0, root.weight, boxes)
    height = (deepest + 2) * _ROW + 30
    body = "\n".join(boxes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        f'font-family="monospace" font-size="11">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        f'<text x="6" y="16" font-size="13">{html.escape(title)}</text>\n'
        f'<g transform="translate(0,{height - _ROW - 6})">\n{body}\n</g>\n</svg>\n'
    )


def _draw(node: _Node, left: float, depth: int, total: int, boxes: list[str]) -> int:
    """Append what stands on `node`; returns the depth reached."""
    deepest = depth
    for number, (name, child) in enumerate(sorted(node.children.items())):
        width = child.weight * _WIDTH / max(total, 1)
        if width >= _SMALLEST:
            y = -depth * _ROW
            label = html.escape(name)
            shown = html.escape(name[: int(width / _LETTER)]) if width > 3 * _LETTER else ""
            boxes.append(
                f'<g><title>{label} ({child.weight / max(total, 1):.1%})</title><rect x="{left:.1f}" y="{y}" '
                f'width="{max(width - 0.5, 0.3):.1f}" height="{_ROW - 1}" fill="{_HUES[(depth + number) % 5]}"/>'
                f'<text x="{left + 3:.1f}" y="{y + 13}">{shown}</text></g>'
            )
            deepest = max(deepest, _draw(child, left, depth + 1, total, boxes))
        left += width
    return deepest
