"""
A summary as a picture: bytes by time, by file, by layer. One SVG, or one HTML page around it.

Layer: lazyfs.profile, pure. Who calls: `lazyfs profile show --svg, --html`. Self-contained: no script, no font, nothing
is loaded. Readable on light and dark: the viewer's scheme decides. Names are hostile: only _text puts them in.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lazyfs.profile.summary import Summary

    Size = Callable[[int], str]

_WIDTH: Final = 900
_LABEL_WIDTH: Final = 430        # of bars that lie: the file's name
_ROW: Final = 20
_TIME_HEIGHT: Final = 160
_TICK_COUNT: Final = 5           # of the time axis
_FILE_COUNT: Final = 20
_TABLE_COUNT: Final = 1000
_LABEL_CHARS: Final = 58
_STYLE: Final = """
.profile { font: 12px system-ui, sans-serif; fill: #333; }
.profile .head { font-size: 15px; font-weight: 600; }
.profile .value { fill: #666; }
.profile .bar { fill: #3b78b5; }
.profile .axis { stroke: #999; }
.profile .sum { stroke: #c4572c; stroke-width: 2; fill: none; }
.profile .sumvalue { fill: #c4572c; }
@media (prefers-color-scheme: dark) {
  .profile { fill: #ddd; } .profile .value { fill: #aaa; } .profile .bar { fill: #6ea8dc; }
  .profile .sum { stroke: #ee8b60; } .profile .sumvalue { fill: #ee8b60; }
}
"""
_PAGE_STYLE: Final = """
:root { color-scheme: light dark; }
body { font: 14px/1.5 system-ui, sans-serif; max-width: 940px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } td, th { padding: 2px 12px 2px 0; text-align: left; }
td.number { text-align: right; } svg { max-width: 100%; height: auto; }
"""


class _Bar(NamedTuple):
    label: str
    size_bytes: int
    value: str


def svg(summary: Summary, size: Size) -> str:
    """The picture. `size`: writes a number of bytes."""
    parts: list[str] = []
    top = 30
    parts.append(_heading(top, f"{size(summary.size_bytes)} of {len(summary.files)} files, by time"))
    top = _times(parts, top + 12, summary, size)
    shown = summary.files[:_FILE_COUNT]
    more = len(summary.files) - len(shown)
    parts.append(_heading(top, "By file" + (f", and {more} smaller ones" if more else "")))
    top = _bars(parts, top + 12, [_Bar(one.text, one.size_bytes, size(one.size_bytes)) for one in shown])
    if summary.layers:
        parts.append(_heading(top, "By layer"))
        top = _bars(parts, top + 12, [
            _Bar(f"{one.number}  {one.digest[:19]}", one.size_bytes,
                 f"{size(one.size_bytes)} in chunks of {size(one.chunks.stored_bytes)}") for one in summary.layers])
    height = top - 10
    place = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" class="profile" role="img" {place}>',
        f"<title>{_text(_title(summary))}</title>", f"<style>{_STYLE}</style>", *parts, "</svg>", ""])


def page(summary: Summary, size: Size) -> str:
    """The picture in an HTML page, with the largest files in a table."""
    header = summary.header
    rows = [("Image", header.image), ("Recorded by", header.tool), ("Made", header.made), ("Runs", str(header.runs)),
            ("Wanted", f"{size(summary.size_bytes)} in {summary.range_count} ranges of {len(summary.files)} files")]
    if summary.chunks is not None:
        chunks = summary.chunks
        rows.append(("Chunks", f"{chunks.count}, {size(chunks.size_bytes)}, {size(chunks.stored_bytes)} stored"))
    facts = [f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows if value]
    files = [
        f'<tr><td>{_text(one.text)}</td><td class="number">{_text(size(one.size_bytes))}</td>'
        f'<td class="number">{one.range_count}</td>'
        f'<td class="number">{"" if one.first_ms is None else f"{one.first_ms:.0f}"}</td></tr>'
        for one in summary.files[:_TABLE_COUNT]
    ]
    title = _text(_title(summary))
    return "\n".join([
        "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">""",
        f"<title>{title}</title>", f"<style>{_PAGE_STYLE}</style>", "</head>", "<body>", f"<h1>{title}</h1>",
        "<table>", *facts, "</table>", svg(summary, size), "<table>",
        "<tr><th>File</th><th>Bytes</th><th>Ranges</th><th>First, ms</th></tr>", *files, "</table>",
        "</body>", "</html>", ""])


def _title(summary: Summary) -> str:
    return f"What a start of {summary.header.image} reads" if summary.header.image else "What a start reads"


def _heading(top: float, text: str) -> str:
    return f'<text x="10" y="{top}" class="head">{_text(text)}</text>'


def _times(parts: list[str], top: int, summary: Summary, size: Size) -> int:
    """Standing bars, and over them the line of all that was wanted by then; returns where to go on."""
    if not summary.times:
        parts.append(f'<text x="10" y="{top + 16}" class="value">The list tells no times.</text>')
        return top + 60
    base, largest = top + _TIME_HEIGHT, max(one.size_bytes for one in summary.times) or 1
    step = (_WIDTH - 20) / len(summary.times)
    for number, one in enumerate(summary.times):
        height = (_TIME_HEIGHT - 20) * one.size_bytes / largest
        about = f"{one.start_ms:.0f} to {one.end_ms:.0f} ms: {size(one.size_bytes)}"
        parts.append(f'<rect class="bar" x="{10 + number * step:.1f}" y="{base - height:.1f}" '
                     f'width="{step - 2:.1f}" height="{height:.1f}"><title>{_text(about)}</title></rect>')
    parts.append(_sums(summary, base, step))
    parts.append(f'<path class="axis" d="M10 {base}.5 H{_WIDTH - 10}"/>')
    end_ms = summary.times[-1].end_ms
    digits = 0 if end_ms >= _TICK_COUNT else 2
    for number in range(_TICK_COUNT + 1):
        anchor = "start" if number == 0 else "end" if number == _TICK_COUNT else "middle"
        parts.append(f'<text x="{10 + (_WIDTH - 20) * number / _TICK_COUNT:.1f}" y="{base + 16}" class="value" '
                     f'text-anchor="{anchor}">{end_ms * number / _TICK_COUNT:.{digits}f} ms</text>')
    parts.append(f'<text x="10" y="{base + 36}" class="value">Bars: first wanted in that time, the highest '
                 f"{_text(size(largest))}.</text>")
    total = sum(one.size_bytes for one in summary.times)
    parts.append(f'<text x="{_WIDTH - 10}" y="{base + 36}" class="sumvalue" text-anchor="end">'
                 f"Line: wanted until then, {_text(size(total))} at the end.</text>")
    return base + 76


def _sums(summary: Summary, base: int, step: float) -> str:
    """The line: at each bar's end, the share of all bytes that was wanted until then."""
    total = sum(one.size_bytes for one in summary.times) or 1
    points, wanted = [f"10,{base}"], 0
    for number, one in enumerate(summary.times, 1):
        wanted += one.size_bytes
        points.append(f"{10 + number * step:.1f},{base - (_TIME_HEIGHT - 20) * wanted / total:.1f}")
    return f'<polyline class="sum" points="{" ".join(points)}"/>'


def _bars(parts: list[str], top: int, bars: Sequence[_Bar]) -> int:
    """Lying bars with their names; returns where to go on."""
    largest = max((bar.size_bytes for bar in bars), default=0) or 1
    room = _WIDTH - _LABEL_WIDTH - 170
    for number, bar in enumerate(bars):
        y = top + number * _ROW
        width = room * bar.size_bytes / largest
        parts.append(f'<text x="{_LABEL_WIDTH - 8}" y="{y + 14}" text-anchor="end">{_text(_shortened(bar.label))}'
                     f"<title>{_text(bar.label)}</title></text>")
        parts.append(f'<rect class="bar" x="{_LABEL_WIDTH}" y="{y + 3}" width="{width:.1f}" height="{_ROW - 6}"/>')
        parts.append(f'<text x="{_LABEL_WIDTH + width + 6:.1f}" y="{y + 14}" class="value">{_text(bar.value)}</text>')
    return top + len(bars) * _ROW + 40


def _shortened(text: str) -> str:
    """The end of a path says more than its beginning."""
    return text if len(text) <= _LABEL_CHARS else "…" + text[-(_LABEL_CHARS - 1) :]


def _text(text: str) -> str:
    """Text for markup: escaped, and without what XML does not allow."""
    return html.escape("".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text))
