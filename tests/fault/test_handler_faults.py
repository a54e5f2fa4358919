"""What goes wrong inside the worker, in a handler: its request ends, the mount goes on (rows 2, 3 and 7 of faults)."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from lazyfs.fs import mountapi, server, wire
from lazyfs.fs.operations import LazyOperations
from lazyfs.fs.served import Served
from tests.convertkit import registry_with
from tests.daemonkit import WAIT_S, Daemon, end_daemon, running_daemon, start_daemon
from tests.diskkit import mounted_disks
from tests.hookkit import Hooks
from tests.mountkit import Machine, require_mounting
from tests.tarbuilder import TarBuilder
from tests.unit.test_fs_server import OPEN, Kernel, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.mount
RNG = random.Random(17)
SIZE = 1_300_000        # more than a chunk
DATA = {f"f{number}": RNG.randbytes(SIZE) for number in range(4)}
# Each request that is answered by a method of LazyOperations: (opcode, method, body).
_READ = wire.READ_IN.pack(0, 0, 4096) + bytes(20)
REQUESTS = {
    "lookup": (wire.LOOKUP, "lookup", b"f1\0"), "getattr": (wire.GETATTR, "status", bytes(16)),
    "readlink": (wire.READLINK, "readlink", b""), "open": (wire.OPEN, "open", OPEN),
    "read": (wire.READ, "read_now", _READ), "waiting-read": (wire.READ, "read", _READ),
    "release": (wire.RELEASE, "release", bytes(24)), "opendir": (wire.OPENDIR, "opendir", OPEN),
    "readdir": (wire.READDIR, "readdir", _READ), "readdirplus": (wire.READDIRPLUS, "readdir", _READ),
    "releasedir": (wire.RELEASEDIR, "release", bytes(24)),
    "getxattr": (wire.GETXATTR, "xattrs", wire.GETXATTR_IN.pack(64, 0) + b"user.a\0"),
    "listxattr": (wire.LISTXATTR, "xattrs", wire.GETXATTR_IN.pack(64, 0)),
    "statfs": (wire.STATFS, "block_count", b""),
}


def test_the_list_of_requests_is_whole() -> None:
    """A handler that is added has to be named here: all but those that ask nobody."""
    served = server.FuseServer(LazyOperations(Served()), -1)
    alone = {wire.INIT, wire.DESTROY, *server._WRITERS}
    assert set(served._handlers) - alone == {opcode for opcode, _, _ in REQUESTS.values()}


@pytest.mark.parametrize("request_name", REQUESTS)
def test_an_exception_in_any_operation_ends_its_request_alone(
    request_name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opcode, method, body = REQUESTS[request_name]
    failing = True
    real: Callable[..., object] = getattr(LazyOperations, method)

    def broken(*arguments: object, **words: object) -> object:
        if failing:
            raise KeyError("a bug")
        return real(*arguments, **words)

    async def main() -> None:
        nonlocal failing
        async with serving() as kernel:
            monkeypatch.setattr(LazyOperations, method, broken)
            inode = kernel.file if "read" in method and "dir" not in method else kernel.root
            await _ends_with(kernel, opcode, inode, body, errno.EIO)
            failing = False
            assert (await kernel.asked(wire.GETATTR, kernel.root, bytes(16)))[0] == 0

    trio.run(main)
    assert [record for record in caplog.records if "incident" in record.getMessage()], "it has a number in the log"


async def _ends_with(kernel: Kernel, opcode: int, inode: int, body: bytes, code: int) -> None:
    assert await kernel.asked(opcode, inode, body) == (code, b"")


# --- a whole daemon --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    require_mounting()
    tar = TarBuilder().directory("sub").symlink("link", b"f0")
    for name, data in DATA.items():
        tar.file(name, data, pax={"SCHILY.xattr.user.a": b"v"})
    with registry_with(tmp_path_factory.mktemp("registry"), {"app": [tar.build()]}) as running:
        yield running.host


@pytest.fixture
def hooks(tmp_path: Path) -> Hooks:
    return Hooks(tmp_path)


@contextlib.contextmanager
def hooked(machine: Machine, hooks: Hooks, hang_s: int) -> Iterator[Daemon]:
    daemon = start_daemon(machine, "--hang-timeout", str(hang_s), environment=hooks.environment)
    try:
        daemon.wait_ready()
        yield daemon
    finally:
        hooks.clear()
        end_daemon(daemon)


@pytest.fixture
def daemon(machine: Machine, hooks: Hooks) -> Iterator[Daemon]:
    """Its worker stays, also on a machine with other work."""
    with hooked(machine, hooks, 60) as made:
        yield made


@pytest.fixture
def impatient(machine: Machine, hooks: Hooks) -> Iterator[Daemon]:
    """A worker that is silent for 2 s is replaced."""
    with hooked(machine, hooks, 2) as made:
        yield made


def mount(machine: Machine, registry: str, driver: str, timeout_s: int = 60) -> Path:
    target = machine.target()
    machine.lazyfs("mount", f"{registry}/app:lazy", target, "--insecure", "--driver", driver, "--cache-dir",
                   machine.cache, "--read-timeout", str(timeout_s))
    return target


def errno_of(call: Callable[[], object]) -> int:
    """0: it worked."""
    try:
        call()
    except OSError as error:
        return error.errno or 0
    return 0


def page_of(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        return os.pread(file.fileno(), 4096, offset)


@pytest.mark.parametrize("kind", ["raise", "memory"])
def test_an_exception_in_a_handler_of_a_mount_is_an_errno_of_that_call(
    machine: Machine, daemon: Daemon, hooks: Hooks, registry: str, kind: str
) -> None:
    target, worker = mount(machine, registry, "fuse"), daemon.worker()
    calls: dict[str, Callable[[], object]] = {
        "lookup": (target / "f0").stat, "readlink": (target / "link").readlink,
        "xattrs": lambda: os.listxattr(target / "sub"), "opendir": lambda: list((target / "sub").iterdir()),
        "block_count": lambda: os.statvfs(target), "open": lambda: (target / "f1").open("rb").close(),
        "read": (target / "f2").read_bytes, "readdir": lambda: list(target.iterdir()),
    }
    for name, call in calls.items():
        hooks.set(name, kind)
        assert errno_of(call) == (errno.EIO if kind == "raise" else errno.ENOMEM), name
        hooks.clear()
        deadline = time.monotonic() + WAIT_S
        while errno_of(call):     # what failed may be remembered for a moment
            assert time.monotonic() < deadline, name
            time.sleep(0.05)
    assert {name: (target / name).read_bytes() for name in DATA} == DATA
    assert daemon.worker() == worker
    assert (machine.directory / "daemon.log").read_text().count("incident") >= len(calls)
    machine.umount(target)


@pytest.mark.parametrize("driver", ["erofs", "fuse"])
def test_a_read_that_never_comes_back_is_ended_by_the_guard(
    machine: Machine, daemon: Daemon, hooks: Hooks, registry: str, driver: str
) -> None:
    target, worker = mount(machine, registry, driver, timeout_s=2), daemon.worker()
    assert _read_until_right(target / "f0") == DATA["f0"]
    hooks.set("device", "sleep")
    # Another file's pages, far apart: each reader has a request of its own, and the kernel asks twice for each.
    found: list[int] = []
    readers = [threading.Thread(target=lambda at=at: found.append(errno_of(lambda: page_of(target / "f3", at))))
               for at in range(0, SIZE, SIZE // 4)]
    for reader in readers:
        reader.start()
    assert errno_of((target / "f0").read_bytes) == 0, "others are served"
    for reader in readers:
        reader.join(60)
        assert not reader.is_alive()
    assert set(found) <= {errno.EIO, errno.ETIMEDOUT}
    assert len(found) == len(readers)
    hooks.clear()
    assert _read_until_right(target / "f3") == DATA["f3"]
    assert daemon.worker() == worker
    machine.umount(target)


@pytest.mark.parametrize("target_name", ["lookup", "readdir", "read_now"])
def test_a_handler_that_holds_the_loop_costs_a_worker_and_no_error(
    machine: Machine, impatient: Daemon, hooks: Hooks, registry: str, target_name: str
) -> None:
    """Seen from outside: no sign of life; the next worker answers the very request."""
    target, worker = mount(machine, registry, "fuse"), impatient.worker()
    calls: dict[str, Callable[[], object]] = {
        "lookup": lambda: (target / "f1").stat().st_size, "readdir": lambda: len(os.listdir(target)),   # noqa: PTH208
        "read_now": (target / "f1").read_bytes,
    }
    hooks.set(target_name, "block")
    found: list[object] = []
    caller = threading.Thread(target=lambda: found.append(calls[target_name]()))
    caller.start()
    deadline = time.monotonic() + WAIT_S
    while not hooks.is_hanging():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    hooks.clear()     # the worker that hangs does not look any more; the next one does
    caller.join(60)
    assert found == [{"lookup": SIZE, "readdir": len(DATA) + 2, "read_now": DATA["f1"]}[target_name]]
    impatient.wait_ready(not_worker=worker)
    log = (machine.directory / "daemon.log").read_text()
    assert "most recent call first" in log, "where each thread was, before it was replaced"
    assert "hookkit.py" in log
    status = impatient.status() or {}
    assert (status["hung"], status["died"], status["turns"]) == (1, 0, 2)
    machine.umount(target)


def _state(pid: int) -> str | None:
    """None: no such process, or it is dead."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None
    return None if state in "ZX" else state


