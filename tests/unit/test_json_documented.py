"""What --json prints is what docs/reference.md says: no member more, none less."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from lazyfs.cli.check import check_command
from lazyfs.cli.convert import convert_command
from lazyfs.cli.inspect import inspect_command
from lazyfs.cli.optimize import optimize_command
from tests.convertkit import Layout
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    import click

REFERENCE = Path(__file__).resolve().parents[2] / "docs/reference.md"
COMMANDS = {"convert": convert_command, "inspect": inspect_command, "check": check_command,
            "optimize": optimize_command}
BY_NAME = {"counts", "codecs", "inspect.images.entries"}     # their members are kinds, codecs, types


def documented() -> dict[str, set[str]]:
    """`command.place` -> members."""
    section = REFERENCE.read_text().split("## JSON")[1].split("\n## ")[0]
    found = defaultdict(set)
    for command, place, members in re.findall(r"^\| `(\w+)` \|(?: `([\w.]+)`)? \| (.*) \|$", section, re.MULTILINE):
        found[f"{command}.{place}".rstrip(".")] |= set(re.findall(r"`(\w+)`", members))
    return dict(found)


def collect(place: str, value: Any, found: dict[str, set[str]]) -> None:
    if isinstance(value, list):
        for one in value:
            collect(place, one, found)
    elif isinstance(value, dict) and not place.endswith(tuple(BY_NAME)):
        found[place] |= set(value)
        for name, inner in value.items():
            collect(f"{place}.{name}", inner, found)


@pytest.mark.parametrize("name", COMMANDS)
def test_members(tmp_path: Path, name: str) -> None:
    layout = Layout(tmp_path / "in")
    layout.add_image("app", [TarBuilder().file("a", random.Random(1).randbytes(300_000)).build()])
    layout.add_image("other", [TarBuilder().file("b", b"2").build()])
    (tmp_path / "list").write_text("a 0-999999\nnothing\n")
    source, lazy = layout.reference("app"), f"oci:{tmp_path}/out:lazy"
    found: dict[str, set[str]] = defaultdict(set)

    def run(*words: str) -> None:
        command: click.Command = COMMANDS[words[0]]
        result = CliRunner().invoke(command, [*words[1:], "--json"])
        output = json.loads(result.stdout)
        if words[0] == name:
            collect(name, output, found)

    run("convert", source, lazy, "--prefetch", str(tmp_path / "list"))
    run("inspect", lazy)
    run("inspect", source)
    run("optimize", lazy, "--prefetch", str(tmp_path / "list"))
    run("check", lazy, layout.reference("other"))
    assert dict(found) == {place: members for place, members in documented().items() if place.split(".")[0] == name}
