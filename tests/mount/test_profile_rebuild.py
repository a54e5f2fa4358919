"""A list made on one build, and the start of the next: real images, both started."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

import pytest

from lazyfs.cli.profile_inputs import Images
from lazyfs.image.prefetch import parse_prefetch
from lazyfs.profile.coverage import cover
from lazyfs.profile.diff import compare
from lazyfs.profile.parts import profile_of
from lazyfs.registry import RegistryOptions
from tests.mountkit import Machine
from tests.runnerkit import FILE_BYTES, Profiler, profiled_image, require_runc
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.mount
# What stands at the end of a file's name is read; of the second build's new file, too.
SCRIPT = "for f in /data/f3 /data/f1 /data/new*; do if [ -e $f ]; then cat $f; fi; done >/dev/null"
NEW_BYTES = 20_000


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    require_runc()
    rng = random.Random(8)
    changed = TarBuilder().directory("data")
    changed.file("data/f1", rng.randbytes(FILE_BYTES + NEW_BYTES))     # a package that is newer, and larger
    changed.file("data/f2", rng.randbytes(FILE_BYTES))                 # one that the start does not read
    changed.file("data/new", rng.randbytes(NEW_BYTES))
    return (profiled_image(tmp_path_factory.mktemp("first"), Cmd=["sh", "-c", SCRIPT]),
            profiled_image(tmp_path_factory.mktemp("second"), changed, Cmd=["sh", "-c", SCRIPT]))


def record(image: str, directory: Path) -> str:
    directory.mkdir()
    profiler = Profiler(Machine(directory), image)
    text = profiler.run().list_text
    profiler.assert_nothing_left()
    return text


@pytest.fixture(scope="module")
def old(builds: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first build's list."""
    return record(builds[0], tmp_path_factory.mktemp("old") / "run")


def test_two_recordings_agree_and_a_list_covers_the_next_builds_start(
    builds: tuple[str, str], old: str, tmp_path: Path
) -> None:
    first, second = builds
    again = record(first, tmp_path / "again")
    assert compare(profile_of(parse_prefetch(old)), profile_of(parse_prefetch(again))).agreement >= 0.95
    start = profile_of(parse_prefetch(record(second, tmp_path / "new")))
    found = cover(parse_prefetch(old), Images(RegistryOptions(), None).files(second))
    assert found.share == 1.0
    difference = compare(found.profile, start)
    assert difference.covered_b >= 0.9
    beside = {pattern.decode(): one.only_b for pattern, one in difference.files if one.only_b}
    assert beside.pop("data/new") == beside.pop("data/f1") == NEW_BYTES
    assert set(beside) <= {"bin/busybox"}, "a page of the program, for one file more"


def test_the_old_list_makes_the_new_build_hot_and_it_is_still_the_same_image(
    builds: tuple[str, str], old: str, tmp_path: Path
) -> None:
    second = builds[1]
    path = tmp_path / "list"
    path.write_text(old)
    machine = Machine(tmp_path)
    made = [f"oci:{tmp_path}/{name}:app" for name in ("one", "two")]
    for target in made:
        machine.lazyfs("optimize", second, "--prefetch", path, target)
    digests = [json.loads((tmp_path / name / "index.json").read_text())["manifests"][0]["digest"]
               for name in ("one", "two")]
    assert digests[0] == digests[1], "the same list, the same image"
    source = second.replace("/lazy:", "/source:")
    machine.lazyfs("check", made[0], source)
