"""What a cache directory keeps of an image is changed by somebody: the kernel sees what was checked, or nothing."""

from __future__ import annotations

import os
import random
import signal
from typing import TYPE_CHECKING

import pytest

from tests.convertkit import registry_with, tar_of
from tests.daemonkit import running_daemon
from tests.mountkit import Machine, require_mounting

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.mount
FILES = {f"f{number}": random.Random(number).randbytes(50_000) for number in range(3)}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    require_mounting()
    images = {name: [tar_of({**FILES, "name": name.encode()})] for name in ("app", "evil")}
    with registry_with(tmp_path_factory.mktemp("registry"), images) as running:
        yield running.host


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path / "machine")
    made.directory.mkdir()
    yield made
    made.close()


def mount(machine: Machine, host: str, name: str, driver: str = "auto") -> Path:
    target = machine.target(name)
    machine.mount(f"{host}/{name}:lazy", target, "--insecure", "--driver", driver)
    assert (target / "name").read_text() == name
    return target


def kept(machine: Machine, folder: str) -> dict[Path, bytes]:
    paths = (machine.cache / folder).iterdir()
    return {path: path.read_bytes() for path in paths if path.suffix in {".erofs", ".zst"}}


@pytest.mark.parametrize("driver", ["erofs", "fuse"])
def test_between_two_mounts(machine: Machine, registry: str, driver: str) -> None:
    """Flipped, cut, and another image's, valid in itself: each is noticed, and made anew."""
    with running_daemon(machine):
        machine.umount(mount(machine, registry, "app", driver))
        ((erofs, image),) = kept(machine, "images").items()
        ((layer, stored),) = kept(machine, "bootstraps").items()
        machine.umount(mount(machine, registry, "evil", driver))
        other_image = next(data for path, data in kept(machine, "images").items() if path != erofs)
        other_layer = next(data for path, data in kept(machine, "bootstraps").items() if path != layer)
        middle = len(image) // 2
        flipped = image[:middle] + bytes([image[middle] ^ 1]) + image[middle + 1 :]
        changes = [(erofs, image, flipped), (erofs, image, image[:-4096]), (erofs, image, other_image),
                   (layer, stored, stored[:-1] + b"x"), (layer, stored, other_layer), (layer, stored, b"")]
        for path, good, bad in changes:
            path.write_bytes(bad)
            machine.umount(mount(machine, registry, "app", driver))
            assert path.read_bytes() == good


def test_while_nobody_serves_it(machine: Machine, registry: str) -> None:
    """A worker that takes over believes no file either; the kernel goes on with the one it has open."""
    with running_daemon(machine) as daemon:
        target = mount(machine, registry, "app")
        ((path, good),) = kept(machine, "images").items()
        worker = daemon.worker()
        replacement = path.with_name("new")
        replacement.write_bytes(good[:-4096])
        replacement.replace(path)
        os.kill(worker, signal.SIGKILL)
        daemon.wait_ready(not_worker=worker)
        assert path.read_bytes() == good
        for name, data in FILES.items():
            assert (target / name).read_bytes() == data
        machine.umount(target)
