"""docs/profile.md, tried: its commands run as they stand there, and its tables name what the commands print."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from lazyfs import __version__
from lazyfs.cli.profile import profile_command
from tests.convertkit import Layout, run_convert
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs/profile.md").read_text()
PLACE = Path("/tmp/lazyfs-profile")      # the document's own words


def make_images(path: Path) -> None:
    layout = Layout(path)
    noise = random.Random(1).randbytes(300_000)
    builder = TarBuilder().file("usr/bin/app", noise[:100_000]).file("usr/lib/libapp.so", noise)
    layout.add_image("app", [builder.build(), TarBuilder().file("etc/app/a.conf", b"key = value\n").build()])
    builder = TarBuilder().file("usr/bin/app", noise[:100_000]).file("usr/lib/libapp.so", noise[:100_000])
    layout.add_image("app2", [builder.build()])


@pytest.fixture
def images() -> Iterator[Path]:
    assert not PLACE.exists(), f"{PLACE} is there already: somebody follows the document, or has followed it"
    PLACE.mkdir()
    try:
        make_images(PLACE / "images")
        yield PLACE
    finally:
        shutil.rmtree(PLACE)


def test_the_document_works_as_it_is_written(images: Path) -> None:
    blocks = re.findall(r"^```console\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                   "XDG_CACHE_HOME": str(images / "cache")}
    done = subprocess.run(["bash", "-ec", "\n".join(blocks)], env=environment, capture_output=True, text=True,
                          check=False, timeout=120)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    merged = (images / "start.txt").read_text().splitlines()
    shown = DOCUMENT[DOCUMENT.index("    # lazyfs-prefetch 1") :].replace("lazyfs 0.1.0", f"lazyfs {__version__}")
    assert merged[:5] == [line.strip() for line in shown.splitlines()[:5]]
    assert merged[5:] == ["etc/app/a.conf ms=7", "usr/lib/libapp.so 0-65535 ms=6"]
    for expected in ("agreement  0.667", "largest files", "layer 2", "coverage  ", "gone      etc/app/a.conf"):
        assert expected in done.stdout, expected
    assert "<svg" in (images / "start.svg").read_text()
    assert "<svg" in (images / "start.html").read_text()


def test_tables_name_what_is_printed(tmp_path: Path) -> None:
    path, image = tmp_path / "list", f"oci:{tmp_path}/images:lazy"
    path.write_text("usr/bin/app 0-9 ms=1\n")
    make_images(tmp_path / "images")
    run_convert(f"oci:{tmp_path}/images:app", image)
    words = {"show": [str(path)], "diff": [str(path), str(path)], "check": [str(path), image],
             "push": [str(path), image]}
    for command, arguments in words.items():
        done = CliRunner().invoke(profile_command, [command, *arguments, "--json"], catch_exceptions=False)
        (row,) = re.findall(rf"^\| `{command}` \| (.*) \|$", DOCUMENT, re.MULTILINE)
        assert re.findall(r"`(\w+)`", row) == list(json.loads(done.stdout))
