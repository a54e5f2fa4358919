"""The picture of a comparison: well-formed whatever the names, bars as long as their seconds."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree as ET

from benchmarks.compare.picture import draw

SVG = "{http://www.w3.org/2000/svg}"


def system(about: str, *seconds: float) -> dict[str, Any]:
    median = sorted(seconds)[len(seconds) // 2]
    return {"about": about, "median_s": median, "s": list(seconds), "link_mb": [5.0, 7.0, 6.0]}


def test_a_bar_is_as_long_as_its_median() -> None:
    root = ET.fromstring(draw({"numpy": {"lazyfs": system("lazyfs", 1, 1, 1), "nydus": system("nydus", 2, 3, 4)}}, "c"))
    ours, theirs = root.iter(f"{SVG}rect")
    assert (ours.get("class"), theirs.get("class")) == ("ours", "bar")
    assert abs(float(theirs.attrib["width"]) / float(ours.attrib["width"]) - 3) < 0.01
    assert "3.00 s, 6 MB" in [text.text for text in root.iter(f"{SVG}text")]


def test_names_are_only_text() -> None:
    text = "<script>&\"'"
    root = ET.fromstring(draw({text: {"x": system(text, 1)}}, text))
    assert [found.text for found in root.iter(f"{SVG}text")].count(text) == 3
    assert not list(root.iter(f"{SVG}script"))


def test_no_system_was_measured() -> None:
    assert not list(ET.fromstring(draw({"numpy": {}}, "c")).iter(f"{SVG}rect"))
