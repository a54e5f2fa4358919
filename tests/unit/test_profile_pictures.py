"""What `lazyfs profile show` prints and draws: the figures are right, and names from images stay text."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from lazyfs.cli.output import format_bytes
from lazyfs.image.prefetch import PrefetchHeader, exact_pattern, parse_prefetch
from lazyfs.profile.coverage import Chunks, cover
from lazyfs.profile.files import profile_of_recording
from lazyfs.profile.parts import Part, Profile, profile_of
from lazyfs.profile.picture import page, svg
from lazyfs.profile.summary import as_lines, summarize
from tests.profilekit import CHUNK, STORED_BYTES, image_files, recording

SVG = "{http://www.w3.org/2000/svg}"
FILES = image_files([("bin/sh", 0, 100), ("lib/a.so", 4096, 3 * CHUNK)], [("etc/y", 4096, 1)])
HOSTILE = b"<script>alert(1)</script>/\"'&\x1b[2J\xff\n]]>"


def test_figures_of_a_recording() -> None:
    touches = [(0, 0, 8192, 0.0), (1, 4096, 8192, 50.0), (0, 3 * CHUNK, 3 * CHUNK + 8192, 100.0)]
    summary = summarize(profile_of_recording(recording(touches, devices=2), FILES), FILES)
    assert (summary.size_bytes, summary.range_count, summary.open_count) == (100 + 4096 + 1 + 4096, 4, 0)
    assert [(use.text, use.size_bytes, use.range_count, use.first_place) for use in summary.files] == [
        ("lib/a.so", 8192, 2, 1), ("bin/sh", 100, 1, 0), ("etc/y", 1, 1, 2)]
    assert [one.size_bytes for one in summary.times if one.size_bytes] == [4196, 1, 4096]
    assert (summary.times[0].start_ms, summary.times[-1].end_ms) == (0.0, 100.0)
    assert [(one.number, one.size_bytes, one.chunks) for one in summary.layers] == [
        (1, 8292, Chunks(2, 2 * CHUNK, 2 * STORED_BYTES)), (2, 1, Chunks(1, CHUNK, STORED_BYTES))]
    assert summary.chunks == Chunks(3, 3 * CHUNK, 3 * STORED_BYTES)
    report = summary.as_json()
    assert (report["bytes"], report["storedBytes"], len(report["layers"])) == (8293, 3000, 2)


def test_figures_of_a_list_alone() -> None:
    profile = profile_of(parse_prefetch("# lazyfs-prefetch 1\n# image: i\n# runs: 2\na 0-9\nb\n**/c 0-4 share=0.5"))
    summary = summarize(profile)
    assert (summary.size_bytes, summary.open_count, summary.times, summary.layers) == (15, 2, (), ())
    assert summary.shares == ((1.0, 10), (0.5, 5))
    text = "\n".join(as_lines(summary, format_bytes, 2))
    assert "15 B in 3 ranges of 3 files, 2 runs" in text
    assert "2 ranges whose size only the image knows" in text
    assert "and 1 more" in text
    assert "by time" not in text


def test_an_empty_list_has_a_picture() -> None:
    summary = summarize(Profile(()), FILES)
    assert ET.fromstring(svg(summary, format_bytes)).tag == f"{SVG}svg"
    assert as_lines(summary, format_bytes)[0].startswith("total")
    at_once = summarize(Profile((Part(b"a", 0, 5, first_ms=0.0),)))
    assert sum(one.size_bytes for one in at_once.times) == 5


def test_pictures_show_files_layers_and_times() -> None:
    found = cover(parse_prefetch("bin/sh 0-99 ms=1\nlib/a.so 0-9999 ms=7\netc/y 0-0 ms=9"), FILES)
    root = ET.fromstring(svg(summarize(found.profile, FILES), format_bytes))
    texts = [node.text for node in root.iter(f"{SVG}text")]
    for wanted in ("lib/a.so", "bin/sh", "10.0 kB", "By layer", "9 ms", "the highest 10.0 kB", "10.1 kB at the end"):
        assert any(text and wanted in text for text in texts), wanted
    (line,) = root.iter(f"{SVG}polyline")
    heights = [float(point.partition(",")[2]) for point in line.get("points").split()]
    assert heights == sorted(heights, reverse=True), "what was wanted once stays wanted"
    assert heights[0] - heights[-1] == 140
    bars = list(root.iter(f"{SVG}rect"))
    assert len(bars) == 20 + 3 + 2
    assert all(float(bar.get("width")) >= 0 and float(bar.get("x")) + float(bar.get("width")) <= 900 for bar in bars)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.add(tag)
        self.attributes |= {name for name, _ in attrs}


@pytest.mark.parametrize("draw", [svg, page])
def test_hostile_names_stay_text(draw) -> None:
    part = Part(exact_pattern(HOSTILE), 0, 10, first_ms=1.0)
    summary = summarize(Profile((part,), PrefetchHeader("<script>x</script>\"'>\x1b", "</style><script>")))
    text = draw(summary, format_bytes)
    assert "<script" not in text
    assert "\x1b" not in text
    assert "&lt;script&gt;" in text
    tags = _Tags()
    tags.feed(text)
    assert "script" not in tags.found
    assert not any(name.startswith("on") or name in ("src", "href") for name in tags.attributes)
    if draw is svg:
        ET.fromstring(text)
