"""Whatever happens to `lazyfs profile run`: nothing stays on the machine; at the latest the next one takes it away."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import FormatError
from lazyfs.fs import mountapi
from lazyfs.node.rundir import ProcessIdentity, WorkerDir
from lazyfs.runner import rootfs, workspace
from lazyfs.runner.probe import Probe
from lazyfs.runner.rootfs import read_inside
from lazyfs.runner.rules import StopRules, parse_http
from tests.mountkit import Machine
from tests.runnerkit import Profiler, profiled_image, require_runc, wait_said
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.mount
WAIT_S = 30.0
# It heeds no signal but SIGKILL, and has a child that outlives it wherever there is no PID namespace.
STUBBORN = ("--until-log", "never", "--grace", "200ms", "--", "sh", "-c",
            "trap '' TERM INT HUP; sleep 1000 & echo up; while :; do sleep 0.1; done")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    require_runc()
    return profiled_image(tmp_path_factory.mktemp("profiled"))


@pytest.fixture
def profiler(image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Profiler]:
    made = Profiler(Machine(tmp_path), image)
    monkeypatch.setenv("LAZYFS_RUN_DIR", str(made.machine.run_dir))   # for sweep()
    yield made
    workspace.sweep()
    made.assert_nothing_left()


def started(profiler: Profiler, *words: str) -> tuple[subprocess.Popen[str], Path]:
    """A call whose program is up, and its workspace."""
    process = profiler.start(*(words or STUBBORN))
    wait_said(process, "| up")
    place = profiler.workspace(process.pid)
    assert place is not None
    return process, place


def init_of(place: Path) -> int:
    return int((place / "1" / "pid").read_text())


def wait_until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_signal_ends_it_in_order(profiler: Profiler, number: signal.Signals, code: int) -> None:
    process, place = started(profiler)
    init = init_of(place)
    process.send_signal(number)
    out, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == code, said
    assert not out
    assert not ProcessIdentity.of(init)
    profiler.assert_nothing_left()


def test_a_second_signal_does_not_cut_the_clean_up_short(profiler: Profiler) -> None:
    process, _ = started(profiler)
    process.send_signal(signal.SIGINT)
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    profiler.assert_nothing_left()


def test_what_a_killed_call_left_goes_with_the_next_one(profiler: Profiler) -> None:
    process, place = started(profiler)
    init = init_of(place)
    process.kill()
    process.communicate(timeout=WAIT_S)
    assert place.exists()
    assert ProcessIdentity.of(init), "the container goes on: nobody was left to end it"
    done = profiler.run("--", "true")
    assert "bin/busybox" in done.paths
    assert not ProcessIdentity.of(init)
    profiler.assert_nothing_left()


def test_a_half_made_run_directory_goes_too(profiler: Profiler) -> None:
    place = workspace.BASE / f"lazyfs-profile-{os.getpid()}-1-00000000"    # of a process that was: not that old, we
    place.mkdir(mode=0o700)
    WorkerDir.of_cache(str(place / "cache")).root.mkdir(parents=True)
    assert workspace.sweep() == []
    assert not place.exists()
    profiler.assert_nothing_left()


@pytest.mark.parametrize("moment", ["workspace", "mounted", "overlay", "runc", "cgroup"])
def test_killed_at_any_moment_of_its_start(profiler: Profiler, moment: str) -> None:
    process = profiler.start(*STUBBORN)
    name = f"lazyfs-profile-{process.pid}-"

    def mounted(kind: str) -> bool:
        return any(name in entry.target and entry.fs_type == kind for entry in mountapi.mounts())

    reached = {
        "workspace": lambda: profiler.workspace(process.pid) is not None,
        "mounted": lambda: mounted("erofs"),
        "overlay": lambda: mounted("overlay"),
        "runc": lambda: any((profiler.workspace(process.pid) or Path("/none")).glob("runc/*")),
        "cgroup": lambda: any(item.startswith("cgroup") for item in profiler.left()),
    }[moment]
    wait_until(reached, moment)
    process.kill()
    process.communicate(timeout=WAIT_S)
    assert workspace.sweep() == []
    profiler.assert_nothing_left()


def test_a_killed_worker_fails_the_program_and_leaves_nothing(profiler: Profiler) -> None:
    script = "echo up; while cat /data/f4 >/dev/null; do :; done; echo cannot read; exit 5"
    process, _ = started(profiler, "--", "sh", "-c", "echo up; until [ -e /gone ]; do sleep 0.1; done; " + script)
    worker = profiler.machine.worker()
    assert worker is not None
    os.kill(worker.pid, signal.SIGKILL)
    place = profiler.workspace(process.pid)
    assert place is not None
    (place / "1" / "bundle" / "rootfs" / "gone").touch()
    _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode != 0
    assert "Traceback" not in said
    profiler.assert_nothing_left()


def test_a_killed_runc_is_a_failure_and_its_container_ends(profiler: Profiler) -> None:
    process, place = started(profiler)
    init = init_of(place)
    (runc,) = workspace._runc_processes(place)
    os.kill(runc, signal.SIGKILL)
    _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 60, said
    assert not ProcessIdentity.of(init)
    profiler.assert_nothing_left()


def test_a_flood_of_output_neither_blocks_the_program_nor_fills_memory(profiler: Profiler) -> None:
    script = "i=0; while [ $i -lt 40 ]; do cat /data/f0; i=$((i+1)); done; echo; echo flooded"
    done = profiler.run("--quiet", "--until-log", "^flooded$", "--", "sh", "-c", script)
    assert "its output matched" in done.said


def test_an_image_cannot_lead_us_out_of_itself(tmp_path: Path) -> None:
    """Users are looked up in files that are links to anywhere; a run is by the numbers in the image, or refused."""
    require_runc()
    outside = tmp_path / "passwd"
    outside.write_text("evil:x:0:0::/:\n")
    for number, target in enumerate((str(outside), "../" * 10 + str(outside), "/proc/self/cwd/passwd")):
        hostile = TarBuilder().directory("etc").file("etc/.wh.passwd", b"").symlink("etc/passwd", target)
        directory = tmp_path / str(number)
        directory.mkdir()
        profiler = Profiler(Machine(directory), profiled_image(directory, hostile))
        done = profiler.run("--user", "evil", code=10)
        assert "'evil' is not in the image" in done.said
        profiler.assert_nothing_left()


def test_files_that_are_none_are_not_read(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (root / "etc" / "file").write_text("inside")
    (root / "etc" / "absolute").symlink_to("/etc/file")
    (root / "etc" / "up").symlink_to("../../../../etc/file")
    (root / "etc" / "out").symlink_to(tmp_path / "secret")
    (root / "etc" / "loop").symlink_to("loop")
    (root / "etc" / "directory").mkdir()
    os.mkfifo(root / "etc" / "fifo")
    for name in ("file", "absolute", "up"):
        assert read_inside(root, f"/etc/{name}", 100) == b"inside"
    for name in ("out", "loop", "directory", "fifo", "none"):
        assert read_inside(root, f"/etc/{name}", 100) is None
    with pytest.raises(FormatError):
        read_inside(root, "/etc/file", 3)


def test_a_walk_that_a_mount_elsewhere_disturbed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel says EAGAIN when anything is mounted or renamed on the machine while it walks over a `..`."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "file").write_text("inside")
    real, calls = rootfs.openat2, []

    def disturbed(directory: int, path: bytes, how: bytes) -> int:
        calls.append(path)
        if len(calls) < 3:
            ctypes.set_errno(errno.EAGAIN)
            return -1
        return real(directory, path, how)

    monkeypatch.setattr(rootfs, "openat2", disturbed)
    assert read_inside(tmp_path, "/etc/file", 100) == b"inside"
    monkeypatch.setattr(rootfs, "_DISTURBED_S", 0.0)
    calls.clear()
    with pytest.raises(BlockingIOError):
        read_inside(tmp_path, "/etc/file", 100)


def test_only_our_own_directories_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "BASE", tmp_path)
    dead = "lazyfs-profile-999999999-1-00000000"
    alive = ProcessIdentity.of(os.getpid())
    assert alive is not None
    kept = [f"lazyfs-profile-{alive.pid}-{alive.start_ticks}-{alive.boot_id[:8]}", "lazyfs-profile-mine", "other"]
    for name in (dead, *kept):
        (tmp_path / name).mkdir(mode=0o700)
    foreign = tmp_path / "lazyfs-profile-999999998-1-00000000"
    foreign.mkdir(mode=0o755)
    os.chown(foreign, 65534, 65534)
    link = tmp_path / "lazyfs-profile-999999997-1-00000000"
    link.symlink_to(tmp_path / "other")
    assert workspace.sweep() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, foreign.name, link.name])
    assert stat.S_ISLNK(link.lstat().st_mode)


def test_a_server_that_never_answers_does_not_hold_the_probe(tmp_path: Path) -> None:
    (tmp_path / "pid").write_text(str(os.getpid()))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(WAIT_S)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        probe = Probe(StopRules(http=parse_http(url)), tmp_path / "pid", own_network=False)
        asked, _ = server.accept()
        with asked:
            asked.settimeout(WAIT_S)
            assert asked.recv(1000).startswith(b"GET / HTTP/1.1\r\n")
            probe.close()
            assert asked.recv(1000) == b"", "it has hung up"
    assert not probe._thread.is_alive()
    assert not probe.met


def test_a_server_that_talks_nonsense_is_asked_again(tmp_path: Path) -> None:
    (tmp_path / "pid").write_text(str(os.getpid()))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(WAIT_S)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x?y"
        with Probe(StopRules(http=parse_http(url)), tmp_path / "pid", own_network=False) as probe:
            for answer in (b"", b"\0\xff nonsense\r\n\r\n", b"HTTP/1.1 503 No\r\n\r\n", b"HTTP/1.1 302 Yes\r\n\r\n"):
                asked, _ = server.accept()
                with asked:
                    asked.settimeout(WAIT_S)
                    assert b"/x?y" in asked.recv(1000)
                    asked.sendall(answer)
            assert select.select([probe.reader], [], [], WAIT_S)[0]
            assert probe.met == f"{url} answers 302"


def test_a_network_that_cannot_be_entered_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pid").write_text(str(os.getpid()))
    monkeypatch.setattr("lazyfs.runner.probe._CLONE_NEWNET", 0x20000000)   # another kind of namespace: EINVAL
    with Probe(StopRules(port=1), tmp_path / "pid", own_network=True) as probe:
        assert select.select([probe.reader], [], [], WAIT_S)[0]
        assert "cannot enter the container's network" in probe.problem
        assert not probe.met


def test_what_cannot_be_taken_away_is_told_and_goes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "BASE", tmp_path)
    with workspace.open_workspace() as place:
        stuck = place.top / "stuck"
        stuck.touch()
        if subprocess.run(["chattr", "+i", stuck], check=False, capture_output=True).returncode:
            pytest.skip("this file system has no immutable files")
    try:
        assert place.left == [f"files in {place.top}"]
    finally:
        subprocess.run(["chattr", "-i", stuck], check=True)
    assert place.clear() == []
    assert not place.top.exists()
