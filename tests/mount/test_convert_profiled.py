"""`lazyfs convert --profile-run`: one command, and DST names nothing but the final image."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import NotFoundError, NotReadyError, ProgramError, UsageError
from lazyfs.image.prefetch import parse_prefetch
from lazyfs.registry import RegistryOptions, open_source
from tests.convertkit import OPTIONS, Lazy, run_convert
from tests.mountkit import LAZYFS, Machine
from tests.registrykit import running_registry
from tests.runnerkit import RUN_S, Done, Profiler, profiled_image, require_runc

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.mount


class Converter:
    """`lazyfs convert --profile-run` of the image that profiled_image() makes."""

    def __init__(self, directory: Path) -> None:
        profiled_image(directory / "image")
        self.source = f"oci:{directory / 'image/source'}:app"
        self.profiler = Profiler(Machine(directory), self.source)

    def run(self, destination: str, *words: str, code: int = 0) -> Done:
        command = [*LAZYFS, "convert", "--codec", "lz4", "--level", "1", "--chunk-size", "64k"]
        environment = self.profiler.machine.environment
        with subprocess.Popen([*command, self.source, destination, *words], text=True, env=environment,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            self.profiler.pids.append(process.pid)
            try:
                out, said = process.communicate(timeout=RUN_S)
            except BaseException:
                process.kill()
                raise
        assert process.returncode == code, said
        assert "Traceback" not in said, said
        return Done(out, said)


@pytest.fixture
def converter(tmp_path: Path) -> Iterator[Converter]:
    require_runc()
    made = Converter(tmp_path)
    yield made
    made.profiler.assert_nothing_left()


def tags(image: str) -> set[str]:
    """What an image layout names."""
    index = json.loads((Path(image.split(":")[1]) / "index.json").read_text())
    return {entry["annotations"]["org.opencontainers.image.ref.name"] for entry in index["manifests"]}


def test_it_is_a_conversion_with_the_list_that_was_recorded(converter: Converter, tmp_path: Path) -> None:
    image, written = f"oci:{tmp_path}/out:hot", tmp_path / "start.txt"
    done = converter.run(image, "--profile-run", "--list", str(written), "--json")
    report = json.loads(done.list_text)
    wanted = parse_prefetch(written.read_text())
    paths = list(dict.fromkeys(entry.pattern for entry in wanted.entries))
    assert paths.index(b"data/f3") < paths.index(b"data/f1")
    run_convert(converter.source, f"oci:{tmp_path}/expected:hot", OPTIONS, prefetch=wanted)
    expected = Lazy(f"oci:{tmp_path}/expected:hot").document
    found = Lazy(image)
    assert found.document == expected
    assert found.verify()
    assert report["digest"] == expected.digest.text
    assert wanted.header.image.endswith(report["convert"]["digest"])
    assert report["profile"]["runs"][0]["exitCode"] == 0
    assert report["optimize"]["images"][0]["coverage"]["coverage"] == 1.0
    assert tags(image) == {"hot"}


def test_a_run_that_fails_leaves_the_destination_as_it_is(converter: Converter, tmp_path: Path) -> None:
    image = f"oci:{tmp_path}/out:hot"
    converter.run(image, "--profile-run", "--", "sh", "-c", "exit 3", code=ProgramError.exit_code)
    assert not (tmp_path / "out/index.json").exists()
    done = converter.run(image)               # what was converted is used
    assert "reused" in done.said
    before = Lazy(image).document
    converter.run(image, "--profile-run", "--until-port", "80", "--", "true", code=NotReadyError.exit_code)
    assert Lazy(image).document == before


def test_an_archive_is_there_whole_or_not_at_all(converter: Converter, tmp_path: Path) -> None:
    archive = f"oci-archive:{tmp_path}/app.tar"
    converter.run(archive, "--profile-run", "--", "false", code=ProgramError.exit_code)
    assert not (tmp_path / "app.tar").exists()
    converter.run(archive, "--profile-run", "--", "cat", "/data/f2")
    with contextlib.closing(Lazy(archive)) as lazy:
        assert lazy.manifest.hot is not None
        assert lazy.verify()


def test_a_registry(converter: Converter, tmp_path: Path) -> None:
    with running_registry(tmp_path / "registry") as registry:
        image = f"docker://{registry.host}/app:hot"
        converter.run(image, "--profile-run", "--", "false", code=ProgramError.exit_code)
        with contextlib.closing(open_source(image, RegistryOptions())) as source, pytest.raises(NotFoundError):
            source.root()
        done = converter.run(image, "--profile-run", "--runs", "2", "--", "cat", "/data/f2")
        assert "2 reused" in done.list_text
        with contextlib.closing(Lazy(image)) as lazy:
            assert lazy.manifest.hot is not None
            assert lazy.verify()


@pytest.mark.parametrize("words", [("--until-port", "80"), ("--", "sh"), ("--runs", "2"), ("--list", "x"),
                                   ("--profile-run", "--prefetch", "/dev/null"), ("--profile-run", "--list", "-"),
                                   ("--profile-run", "--until-exit", "--for", "3s"),
                                   ("--profile-run", "--list", "/no/such/directory/list")])
def test_words_that_do_not_go_together(converter: Converter, tmp_path: Path, words: tuple[str, ...]) -> None:
    code = 41 if "/no/such/directory/list" in words else UsageError.exit_code
    converter.run(f"oci:{tmp_path}/out:hot", *words, code=code)
    assert not (tmp_path / "out").exists()
