"""
A comparison as a picture: for each program, one bar a system, with the least and the most that was measured.

Pure. One self-contained SVG, readable on light and dark. Who calls: compare.report.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_WIDTH = 900
_LABEL_WIDTH = 330
_VALUE_WIDTH = 130
_ROW = 22
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #333; }
.head { font-size: 15px; font-weight: 600; } .value { fill: #666; }
.bar { fill: #b9c2cb; } .ours { fill: #3b78b5; } .line { stroke: #555; }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd; } .value { fill: #aaa; } .bar { fill: #56616b; } .ours { fill: #6ea8dc; } .line { stroke: #bbb; }
}
"""


def draw(programs: Mapping[str, Mapping[str, Mapping[str, Any]]], caption: str) -> str:
    """
    The picture.

    Args:
        programs: program -> system -> `about` (text), `median_s`, `s` (seconds of each start), `link_mb`.
        caption: the conditions.

    """
    parts: list[str] = []
    top = 24
    parts.append(_text(10, top, "Seconds from nothing on the node to the first useful output", "head"))
    parts.append(_text(10, top + 18, caption, "value"))
    top += 54
    for name, systems in programs.items():
        parts.append(_text(10, top, name, "head"))
        top = _bars(parts, top + 8, systems)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" width="{_WIDTH}" height="{top}">',
            f"<style>{_STYLE}</style>", *parts, "</svg>", "",
        ]
    )  # fmt: skip


def _bars(parts: list[str], top: int, systems: Mapping[str, Mapping[str, Any]]) -> int:
    """One lying bar a system; returns where to go on."""
    longest = max((max(one["s"]) for one in systems.values()), default=0) or 1
    scale = (_WIDTH - _LABEL_WIDTH - _VALUE_WIDTH) / longest
    for number, (key, one) in enumerate(systems.items()):
        y = top + number * _ROW
        width = one["median_s"] * scale
        low, high = _LABEL_WIDTH + min(one["s"]) * scale, _LABEL_WIDTH + max(one["s"]) * scale
        kind = "ours" if key.startswith("lazyfs") else "bar"
        megabytes = sorted(one["link_mb"])[len(one["link_mb"]) // 2]
        parts += [
            _text(_LABEL_WIDTH - 8, y + 15, one["about"], "", "end"),
            f'<rect class="{kind}" x="{_LABEL_WIDTH}" y="{y + 3}" width="{width:.1f}" height="{_ROW - 6}"/>',
            f'<path class="line" d="M{low:.1f} {y + 11}.5 H{high:.1f}"/>',
            _text(high + 6, y + 15, f"{one['median_s']:.2f} s, {megabytes:.0f} MB", "value"),
        ]
    return top + len(systems) * _ROW + 34


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y}" class="{kind}" text-anchor="{anchor}">{html.escape(text)}</text>'
