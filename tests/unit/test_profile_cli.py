"""`lazyfs profile` on real images in an OCI layout: what it prints and writes, and how it fails."""

from __future__ import annotations

import errno
import json
import random
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from lazyfs import __version__
from lazyfs.cli.convert import convert_command
from lazyfs.cli.profile import profile_command
from lazyfs.errors import (
    DiskFullError,
    FormatError,
    LazyfsError,
    NotFoundError,
    ProfileDiffersError,
    TargetError,
    UsageError,
)
from lazyfs.image.prefetch import parse_prefetch
from lazyfs.profile.recording import Recording, Touch, to_json
from tests.convertkit import Layout, Lazy, run_convert
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from pathlib import Path

NOISE = random.Random(7).randbytes(400_000)
LOWER = TarBuilder().directory("bin").file("bin/sh", NOISE[:100_000]).file("bin/ls", NOISE[1000:9000]).build()
UPPER = TarBuilder().file("etc/<b>", b"x" * 5000).build()
SHORTER = TarBuilder().file("bin/sh", NOISE[:50_000]).build()


class Place:
    """A source image `a`, its lazy image, another one in which files are gone and shorter; recordings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        layout = Layout(path / "in")
        layout.add_image("a", [LOWER, UPPER])
        layout.add_image("b", [SHORTER])
        self.source = layout.reference("a")
        self.lazy, self.rebuilt = f"oci:{path}/out:a", f"oci:{path}/out:b"
        run_convert(self.source, self.lazy)
        run_convert(layout.reference("b"), self.rebuilt)
        opened = Lazy(self.lazy)
        self.devices = tuple((str(device.digest), device.table.device_size) for device in opened.bootstrap.devices)
        self.image = f"oci:{path}/out@{opened.document.digest}"
        self.extents = {name: opened.image.extents(opened.nid(name), 0, 1 << 30)[0]
                        for name in (b"bin/sh", b"bin/ls", b"etc/<b>")}
        opened.close()

    def touch(self, name: bytes, start: int, end: int, ms: float) -> Touch:
        device, offset, _ = self.extents[name]
        return Touch(device, offset + start, offset + end, ms)

    def record(self, name: str, *touches: Touch, image: str | None = None, truncated: bool = False) -> str:
        path = self.path / name
        path.write_bytes(to_json(Recording(self.image if image is None else image, "lazyfs test", self.devices, ("c",),
                                           touches, truncated)))
        return str(path)

    def write(self, name: str, text: str) -> str:
        (self.path / name).write_text(text)
        return str(self.path / name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("profile")
        patch.setenv("XDG_CACHE_HOME", str(path / "cache"))
        return Place(path)


def run(*words: str, stdin: bytes = b"") -> tuple[str, str]:
    """(stdout, stderr); errors are raised as the command raises them."""
    result = CliRunner().invoke(profile_command, words, input=stdin, catch_exceptions=False, standalone_mode=False)
    return result.stdout, result.stderr


def fails(kind: type[LazyfsError], *words: str, stdin: bytes = b"") -> str:
    with pytest.raises(kind) as caught:
        run(*words, stdin=stdin)
    assert type(caught.value) is kind
    assert caught.value.hint
    return str(caught.value)


def test_recordings_become_a_list_that_converts(place: Place) -> None:
    one = place.record("1.json", place.touch(b"bin/sh", 0, 8192, 1.0), place.touch(b"etc/<b>", 0, 4096, 3.0))
    two = place.record("2.json", place.touch(b"bin/sh", 4096, 8192, 2.0), place.touch(b"bin/ls", 4096, 8192, 9.0))
    out = place.path / "start.txt"
    _, told = run("merge", one, two, "-o", str(out), "--made", "by hand")
    assert out.read_text().splitlines() == [
        "# lazyfs-prefetch 1", f"# image: {place.image}", f"# tool: lazyfs {__version__}", "# runs: 2",
        "# made: by hand",
        "bin/sh 0-4095 share=0.5 ms=1", "bin/sh 4096-8191 ms=2", "bin/ls 4096-7999 share=0.5 ms=9",
        '"etc/<b>" 0-4095 share=0.5 ms=3',
    ]
    assert "4 lines of 2 runs, 16.2 kB" in told
    again, _ = run("merge", two, one, "--made", "by hand")
    assert again == out.read_text()
    assert "bin/ls" not in run("merge", one, two, "--min-share", "0.6", "-q")[0]
    result = CliRunner().invoke(convert_command, [place.source, f"oci:{place.path}/hot:a", "--prefetch", str(out),
                                                  "--json", "-q"], catch_exceptions=False)
    hot = json.loads(result.stdout)["images"][0]["hot"]
    assert hot["unmatched"] == []
    assert (hot["chunks"], hot["uncompressedBytes"]) == (1, 4 * 4096), "the four blocks that the list names"


def test_a_merged_list_is_merged_with_a_further_run(place: Place) -> None:
    text = "# lazyfs-prefetch 1\n# image: x\n# runs: 3\nbin/sh 0-4095\n"
    run_4 = place.record("4.json", place.touch(b"bin/sh", 0, 4096, 2.0))
    out, told = run("merge", place.write("3.txt", text), run_4)
    assert parse_prefetch(out).header.runs == 4
    assert parse_prefetch(out).header.image == ""
    assert "different images" in told
    assert parse_prefetch(run("merge", "-", "-q", stdin=text.encode())[0]).header.runs == 3


def test_show(place: Place) -> None:
    listed = place.write("show.txt", "bin/sh 0-99 ms=5\nbin/*\n# c\ngone 0-9\n")
    out, _ = run("show", listed)
    assert "110 B in 3 ranges of 3 files, 1 run" in out
    assert "1 ranges whose size only the image knows" in out
    out, told = run("show", listed, "--image", place.lazy)
    assert "108 kB in 3 ranges of 2 files" in out
    assert "layer 1" in out
    assert "stored" in out
    assert "1 lines name no file" in told
    report = json.loads(run("show", listed, "--image", place.lazy, "--json")[0])
    assert (report["bytes"], report["chunks"], len(report["layers"])) == (108_000, 2, 2)
    recorded = place.record("show.json", place.touch(b"etc/<b>", 0, 4096, 3.0), truncated=True)
    out, told = run("show", recorded)
    assert "4.1 kB in 1 ranges of 1 files" in out
    assert "cut off" in told
    assert run("show", "-", stdin=(place.path / "show.json").read_bytes())[0] == out


def test_pictures(place: Place) -> None:
    recorded = place.record("picture.json", place.touch(b"etc/<b>", 0, 4096, 3.0))
    image, html = place.path / "a.svg", place.path / "a.html"
    image.write_text("before")
    out, told = run("show", recorded, "--svg", str(image), "--html", str(html))
    assert "largest files" in out
    assert told.count("written") == 2
    assert ET.fromstring(image.read_text()).tag.endswith("svg")
    assert "&lt;b&gt;" in html.read_text()
    assert run("show", recorded, "--svg", "-")[0] == image.read_text()
    assert run("show", recorded, "--html", "-")[0] == html.read_text()
    fails(UsageError, "show", recorded, "--html", "-", "--svg", "-")
    fails(UsageError, "show", recorded, "--html", "-", "--json")
    assert {path.name for path in place.path.iterdir() if path.name.startswith(".")} == set()


def test_diff(place: Place) -> None:
    first = place.write("d1.txt", "bin/sh 0-99\nbin/ls 0-49\nother 0-0\n")
    second = place.write("d2.txt", "bin/ls 0-49\nbin/sh 0-49\n")
    out, _ = run("diff", first, second)
    assert "agreement  0.662  (100 B common, 51 B only A, 0 B only B)" in out
    assert "order      -1.000" in out
    report = json.loads(run("diff", first, second, "--json")[0])
    assert (report["a"], report["commonBytes"], report["coveredB"]) == (first, 100, 1.0)
    text = fails(ProfileDiffersError, "diff", first, second, "--min-agreement", "0.9")
    assert "0.662" in text
    run("diff", first, second, "--min-agreement", "0.6")
    globs = place.write("d3.txt", "bin/*\n")
    report = json.loads(run("diff", first, globs, "--json", "--image", place.lazy)[0])
    assert (report["commonBytes"], report["onlyBBytes"], report["rangesWithoutSize"]) == (150, 108_000 - 150, 0)


def test_check_against_a_rebuilt_image(place: Place) -> None:
    listed = place.write("c.txt", 'bin/sh 0-99999\nbin/ls 0-3\n"a\\x1b" 0-0\n')
    out, _ = run("check", listed, place.rebuilt)
    assert out.startswith("coverage  0.500  (50.0 kB of 100 kB; 1 of 3 lines)\nchunks    1, ")
    assert out.splitlines()[2:] == ["gone      bin/ls 0-3", 'gone      "a\\x1b" 0-0',
                                    "shorter   bin/sh 0-99999 (by 50.0 kB)"]
    report = json.loads(run("check", listed, place.rebuilt, "--json")[0])
    assert report["missing"] == ["bin/ls 0-3", '"a\\x1b" 0-0']
    assert report["storedBytes"] > 40_000
    assert "0.500" in fails(ProfileDiffersError, "check", listed, place.rebuilt, "--min-coverage", "0.9")
    run("check", listed, place.rebuilt, "--min-coverage", "0.49", "--json")
    recorded = place.record("c.json", place.touch(b"bin/sh", 0, 100_000, 1.0))
    assert json.loads(run("check", recorded, place.rebuilt, "--json")[0])["coverage"] == 0.5
    assert json.loads(run("check", recorded, place.lazy, "--json")[0])["coverage"] == 1.0


def test_what_cannot_be_read(place: Place) -> None:
    good = place.write("good.txt", "bin/sh\n")
    assert "No such file" in fails(UsageError, "show", str(place.path / "nothing"))
    bad = place.write("bad.txt", "bin/sh\nbin/sh x=1\n")
    assert "bad.txt: prefetch list, line 2" in fails(FormatError, "diff", good, bad)
    broken = place.write("broken.json", '{"lazyfsRecording":1,"image":7}')
    assert "broken.json: recording" in fails(FormatError, "merge", good, broken)
    fails(UsageError, "diff", "-", "-", stdin=b"a\n")
    fails(FormatError, "check", good, place.source)
    fails(NotFoundError, "check", good, f"oci:{place.path}/out:nothing")
    touch = place.touch(b"bin/sh", 0, 4096, 1.0)
    assert "another image" in fails(UsageError, "show", place.record("o.json", touch), "--image", place.rebuilt)
    fails(UsageError, "show", place.record("n.json", touch, image=""))
    fails(UsageError, "merge", good, "--made", "two\nlines")


def test_files_are_written_whole_or_not_at_all(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    good = place.write("good2.txt", "bin/sh 0-9\n")
    fails(TargetError, "merge", good, "-o", str(place.path / "no" / "list"))
    fails(TargetError, "merge", good, "-o", str(place.path))
    target, link = place.path / "target.txt", place.path / "link.txt"
    target.write_text("before")
    link.symlink_to(target)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", _no_space)
        fails(DiskFullError, "merge", good, "-o", str(link))
    assert target.read_text() == "before"
    assert not [path for path in place.path.iterdir() if path.name.startswith(".")]
    run("merge", good, "-o", str(link))
    assert link.is_symlink()
    assert "bin/sh 0-9" in target.read_text()
    run("merge", good, "-o", "/dev/null")


def _no_space(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