def _read_until_right(path: Path) -> bytes:
    """Errors are remembered for a moment."""
    deadline = time.monotonic() + WAIT_S
    while errno_of(path.read_bytes):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return path.read_bytes()


# --- an admin aborts the connection ----------------------------------------------------------------------------------


def abort(machine: Machine, mount_point: str) -> None:
    """The most powerful method (fuse.rst): every request ends, whoever should have answered."""
    entry = mountapi.mount_at(mount_point)
    assert entry is not None
    with mounted_disks(machine.directory) as mount_disk:
        connections = mount_disk("-t", "fusectl", "none", name="connections")
        (connections / entry.device.partition(":")[2] / "abort").write_text("1")


@pytest.mark.parametrize("driver", ["erofs", "fuse"])
def test_an_aborted_connection_of_a_worker_of_its_own(machine: Machine, registry: str, driver: str) -> None:
    target = mount(machine, registry, driver)
    assert (target / "f0").read_bytes() == DATA["f0"]
    worker = machine.worker()
    assert worker is not None
    abort(machine, next(entry.target for entry in machine.mounts() if entry.fs_type.startswith("fuse")))
    deadline = time.monotonic() + WAIT_S
    while _state(worker.pid) is not None:
        assert time.monotonic() < deadline, "it goes on for nobody"
        time.sleep(0.05)
    assert errno_of((target / "f3").read_bytes)
    machine.lazyfs("umount", "--stale")
    machine.assert_clean()
    assert mount(machine, registry, driver).joinpath("f3").read_bytes() == DATA["f3"]
    machine.umount(target)
    machine.assert_clean()


def test_an_aborted_connection_of_the_daemon(machine: Machine, registry: str) -> None:
    with running_daemon(machine) as daemon:
        target, worker = mount(machine, registry, "erofs"), daemon.worker()
        abort(machine, str(daemon.directory.fuse))
        daemon.wait_ready(not_worker=worker)
        deadline = time.monotonic() + WAIT_S
        while mountapi.mount_at(str(target)) is not None:
            machine.lazyfs("umount", "--stale")
            assert time.monotonic() < deadline
        assert mount(machine, registry, "erofs").joinpath("f3").read_bytes() == DATA["f3"]
        machine.umount(target)
        daemon.stop()
    machine.assert_clean()
