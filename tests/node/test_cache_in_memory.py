"""A cache directory on a file system that the kernel cannot mount EROFS images from (tmpfs): `auto` finds a way."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from lazyfs.fs import mountapi
from lazyfs.node import protocol
from lazyfs.registry import RegistryOptions
from tests.convertkit import Layout, run_convert
from tests.daemonkit import running_daemon
from tests.mountkit import Machine, require_mounting
from tests.registrykit import running_registry
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.mount
DATA = os.urandom(300_000)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    require_mounting()
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        source = Layout(tmp_path_factory.mktemp("source") / "in")
        source.add_image("app", [TarBuilder().file("file", DATA).build()])
        name = f"{running.host}/app:lazy"
        run_convert(source.reference("app"), f"docker://{name}", registry=RegistryOptions(insecure=True))
        yield name


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    require_mounting()
    made = Machine(tmp_path)
    made.cache.mkdir(mode=0o700)
    mountapi.mount("none", str(made.cache), "tmpfs", 0, "mode=700")
    yield made
    made.close()


def test_auto_takes_driver_fuse_and_a_takeover_keeps_it(machine: Machine, image: str) -> None:
    target = machine.target()
    with running_daemon(machine) as daemon:
        for _ in range(2):    # the second time all is cached
            machine.lazyfs("mount", image, target, "--insecure")
            assert (target / "file").read_bytes() == DATA
            with protocol.ControlClient.connect(daemon.directory.socket) as client:
                assert [one["driver"] for one in client.request(protocol.LIST, 5)] == ["fuse"]
            worker = daemon.worker()
            os.kill(worker, signal.SIGKILL)
            daemon.wait_ready(not_worker=worker)
            assert (target / "file").read_bytes() == DATA
            machine.umount(target)
        assert daemon.directory.records() == []


def test_a_worker_of_its_own_takes_it_too(machine: Machine, image: str) -> None:
    target = machine.target()
    machine.mount(image, target, "--insecure")
    assert (target / "file").read_bytes() == DATA
    machine.umount(target)


def test_driver_erofs_by_name_is_refused_with_the_way_out(machine: Machine, image: str) -> None:
    errors = machine.mount(image, machine.target(), "--insecure", "--driver", "erofs", code=40)
    assert "cannot be mounted from" in errors
    assert "--driver fuse" in errors
    assert [entry.fs_type for entry in machine.mounts()] == ["tmpfs"]
