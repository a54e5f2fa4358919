"""Fixtures for all tests: nobody leaves anything behind."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests import leaks, ports

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.diskkit import Mounts
    from tests.mountkit import Machine

# A test forks (preexec_fn) while gRPC's threads end: its fork handlers then wait for each other, for ever. Our own
# programs say the same (cli.snapshotter).
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
# A shell's background job ignores SIGINT, and so would all that its tests start, and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
_MARK = leaks.mark_environment()
_PORTS = ports      # claims its block now: see there


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", type=float, default=2.0, metavar="MINUTES", help="for tests/fault/test_soak.py")
    parser.addoption("--soak-seed", type=int, default=None, metavar="N", help="its faults: those of an earlier run")
    parser.addoption("--fuzz", type=float, default=1.0, metavar="TIMES", help="so many times the usual mutations")


@pytest.fixture(scope="session", autouse=True)
def _own_run_directory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test touches /run/lazyfs, where real workers live."""
    os.environ["LAZYFS_RUN_DIR"] = str(tmp_path_factory.mktemp("run"))
    os.environ["LAZYFS_CACHE_FULL_COPY"] = "off"    # tests count what is fetched; those of the full copy say otherwise


@pytest.fixture(autouse=True, scope="session")
def _own_journal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's conversion journal knows the blobs of earlier test sessions: older code's answers would be reused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache-home")))
        yield


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails a test that leaves a mount, a process, a loop device or an open descriptor behind."""
    # Not /tmp/tutorial, which is not ours alone: the test that mounts there looks for itself.
    scope = leaks.Scope(_MARK, (f"{tmp_path_factory.getbasetemp()}/",))
    before = scope.take()
    yield
    left = leaks.wait_for_leaks(before, scope)
    if left:
        leaks.clear(left)
        pytest.fail(f"{request.node.name} left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A run directory and a cache directory of their own; skips where nothing can be mounted."""
    from tests.mountkit import Machine, require_mounting  # noqa: PLC0415 - most tests mount nothing

    require_mounting()
    made = Machine(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def registry(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The host of a registry with the lazy image `app`: FILES of the tests' module, in a layer."""
    from tests.convertkit import registry_with, tar_of  # noqa: PLC0415
    from tests.mountkit import require_mounting  # noqa: PLC0415

    require_mounting()
    with registry_with(tmp_path_factory.mktemp("registry"), {"app": [tar_of(request.module.FILES)]}) as running:
        yield running.host


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    """Small disks, unmounted at the end."""
    from tests.diskkit import mounted_disks  # noqa: PLC0415

    with mounted_disks(tmp_path) as mount:
        yield mount
