"""Mounts of images with a hot part: what is read from where, the kernel's read-ahead, a worker that dies meanwhile."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lazyfs.fs import drivers
from lazyfs.image.prefetch import parse_prefetch
from lazyfs.node.hotstart import COLD_BYTES_MAX
from tests.convertkit import Layout, run_convert
from tests.daemonkit import running_daemon
from tests.registrykit import running_registry
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.mountkit import Machine

pytestmark = pytest.mark.mount
DRIVERS = pytest.mark.parametrize("driver", ["erofs", "fuse"])
RNG = random.Random(4)
PAGE = 4096
LIBRARY = RNG.randbytes(2_000_000)
FILES = {"lib": LIBRARY, "start": RNG.randbytes(300_000), "cold": RNG.randbytes(3_000_000),
         "large": bytes(range(256)) * ((COLD_BYTES_MAX + (4 << 20)) // 256)}
# every fourth page of a library, in another order than they lie in it, and all of a program
HOT_PAGES = [*range(400, 480, 4), *range(0, 200, 4)]
LIST = "start\n" + "".join(f"lib {page * PAGE}-{(page + 1) * PAGE - 1}\n" for page in HOT_PAGES)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("hot")
    tar = TarBuilder()
    for name, content in FILES.items():
        tar.file(name, content)
    layout = Layout(directory / "in")
    layout.add_image("app", [tar.build()])
    with running_registry(directory / "registry") as registry:
        text = f"docker://{registry.host}/app:lazy"
        run_convert(layout.reference("app"), text, prefetch=parse_prefetch(LIST.encode()))
        yield text


def read_hot(target: Path) -> None:
    """As a start does: page by page."""
    assert (target / "start").read_bytes() == FILES["start"]
    descriptor = os.open(target / "lib", os.O_RDONLY)
    try:
        for page in HOT_PAGES:
            assert os.pread(descriptor, PAGE, page * PAGE) == LIBRARY[page * PAGE : (page + 1) * PAGE]
    finally:
        os.close(descriptor)


def bdis(machine: Machine) -> list[str]:
    """The mount's; where nothing depends on it, also of one that was made beside us at the same moment."""
    (record,) = machine.run_dir.glob("*/mounts/*.json")
    names: list[str] = json.loads(record.read_text())["bdi_names"]
    return names


def bdi(machine: Machine) -> str:
    (name,) = bdis(machine)
    return name


def read_ahead_kib(name: str) -> int:
    return int((drivers.BDI_DIR / name / "read_ahead_kb").read_text())


