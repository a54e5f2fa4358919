"""What goes wrong around a mount: each ends in one clear error or the right bytes, never hangs, and leaves nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazyfs.cache.store import CacheDir
from lazyfs.fs import mountapi
from lazyfs.image.prefetch import parse_prefetch
from tests.convertkit import Layout, registry_with, run_convert, tar_of
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.mountkit import Machine, require_mounting

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.mount
RNG = random.Random(11)
FILES = {f"f{number}": RNG.randbytes(400_000) for number in range(12)}
DRIVERS = pytest.mark.parametrize("driver", ["erofs", "fuse"])


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`oci:<this>:lazy` and `:plain`."""
    require_mounting()
    directory = tmp_path_factory.mktemp("images")
    source = Layout(directory / "in")
    source.add_image("app", [tar_of(FILES)])
    run_convert(source.reference("app"), f"oci:{directory}/out:lazy")
    return f"{directory}/out"


@pytest.fixture(scope="module")
def registry(layout: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with registry_with(tmp_path_factory.mktemp("registry"), {"app": [tar_of(FILES)]}) as running:
        yield running.host


def read(path: Path) -> bytes | int:
    """Its bytes, or the errno of the read."""
    try:
        return path.read_bytes()
    except OSError as error:
        return error.errno or 0


def collect(path: Path, results: list[bytes | int]) -> None:
    results.append(read(path))


def worker_pid(machine: Machine) -> int:
    worker = machine.worker()
    assert worker is not None
    return worker.pid


def kill_worker(machine: Machine) -> None:
    pid = worker_pid(machine)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while machine.worker() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- refused at once -------------------------------------------------------------------------------------------------


def test_each_obstacle_has_its_line_and_its_code(machine: Machine, layout: str):
    lazy = f"oci:{layout}:lazy"
    target = machine.target()
    full = machine.target("full")
    (full / "x").touch()
    assert "does not exist" in machine.mount(lazy, machine.directory / "missing", code=41)
    assert "not empty" in machine.mount(lazy, full, code=41)
    assert "not a directory" in machine.mount(lazy, full / "x", code=41)
    assert "/in:app: not a lazy image" in machine.mount(f"oci:{Path(layout).parent}/in:app", target, code=10)
    machine.mount(f"oci:{layout}:unknown", target, code=21)
    machine.mount(lazy, target, "--platform", "plan9/mips", code=21)
    machine.mount("docker://Bad Name", target, code=2)
    machine.mount(lazy, target, "--read-timeout", "0", code=2)
    machine.mount(lazy, target, "--driver", "nfs", code=2)
    machine.lazyfs("umount", target, code=41)
    machine.lazyfs("umount", code=2)
    machine.lazyfs("umount", "/proc", code=41)
    machine.assert_clean()


def test_a_registry_that_is_not_there(machine: Machine):
    machine.mount("docker://127.0.0.1:1/app:x", machine.target(), "--insecure", code=20)
    machine.assert_clean()


def test_other_users_are_told_to_be_root(machine: Machine, layout: str):
    command = [*("/usr/bin/setpriv", "--reuid=12345", "--clear-groups"), *map(str, machine_command("mount", layout))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=machine.environment)
    if "Permission" in done.stderr or done.returncode in {126, 127}:
        pytest.skip("other users cannot run this checkout")
    assert (done.returncode, "need root" in done.stderr) == (40, True), done.stderr


def machine_command(word: str, layout: str) -> list[str]:
    return [sys.executable, "-m", "lazyfs", word, f"oci:{layout}:lazy", "/mnt"]


def test_a_mounted_target_is_refused_and_stays(machine: Machine, layout: str):
    target = machine.target()
    machine.mount(f"oci:{layout}:lazy", target)
    assert "already" in machine.mount(f"oci:{layout}:lazy", target, code=41)
    assert read(target / "f1") == FILES["f1"]
    machine.umount(target)
    machine.assert_clean()


def test_a_cache_that_another_process_owns(machine: Machine, layout: str):
    with CacheDir.open(machine.cache):
        assert str(os.getpid()) in machine.mount(f"oci:{layout}:lazy", machine.target(), code=32)
        machine.assert_clean()
    machine.mount(f"oci:{layout}:lazy", machine.target())
    machine.umount(machine.target())


def test_a_cache_on_a_lazy_mount_is_refused(machine: Machine, layout: str):
    target = machine.target()
    machine.mount(f"oci:{layout}:lazy", target)
    machine.lazyfs("mount", f"oci:{layout}:lazy", machine.target("other"), "--cache-dir", target / "cache", code=30)
    machine.umount(target)
    machine.assert_clean()


# --- the worker dies -------------------------------------------------------------------------------------------------


@DRIVERS
@pytest.mark.parametrize("way", ["umount", "stale", "mount", "mount-elsewhere"])
def test_a_killed_worker_means_errors_and_is_cleaned_up(machine: Machine, layout: str, driver: str, way: str):
    target, image = machine.target(), f"oci:{layout}:lazy"
    machine.mount(image, target, "--driver", driver)
    assert read(target / "f1") == FILES["f1"]
    kill_worker(machine)
    assert read(target / "f5") in {errno.EIO, errno.ENOTCONN, errno.ECONNABORTED}
    if way == "umount":
        machine.umount(target)
    elif way == "stale":
        machine.lazyfs("umount", "--stale")
    elif way == "mount":
        machine.mount(image, target, "--driver", driver)
        assert read(target / "f1") == FILES["f1"]
        assert machine.statistics()["fetch"]["requests"] == 0, "it was cached"
        assert read(target / "f5") == FILES["f5"]
        machine.umount(target)
    else:
        other = machine.target("other")
        machine.mount(image, other, "--driver", driver)
        assert mountapi.mount_at(str(target)) is None
        machine.umount(other)
    machine.assert_clean()


def test_readers_that_wait_when_the_worker_is_killed_get_an_error(machine: Machine, registry: str):
    with FaultProxy(registry) as proxy:
        for driver in ("erofs", "fuse"):
            target = machine.target()
            machine.mount(f"docker://{proxy.host}/app:lazy", target, "--insecure", "--driver", driver)
            proxy.add(Fault(Kind.BLACK_HOLE, path="/blobs/"))
            results: list[bytes | int] = []
            threads = [threading.Thread(target=collect, args=(target / name, results)) for name in list(FILES)[6:]]
            for thread in threads:
                thread.start()
            time.sleep(0.5)
            kill_worker(machine)
            for thread in threads:
                thread.join(20)
                assert not thread.is_alive()
            assert set(results) <= {errno.EIO, errno.ENOTCONN, errno.ECONNABORTED}
            proxy.clear()
            machine.umount(target)
    machine.assert_clean()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts_everything(machine: Machine, layout: str, number: int):
    for name, driver in (("a", "erofs"), ("b", "fuse")):
        machine.mount(f"oci:{layout}:lazy", machine.target(name), "--driver", driver)
    os.kill(worker_pid(machine), number)
    machine.assert_clean()


def test_a_worker_that_is_stopped_cannot_keep_umount_force(machine: Machine, layout: str):
    target = machine.target()
    machine.mount(f"oci:{layout}:lazy", target)
    pid = worker_pid(machine)
    os.kill(pid, signal.SIGSTOP)
    try:
        machine.umount(target, "--force")
        assert mountapi.mount_at(str(target)) is None
    finally:
        os.kill(pid, signal.SIGCONT)
    machine.assert_clean()


# --- the network goes ------------------------------------------------------------------------------------------------


@DRIVERS
@pytest.mark.parametrize("kind", ["down", "silent"])
def test_an_outage_ends_reads_at_their_deadline_and_is_over_when_it_is_over(
    machine: Machine, registry: str, driver: str, kind: str
):
    target = machine.target()
    with FaultProxy(registry) as proxy:
        image = f"docker://{proxy.host}/app:lazy"
        machine.mount(image, target, "--insecure", "--driver", driver, "--read-timeout", "2")
        assert read(target / "f0") == FILES["f0"]
        if kind == "down":
            proxy.down()
            proxy.disconnect()
        else:
            proxy.add(Fault(Kind.BLACK_HOLE, path="/blobs/"))
        began = time.monotonic()
        assert read(target / "f11") in {errno.EIO, errno.ETIMEDOUT}
        assert time.monotonic() - began < 30
        assert read(target / "f0") == FILES["f0"], "what is cached is there"
        assert len(list(target.iterdir())) == len(FILES)
        proxy.clear()
        proxy.up()
        deadline = time.monotonic() + 45
        while read(target / "f11") != FILES["f11"]:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        proxy.down()
        machine.umount(target)    # needs no registry
    machine.assert_clean()


@DRIVERS
def test_many_reads_that_wait_hold_up_nobody_else(machine: Machine, registry: str, driver: str):
    target = machine.target()
    with FaultProxy(registry) as proxy:
        image = f"docker://{proxy.host}/app:lazy"
        machine.mount(image, target, "--insecure", "--driver", driver, "--read-timeout", "20")
        assert read(target / "f0") == FILES["f0"]
        proxy.add(Fault(Kind.BLACK_HOLE, path="/blobs/"))
        processes = [subprocess.Popen(["cat", target / name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                     for name in list(FILES)[2:] for _ in range(4)]
        try:
            time.sleep(0.5)
            began = time.monotonic()
            for _ in range(20):
                drop_pages(target / "f0")
                assert read(target / "f0") == FILES["f0"]
                assert len(os.listdir(target)) == len(FILES)   # noqa: PTH208
            assert time.monotonic() - began < 15, "they had to wait for the others"
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait(30)
        proxy.disconnect()
        machine.umount(target, "--force")
    machine.assert_clean()


def drop_pages(path: Path) -> None:
    """Have the next read of the file come to the worker again."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@DRIVERS
def test_readers_that_are_killed_do_not_disturb(machine: Machine, layout: str, driver: str):
    target = machine.target()
    machine.mount(f"oci:{layout}:lazy", target, "--driver", driver)
    rng = random.Random(5)
    for _ in range(60):
        process = subprocess.Popen(["cat", *(target / name for name in FILES)], stdout=subprocess.DEVNULL)
        time.sleep(rng.random() * 0.01)
        process.kill()
        process.wait(10)
        drop_pages(target / "f0")
    for name, data in FILES.items():
        assert read(target / name) == data
    assert "incident" not in next(machine.run_dir.glob("*/worker.log")).read_text()
    machine.umount(target)
    machine.assert_clean()


@pytest.mark.parametrize("kind", [Kind.FLIP, Kind.SHORT, Kind.CUT, Kind.IGNORE_RANGE, Kind.WRONG_RANGE, Kind.RESET])
def test_wrong_bytes_on_the_way_are_never_served(machine: Machine, registry: str, kind: Kind):
    target = machine.target()
    with FaultProxy(registry) as proxy:
        machine.mount(f"docker://{proxy.host}/app:lazy", target, "--insecure", "--read-timeout", "5")
        proxy.add(Fault(kind, path="/blobs/", at=1000, times=3))
        for name, data in FILES.items():
            assert read(target / name) in {data, errno.EIO}
        proxy.clear()
        time.sleep(2.1)    # errors are remembered so long
        for name, data in FILES.items():
            assert read(target / name) == data
        machine.umount(target)
    machine.assert_clean()


@pytest.mark.parametrize("path", ["/manifests/", "/blobs/"])
def test_a_registry_that_takes_its_time_is_waited_for(machine: Machine, registry: str, path: str):
    """A worker without mounts ends; not one whose first order is still on its way (it looks every 2 s)."""
    target = machine.target()
    with FaultProxy(registry) as proxy:
        proxy.add(Fault(Kind.DELAY, path=path, seconds=5, times=1))
        machine.mount(f"docker://{proxy.host}/app:lazy", target, "--insecure")
        assert read(target / "f1") == FILES["f1"]
    machine.umount(target)
    machine.assert_clean()


@pytest.mark.parametrize("path", ["/manifests/", "/blobs/"])
def test_an_interrupted_mount_leaves_nothing(machine: Machine, registry: str, path: str):
    with FaultProxy(registry) as proxy:
        proxy.add(Fault(Kind.BLACK_HOLE, path=path))
        command = machine.start("mount", f"docker://{proxy.host}/app:lazy", machine.target(), "--insecure",
                                "--cache-dir", machine.cache)
        deadline = time.monotonic() + 20
        while not proxy.seen(path=path):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        command.send_signal(signal.SIGINT)
        _, errors = command.communicate(timeout=20)
        assert command.returncode == 130, errors
    machine.assert_clean()


def test_a_worker_killed_while_it_mounts_is_told(machine: Machine, layout: str):
    hold = machine.directory / "hold"
    os.mkfifo(hold)    # as an archive: opening it blocks the client, while the worker waits
    command = machine.start("mount", f"oci-archive:{hold}", machine.target(), "--cache-dir", machine.cache)
    deadline = time.monotonic() + 20
    while machine.worker() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill_worker(machine)
    with contextlib.suppress(OSError):
        os.close(os.open(hold, os.O_RDWR | os.O_NONBLOCK))
    command.terminate()
    command.communicate(timeout=20)
    machine.lazyfs("umount", "--stale")
    machine.mount(f"oci:{layout}:lazy", machine.target())
    machine.umount(machine.target())
    machine.assert_clean()


# --- several at once -------------------------------------------------------------------------------------------------


def test_mounts_started_together_share_a_worker(machine: Machine, layout: str):
    commands = [
        machine.start("mount", f"oci:{layout}:lazy", machine.target(f"m{number}"), "--cache-dir", machine.cache,
                      "--driver", "erofs" if number % 2 else "fuse")
        for number in range(4)
    ]
    for command in commands:
        _, errors = command.communicate(timeout=60)
        assert command.returncode == 0, errors
    assert len(list(machine.run_dir.iterdir())) == 1
    for number in range(4):
        assert read(machine.target(f"m{number}") / "f3") == FILES["f3"]
    machine.lazyfs("umount", "--all")
    machine.assert_clean()


def test_of_two_mounts_on_one_target_one_wins(machine: Machine, layout: str):
    target = machine.target()
    commands = [machine.start("mount", f"oci:{layout}:lazy", target, "--cache-dir", machine.cache) for _ in range(2)]
    codes = []
    for command in commands:
        command.communicate(timeout=60)
        codes.append(command.returncode)
    assert sorted(codes) in ([0, 41], [0, 42])
    assert read(target / "f3") == FILES["f3"]
    machine.umount(target)
    machine.assert_clean()


def test_a_worker_that_is_ending_is_waited_for(machine: Machine, layout: str):
    target = machine.target()
    for _ in range(4):
        machine.mount(f"oci:{layout}:lazy", target)
        command = machine.start("umount", target)
        other = machine.target("other")
        machine.mount(f"oci:{layout}:lazy", other)
        command.communicate(timeout=30)
        assert command.returncode == 0
        machine.umount(other)
    machine.assert_clean()


# --- taking it away --------------------------------------------------------------------------------------------------


def hold_open(path: Path) -> subprocess.Popen[bytes]:
    """A process with the file open, which reads it whole when it gets a line, and exits with the errno."""
    code = ("import sys, os\nf = os.open(sys.argv[1], os.O_RDONLY); print('open', flush=True); sys.stdin.readline()\n"
            "try: n = len(os.pread(f, 10**7, 0))\nexcept OSError as e: sys.exit(e.errno)\n"
            "sys.exit(0 if n == 400000 else 99)")
    process = subprocess.Popen(["/usr/bin/python3", "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"open\n"
    return process


@DRIVERS
def test_a_mount_in_use_is_refused_with_the_name_of_who_uses_it(machine: Machine, layout: str, driver: str):
    target = machine.target()
    machine.mount(f"oci:{layout}:lazy", target, "--driver", driver)
    with hold_open(target / "f7") as process:
        errors = machine.umount(target, code=42)
        assert str(process.pid) in errors
        assert "python3" in errors
        assert read(target / "f1") == FILES["f1"]
        process.communicate(b"\n", timeout=20)
    machine.umount(target)
    machine.assert_clean()


@DRIVERS
@pytest.mark.parametrize(("how", "result"), [("--lazy", {0}), ("--force", {errno.EIO, errno.ESTALE})])
def test_detaching_a_mount_in_use(machine: Machine, layout: str, driver: str, how: str, result: set[int]):
    target = machine.target()
    machine.mount(f"oci:{layout}:lazy", target, "--driver", driver, "--no-prefetch")
    machine.mount(f"oci:{layout}:lazy", machine.target("stays"), "--driver", driver)
    with hold_open(target / "f7") as process:
        machine.umount(target, how)
        assert mountapi.mount_at(str(target)) is None
        process.communicate(b"\n", timeout=20)
        assert process.returncode in result
    machine.umount(machine.target("stays"))
    machine.assert_clean()


def test_the_worker_notices_a_foreign_umount(machine: Machine, layout: str):
    target = machine.target()
    machine.mount(f"oci:{layout}:lazy", target)
    mountapi.unmount(str(target))
    machine.assert_clean()


def test_foreground_lasts_until_a_signal(machine: Machine, layout: str):
    target = machine.target()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        command = machine.start("mount", f"oci:{layout}:lazy", target, "--cache-dir", machine.cache, "--foreground")
        assert command.stderr is not None
        assert "is mounted on" in command.stderr.readline()
        assert read(target / "f2") == FILES["f2"]
        command.send_signal(number)
        command.communicate(timeout=20)
        assert command.returncode == (-number if number == signal.SIGKILL else 0)
        machine.assert_clean()


def test_foreground_ends_when_it_is_unmounted(machine: Machine, layout: str):
    target = machine.target()
    command = machine.start("mount", f"oci:{layout}:lazy", target, "--cache-dir", machine.cache, "--foreground")
    assert command.stderr is not None
    command.stderr.readline()
    machine.umount(target)
    command.communicate(timeout=20)
    assert command.returncode == 0
    machine.assert_clean()


def test_nothing_is_fetched_twice_and_a_complete_device_needs_no_fuse(machine: Machine, layout: str):
    target = machine.target()
    machine.mount(f"oci:{layout}:lazy", target)
    assert all(read(target / name) == data for name, data in FILES.items())
    machine.umount(target)
    machine.mount(f"oci:{layout}:lazy", target)
    assert all(read(target / name) == data for name, data in FILES.items())
    counters = machine.statistics()["fetch"]
    assert (counters["requests"], counters["hits"], counters["misses"]) == (0, 0, 0), "the kernel read the cache itself"
    machine.umount(target)
    machine.mount(f"oci:{layout}:lazy", target, "--driver", "fuse")
    assert all(read(target / name) == data for name, data in FILES.items())
    assert machine.statistics()["fetch"]["requests"] == 0
    machine.umount(target)
    machine.assert_clean()


@DRIVERS
def test_the_hot_blob_is_fetched_ahead_unless_told_not_to(machine: Machine, layout: str, driver: str):
    source = f"oci:{Path(layout).parent}/in:app"
    hot = f"oci:{machine.directory}/hot:lazy"
    run_convert(source, hot, prefetch=parse_prefetch(b"f4\nf9\n"))
    target = machine.target()
    machine.mount(hot, target, "--driver", driver)
    deadline = time.monotonic() + 20
    while (count := machine.statistics()["mounts"][0]["prefetched_chunks"]) < 1:    # two files of 400 kB
        assert time.monotonic() < deadline, count
        time.sleep(0.02)
    assert read(target / "f9") == FILES["f9"]
    assert machine.statistics()["fetch"]["misses"] == 0
    machine.umount(target)
    machine.assert_clean()
    machine.lazyfs("mount", hot, target, "--cache-dir", machine.directory / "other", "--no-prefetch")
    assert machine.statistics()["mounts"][0]["prefetched_chunks"] == 0
    assert read(target / "f4") == FILES["f4"]
    machine.umount(target)
    machine.assert_clean()
