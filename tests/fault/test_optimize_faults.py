"""Optimizing that fails at each of its steps: the name stays where it was, and the next run does it."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from converter.optimize import OptimizeOptions, OptimizeReport, optimize
from lazyfs.errors import DiskFullError, NotFoundError, TargetError
from lazyfs.image.prefetch import parse_prefetch
from lazyfs.registry import RegistryOptions, open_destination, open_source, parse_reference
from tests.convertkit import Layout, Lazy, registry_with, run_convert, tar_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lazyfs.image.digest import Digest
    from lazyfs.registry.place import ImageDestination

STEPS = {"put_blob", "put_bytes", "put_document", "mount_blob", "has_blob", "commit"}
LAYERS = [tar_of({"a": random.Random(1).randbytes(200_000)}), tar_of({"b": b"b" * 100_000})]


class StepError(TargetError):
    """What fails here."""


class NoEvents:
    def copy_started(self, digest: Digest, size: int) -> None: ...

    copied = copy_done = copy_started


class Failing:
    """A destination that fails at one step, counted from 0; `after`: when it was done. `count`: steps so far."""

    def __init__(self, place: ImageDestination, step: int, *, after: bool) -> None:
        self._place, self._step, self._after = place, step, after
        self.count = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._place, name)
        if name not in STEPS:
            return found

        def attempt(*words: Any) -> Any:
            mine, self.count = self.count, self.count + 1
            if mine == self._step and not self._after:
                raise StepError("step")
            result = found(*words)
            if mine == self._step:
                raise StepError("step")
            return result

        return attempt


def run(image: str, destination: str, step: int = -1, *, after: bool = False) -> tuple[OptimizeReport | None, int]:
    """The report, None if the step failed; and how many steps there were."""
    options = OptimizeOptions(parse_prefetch("b\na 0-0\n"), None, parse_reference(image).identity)
    with contextlib.closing(open_source(image, RegistryOptions())) as source, \
            contextlib.closing(open_destination(destination, RegistryOptions())) as place:
        failing = Failing(place, step, after=after)
        try:
            return optimize(source, failing, options, NoEvents()), failing.count  # type: ignore[arg-type]
        except StepError:
            return None, failing.count


@pytest.fixture
def image(tmp_path: Path) -> str:
    layout = Layout(tmp_path / "in")
    layout.add_image("app", LAYERS)
    run_convert(layout.reference("app"), f"oci:{tmp_path}/lazy:app")
    return f"oci:{tmp_path}/lazy:app"


@pytest.fixture
def registry_image(tmp_path: Path) -> Iterator[str]:
    with registry_with(tmp_path, {"app": LAYERS}) as registry:
        yield f"docker://{registry.host}/app:lazy"


def named(destination: str) -> Digest | None:
    """What a reference names; None: nothing."""
    try:
        with contextlib.closing(open_source(destination, RegistryOptions())) as source:
            return source.root().digest
    except NotFoundError:
        return None


def fails_at_each_step(image: str, destination: str, scratch: Path) -> None:
    start = named(destination)
    whole, _ = run(image, f"oci:{scratch}:app")
    assert whole is not None
    for step in range(100):
        for after in (False, True):
            report, count = run(image, destination, step, after=after)
            if report is None:
                assert named(destination) in (start, whole.digest if after else start)
                continue
            assert step == count > 3, "all steps are through"
            assert named(destination) == report.digest == whole.digest
            with contextlib.closing(Lazy(destination)) as lazy:
                assert lazy.manifest.hot is not None
                assert lazy.verify()
            return
    raise AssertionError("it never got through")


def test_in_its_own_directory(image: str, tmp_path: Path) -> None:
    fails_at_each_step(image, image, tmp_path / "scratch")
    assert not list((tmp_path / "lazy").glob(".lazyfs-staging-*"))


def test_into_an_archive(image: str, tmp_path: Path) -> None:
    fails_at_each_step(image, f"oci-archive:{tmp_path}/app.tar", tmp_path / "scratch")
    assert not list(tmp_path.glob(".lazyfs-staging-*"))


def test_into_another_repository(registry_image: str, tmp_path: Path) -> None:
    fails_at_each_step(registry_image, registry_image.replace("/app:lazy", "/other/app:hot"), tmp_path / "scratch")


def test_under_its_own_tag(registry_image: str, tmp_path: Path) -> None:
    fails_at_each_step(registry_image, registry_image, tmp_path / "scratch")


def test_a_disk_that_gets_full_changes_nothing(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small tmpfs")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "lazyfs-test", str(small)],
                             check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr!r}")
    try:
        layout = Layout(tmp_path / "in")
        layout.add_image("app", LAYERS)
        image = f"oci:{small}/lazy:app"
        run_convert(layout.reference("app"), image)
        start, filler = named(image), small / "filler"
        room = os.statvfs(small)
        filler.write_bytes(bytes((room.f_bavail - 20) * room.f_frsize))      # the hot device needs 26 blocks
        with pytest.raises(DiskFullError, match="No space left"):
            run(image, image)
        assert named(image) == start
        assert not list((small / "lazy").glob(".lazyfs-staging-*"))
        filler.unlink()
        report, _ = run(image, image)
        assert report is not None
        with contextlib.closing(Lazy(image)) as lazy:
            assert lazy.hot_blocks()
    finally:
        subprocess.run(["umount", str(small)], check=True)
