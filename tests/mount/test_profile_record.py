"""`lazyfs profile record`: what running programs read, told by the worker of a mount that is there already."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from lazyfs.fs import mountapi
from lazyfs.fs.drivers import BDI_DIR
from lazyfs.image.prefetch import PrefetchList, parse_prefetch
from lazyfs.profile.recording import from_json
from lazyfs.runner.workspace import CGROUPS
from tests.daemonkit import running_daemon
from tests.mountkit import Machine, require_mounting
from tests.runnerkit import profiled_image, wait_said

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.mount
DRIVERS = pytest.mark.parametrize("driver", ["erofs", "fuse"])


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    require_mounting()
    return profiled_image(tmp_path_factory.mktemp("recorded"))


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    made.close()


def recorded(machine: Machine, *words: str | Path) -> tuple[PrefetchList, str]:
    """The list, and what was said."""
    path = machine.directory / "list"
    said = machine.lazyfs("profile", "record", *words, "-o", path)
    return parse_prefetch(path.read_text()), said


def paths(found: PrefetchList) -> set[str]:
    return {entry.pattern.decode() for entry in found.entries}


def read_page(path: Path, page: int) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert os.pread(descriptor, 4096, page * 4096)
    finally:
        os.close(descriptor)


def read_ahead(machine: Machine, target: Path) -> set[str]:
    (record,) = (json.loads(path.read_bytes()) for path in machine.run_dir.glob("*/mounts/*.json"))
    mounted = mountapi.mount_at(str(target))
    assert mounted is not None
    return {(BDI_DIR / name / "read_ahead_kb").read_text().strip() for name in record["bdi_names"] or [mounted.device]}


@DRIVERS
def test_what_was_read_since_the_mount_by_directory_and_by_image(machine: Machine, image: str, driver: str) -> None:
    target = machine.target()
    machine.mount(image, target, "--driver", driver)
    (target / "data/f3").read_bytes()
    (target / "data/f1").read_bytes()
    found, said = recorded(machine, target)
    assert found.entries[0].pattern == b"data/f3"
    assert paths(found) == {"data/f1", "data/f3"}
    assert found.header.image == image
    assert "KiB ahead" in said
    assert "data/f1" in paths(recorded(machine, image)[0])
    report = json.loads(machine_out(machine, "profile", "record", target, "--json", "-o", machine.directory / "list"))
    assert [(one["target"], one["whole"], one["unseenLayers"]) for one in report["mounts"]] == [(str(target), True, 0)]
    machine.umount(target)


def machine_out(machine: Machine, *words: str | Path) -> str:
    with machine.start(*words) as process:
        out, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    return out


@DRIVERS
def test_finely_from_now_on_it_is_the_pages_that_were_asked_for(machine: Machine, image: str, driver: str) -> None:
    target = machine.target()
    machine.mount(image, target, "--driver", driver)
    (target / "data/f0").read_bytes()
    before = read_ahead(machine, target)
    with machine.start("profile", "record", target, "--fine", "--since-now") as process:
        wait_said(process, "^C ends it")
        assert read_ahead(machine, target) == {"4"}
        read_page(target / "data/f3", 5)
        read_page(target / "data/f3", 1)
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "interrupted" in said
    assert "warning" not in said
    entries = parse_prefetch(out).entries
    assert {entry.pattern for entry in entries} == {b"data/f3"}
    assert [part for entry in entries for part in entry.ranges] == [(20480, 24576), (4096, 8192)]
    deadline = time.monotonic() + 10
    while read_ahead(machine, target) != before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    machine.umount(target)


def test_killed_it_leaves_the_read_ahead_as_it_was(machine: Machine, image: str) -> None:
    target = machine.target()
    machine.mount(image, target)
    before = read_ahead(machine, target)
    with machine.start("profile", "record", target, "--fine", "--until-exit") as process:
        wait_said(process, "^C ends it")
        process.kill()
        process.communicate(timeout=60)
    deadline = time.monotonic() + 10
    while read_ahead(machine, target) != before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    machine.umount(target)


def test_until_the_image_is_unmounted(machine: Machine, image: str) -> None:
    target = machine.target()
    machine.mount(image, target)
    with machine.start("profile", "record", target, "--until-exit", "--recording") as process:
        wait_said(process, "^C ends it")
        (target / "data/f2").read_bytes()
        machine.umount(target)
        out, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "was unmounted" in said
    assert from_json(out.encode()).image == image


@contextlib.contextmanager
def control_group(name: str) -> Iterator[Path]:
    top = next(path for path in (CGROUPS / "pids", CGROUPS) if (path / "cgroup.procs").exists())
    group = top / name
    group.mkdir()
    try:
        yield group
    finally:
        deadline = time.monotonic() + 10
        while True:
            try:
                group.rmdir()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.02)


def test_what_one_container_reads_until_it_ends(machine: Machine, image: str) -> None:
    target = machine.target()
    machine.mount(image, target)
    (target / "data/f0").read_bytes()
    name = f"lazyfs-test-{os.getpid():052d}"     # as long as ids are: the longest of the hierarchies' names counts
    with control_group(name) as group:
        script = f"echo $$ >{group}/cgroup.procs; cat {target}/data/f4 >/dev/null; echo up; read line"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(["sh", "-c", script], **pipes) as program:  # its end of stdin, at the latest, ends it
            assert program.stdout.readline() == "up\n"
            found, _ = recorded(machine, name[:-3])
            assert "data/f4" in paths(found)
            assert "data/f0" not in paths(found)
            with machine.start("profile", "record", name, "--until-exit") as process:
                wait_said(process, "^C ends it")
                program.communicate("\n", timeout=60)
                out, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert "the container has ended" in said
        assert "data/f4" in paths(parse_prefetch(out))
    machine.umount(target)


def test_a_worker_that_takes_over_goes_on_and_says_what_is_lost(machine: Machine, image: str) -> None:
    target = machine.target()
    with running_daemon(machine) as daemon:
        machine.mount(image, target)
        with machine.start("profile", "record", target, "--until-exit") as process:
            wait_said(process, "^C ends it")
            (target / "data/f1").read_bytes()
            worker = daemon.worker()
            os.kill(worker, signal.SIGKILL)
            daemon.wait_ready(not_worker=worker)
            (target / "data/f2").read_bytes()
            process.send_signal(signal.SIGTERM)
            out, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert "another worker took over" in said
        assert "data/f2" in paths(parse_prefetch(out))
        found, said = recorded(machine, target)
        assert paths(found) == {"data/f2"}
        assert "another worker took over" in said
        machine.umount(target)


@pytest.mark.parametrize(("words", "code", "text"), [
    (("/",), 41, "is not a lazyfs mount"), (("no-such-name",), 41, "no image of that name is mounted"),
    (("x", "--json"), 2, "standard output"), (("x", "-o", "/not/there/list"), 41, "no such directory"),
    (("x", "--for", "soon"), 2, "duration")])
def test_words_that_are_off(machine: Machine, words: tuple[str, ...], code: int, text: str) -> None:
    assert text in machine.lazyfs("profile", "record", *words, code=code)