def test_a_start_moves_its_hot_bytes_and_nothing_else(machine: Machine, image: str) -> None:
    target = machine.target()
    machine.mount(image, target, "--driver", "erofs")
    assert read_ahead_kib(bdi(machine)) == drivers.READ_AHEAD_HOT_KIB
    read_hot(target)
    statistics = machine.statistics()
    (mounted,) = statistics["mounts"]
    pages = -(-len(FILES["start"]) // PAGE) + len(HOT_PAGES)
    assert statistics["fetch"]["fetched_stored_bytes"] <= pages * PAGE
    assert statistics["fetch"]["hot_reads"] > 0
    assert mounted["touched_stored_bytes"] == statistics["fetch"]["touched_stored_bytes"]
    assert mounted["prefetched_chunks"] > 0
    assert not mounted["complete"]
    machine.umount(target)


def test_read_ahead_is_raised_when_the_program_reads_what_is_not_hot(machine: Machine, image: str) -> None:
    target = machine.target()
    machine.mount(image, target, "--driver", "erofs")
    with (target / "large").open("rb", buffering=0) as file:
        for place in range(0, len(FILES["large"]), 256 << 10):
            assert os.pread(file.fileno(), PAGE, place) == FILES["large"][place : place + PAGE]
    name, deadline = bdi(machine), time.monotonic() + 20
    while read_ahead_kib(name) != drivers.READ_AHEAD_STARTING_KIB:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    machine.umount(target)


def test_without_prefetch_read_ahead_is_the_ordinary_one(machine: Machine, image: str) -> None:
    target = machine.target()
    machine.mount(image, target, "--driver", "erofs", "--no-prefetch")
    assert drivers.READ_AHEAD_STARTING_KIB in map(read_ahead_kib, bdis(machine))
    read_hot(target)
    assert (target / "cold").read_bytes() == FILES["cold"]
    machine.umount(target)


@DRIVERS
def test_a_second_mount_fetches_nothing(machine: Machine, image: str, driver: str) -> None:
    for _ in range(2):
        target = machine.target()
        machine.mount(image, target, "--driver", driver)
        read_hot(target)
        for name in ("lib", "start", "cold"):
            assert (target / name).read_bytes() == FILES[name]
        requests = machine.statistics()["fetch"]["requests"]
        machine.umount(target)
        machine.assert_clean()
    assert requests == 0


@DRIVERS
def test_a_worker_that_takes_over_serves_the_hot_part_too(machine: Machine, image: str, driver: str) -> None:
    with running_daemon(machine) as daemon:
        target = machine.target()
        # without prefetch: what the first worker had fetched ahead would leave nothing to ask of the second
        machine.lazyfs("mount", image, target, "--driver", driver, "--no-prefetch")
        assert (target / "start").read_bytes() == FILES["start"]
        worker = daemon.worker()
        os.kill(worker, signal.SIGKILL)
        read_hot(target)
        daemon.wait_ready(not_worker=worker)
        statistics = machine.statistics()["fetch"]
        assert statistics["hot_reads"] > 0
        assert statistics["errors"] == 0
        for name in ("lib", "start", "cold"):
            assert (target / name).read_bytes() == FILES[name]
        machine.umount(target)
        daemon.stop()
    machine.assert_clean()


def resident_pages(path: Path) -> set[int]:
    """Which pages of a file are in the page cache."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        vector = (ctypes.c_ubyte * -(-size // PAGE))()
        assert ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), vector) == 0
        del view
    return {page for page, state in enumerate(vector) if state & 1}


def test_hot_pages_are_in_the_page_cache_before_anybody_reads_them(machine: Machine, image: str) -> None:
    target = machine.target()
    machine.mount(image, target, "--driver", "erofs")
    deadline = time.monotonic() + 20
    while resident_pages(target / "lib") < set(HOT_PAGES):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    while not resident_pages(target / "start") >= set(range(-(-len(FILES["start"]) // PAGE))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert resident_pages(target / "lib") == set(HOT_PAGES)
    assert not resident_pages(target / "cold")
    reads = machine.statistics()["fetch"]["hits"]
    read_hot(target)
    statistics = machine.statistics()["fetch"]
    assert statistics["hits"] == reads
    assert statistics["requests"] <= 2
    machine.umount(target)


def test_a_mount_is_unmounted_while_it_is_warmed(machine: Machine, image: str) -> None:
    for number in range(6):
        target = machine.target(f"mnt{number}")
        machine.mount(image, target, "--driver", "erofs")
        machine.umount(target)
    machine.assert_clean()


def test_hot_data_comes_while_the_image_is_being_mounted(machine: Machine, image: str) -> None:
    with running_daemon(machine) as daemon:
        (mounter,) = Path(f"/proc/{daemon.worker()}/task/{daemon.worker()}/children").read_text().split()
        target = machine.target()
        os.kill(int(mounter), signal.SIGSTOP)    # the kernel is asked, and the answer takes its time
        try:
            mounting = machine.start("mount", image, target, "--driver", "erofs")
            deadline = time.monotonic() + 20
            while not machine.statistics()["fetch"]["chunks_prefetched"]:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert not target.is_mount()
        finally:
            os.kill(int(mounter), signal.SIGCONT)
        mounting.communicate(timeout=60)
        assert mounting.returncode == 0
        read_hot(target)
        machine.umount(target)
        daemon.stop()
    machine.assert_clean()


def test_nothing_is_warmed_without_prefetch(machine: Machine, image: str) -> None:
    target = machine.target()
    machine.mount(image, target, "--driver", "erofs", "--no-prefetch")
    with (target / "start").open("rb") as file:
        assert file.read(PAGE) == FILES["start"][:PAGE]
    assert not resident_pages(target / "lib")
    machine.umount(target)
