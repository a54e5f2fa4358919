"""Records, orders, targets and the control protocol, without mounts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from lazyfs.cache.inventory import ImageRecord
from lazyfs.cli.mount import absolute_image
from lazyfs.errors import BugError, CacheOwnedError, DeadlineError, LazyfsError, TargetError, UsageError
from lazyfs.image import manifest
from lazyfs.image.digest import Digest
from lazyfs.node import control, opening, protocol, rundir, seed
from lazyfs.node.holders import describe_holders
from lazyfs.node.order import MountOrder
from lazyfs.node.rundir import MountRecord, ProcessIdentity, WorkerDir
from lazyfs.node.touches import Touches
from lazyfs.node.unmount import check_target, clean_and_remove, resolve_target


@pytest.fixture(autouse=True)
def _run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYFS_RUN_DIR", str(tmp_path / "run"))


def record(target: str, slot: int, identity: ProcessIdentity) -> MountRecord:
    return MountRecord(target, "image", "erofs", "sha256:" + "0" * 64, "/cache", slot, identity.pid,
                       identity.start_ticks, identity.boot_id)


def me() -> ProcessIdentity:
    identity = ProcessIdentity.of(os.getpid())
    assert identity is not None
    return identity


def test_a_process_is_known_by_more_than_its_pid():
    mine = me()
    assert mine.alive
    assert not ProcessIdentity(mine.pid, mine.start_ticks + 1, mine.boot_id).alive
    assert not ProcessIdentity(mine.pid, mine.start_ticks, "other-boot").alive
    assert ProcessIdentity.of(2**22 + 5) is None


def test_a_process_that_has_ended_but_is_not_collected_is_dead():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert ProcessIdentity.of(child) is None
    os.waitpid(child, 0)


def test_records_are_written_found_and_removed(tmp_path: Path):
    directory = WorkerDir.of_cache("/cache")
    directory.create()
    directory.write_record(record("/a", 1, me()))
    directory.write_record(record("/a", 2, ProcessIdentity(me().pid, 1, "x")))
    (directory.mounts / "3.json").write_text("{ torn")
    (directory.mounts / "4.json").write_text('["list"]')
    (directory.mounts / "5.json").write_text('{"target": "/b"}')
    assert [entry.slot for entry in directory.records()] == [1, 2]
    found = rundir.find_record("/a")
    assert found is not None
    assert found[1].slot == 1, "the live worker's record counts"
    directory.remove()
    assert directory.root.exists(), "records are left"
    for path in directory.mounts.iterdir():
        path.unlink()
    directory.remove()
    assert not directory.root.exists()


def test_one_lock_holder_at_a_time_also_across_removal():
    directory = WorkerDir.of_cache("/cache")
    first = directory.try_lock()
    assert first is not None
    assert directory.try_lock() is None
    directory.remove()
    second = directory.try_lock()    # a new directory, a new lock
    assert second is not None
    os.close(first)
    os.close(second)


@pytest.mark.parametrize(("image", "expected"), [
    ("oci:dir:tag", "oci:/cwd/dir:tag"), ("oci:/abs:tag", "oci:/abs:tag"), ("oci-archive:x", "oci-archive:/cwd/x"),
    ("docker://h/r:t", "docker://h/r:t"), ("h:1/r:t", "h:1/r:t"), ("docker-archive:./a", "docker-archive:/cwd/./a"),
])
def test_relative_image_paths_are_made_absolute(image: str, expected: str):
    assert absolute_image(image, "/cwd") == expected


def test_the_seed_looks_for_the_annotation_that_bootstraps_have():
    assert seed.BOOTSTRAP_KEY == manifest.BOOTSTRAP_KEY


def test_a_starter_begins_without_numpy_and_trio():
    code = "import sys, lazyfs.node.seed, lazyfs.node.launch; sys.exit('numpy' in sys.modules or 'trio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_orders_travel_and_are_checked():
    order = MountOrder("i", "/t", registry={"password": "secret"}, layer=("d", 1, 2))
    assert MountOrder.from_json(json.loads(json.dumps(order.to_json()))) == order
    assert "secret" not in repr(order)
    for bad in ({"image": "i"}, {"image": "i", "target": "relative"}, {"image": "i", "target": "/t", "driver": "nfs"},
                {"image": "i", "target": "/t", "read_timeout_s": 0}, {"image": "i", "target": "/t", "extra": 1}):
        with pytest.raises(UsageError):
            MountOrder.from_json(bad)


def test_targets_are_checked(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("x")
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").touch()
    for path, text in ((tmp_path / "missing", "does not exist"), (file, "not a directory"), (full, "not empty"),
                       (Path("/proc"), "mount point already"), (file / "below", "file")):
        with pytest.raises(TargetError, match=text):
            check_target(str(path))
    empty = tmp_path / "empty"
    empty.mkdir()
    check_target(str(empty))


def test_targets_are_resolved_without_the_last_step(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "loop").symlink_to("loop")
    real = os.path.realpath(tmp_path / "real")
    assert resolve_target(str(tmp_path / "link")) == real
    assert resolve_target(str(tmp_path / "link" / ".." / "real") + "/") == real
    assert resolve_target("/") == "/"
    resolve_target(str(tmp_path / "loop"))   # ends


def test_holders_are_named(tmp_path: Path):
    with (tmp_path / "open").open("w"):
        assert str(os.getpid()) in describe_holders(str(tmp_path))
    assert describe_holders(str(tmp_path / "nothing")) == ""


class FakeObserver:
    def statistics(self) -> dict[str, Any]:
        return {"x": 1}

    def dump(self) -> dict[str, Any]:
        return {"lines": ["here"]}

    async def snapshot(self) -> dict[str, Any]:
        return {"ready": True}

    def trace(self, after: int, over_s: float) -> dict[str, Any]:
        return {"after": after, "over": over_s}


class FakeWorker:
    """What control needs of a worker."""

    def __init__(self) -> None:
        self.closing = False
        self.unmounted: list[str] = []
        self.cancelled = 0
        self.block = False
        self.touches = Touches(lambda _: None)
        self.observer = FakeObserver()

    async def mount(self, order: MountOrder, *, ensure: bool) -> dict[str, Any]:
        if self.block:
            try:
                await trio.sleep_forever()
            finally:
                self.cancelled += 1
        if order.target == "/raise":
            raise TargetError("no", hint="h")
        if order.target == "/bug":
            raise KeyError("x")
        return {"target": order.target}

    async def unmount(self, target: str, *, lazy: bool, force: bool) -> dict[str, Any]:
        self.unmounted.append(target)
        return {"lazy": lazy, "force": force}

    def list_mounts(self) -> list[dict[str, Any]]:
        return []

    def health(self) -> dict[str, Any]:
        return {"ready": True}

    def shut_down(self) -> None:
        self.closing = True


def serve(worker: FakeWorker, client: Any) -> None:
    """Run `client(path)` in a thread against a control server."""
    path = Path(os.environ["LAZYFS_RUN_DIR"]) / ("long" * 30) / "control.sock"
    path.parent.mkdir(parents=True)

    async def main() -> None:
        listener = control.listen(path)
        async with trio.open_nursery() as nursery:
            async def accept() -> None:
                while True:
                    nursery.start_soon(control.serve_connection, await listener.accept(), worker)

            nursery.start_soon(accept)
            with trio.fail_after(20):
                await trio.to_thread.run_sync(client, path)
                await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
        await listener.aclose()

    trio.run(main)


def test_requests_are_answered_in_order_and_errors_travel():
    worker = FakeWorker()

    def client(path: Path) -> None:
        assert path.stat().st_mode & 0o777 == 0o600
        with protocol.ControlClient.connect(path) as connection:
            order = MountOrder("i", "/t")
            assert connection.request("mount", 5, order=order.to_json()) == {"target": "/t"}
            assert connection.request("stats", 5) == {"x": 1}
            assert connection.request("list", 5) == []
            assert connection.request("status", 5) == {"ready": True}
            assert connection.request("dump", 5) == {"lines": ["here"]}
            assert connection.request("trace", 5, after=3, over=0.5) == {"after": 3, "over": 0.5}
            for wrong in ({"after": "x"}, {"after": []}, {"over": {}}, {"after": float("inf")}):
                with pytest.raises(UsageError):
                    connection.request("trace", 5, **wrong)
            with pytest.raises(TargetError, match="no") as info:
                connection.request("mount", 5, order={**order.to_json(), "target": "/raise"})
            assert info.value.hint == "h"
            with pytest.raises(BugError, match="KeyError"):
                connection.request("mount", 5, order={**order.to_json(), "target": "/bug"})
            with pytest.raises(UsageError):
                connection.request("dance", 5)
            assert connection.request("unmount", 5, target="/t", lazy=True) == {"lazy": True, "force": False}
            assert connection.request("shutdown", 5) is True
            with pytest.raises(protocol.WorkerGoneError):
                connection.request("list", 5)

    serve(worker, client)


def test_a_client_that_goes_cancels_its_request():
    worker = FakeWorker()
    worker.block = True

    def client(path: Path) -> None:
        with protocol.ControlClient.connect(path) as connection, pytest.raises(DeadlineError):
            connection.request("mount", 0.2, order=MountOrder("i", "/t").to_json())

    serve(worker, client)
    assert worker.cancelled == 1


def test_an_attached_mount_ends_with_its_connection():
    worker = FakeWorker()

    def client(path: Path) -> None:
        with protocol.ControlClient.connect(path) as connection:
            connection.request("mount", 5, order=MountOrder("i", "/t").to_json(), attached=True)
            assert worker.unmounted == []
        with protocol.ControlClient.connect(path) as connection:
            connection.request("mount", 5, order=MountOrder("i", "/u").to_json())

    serve(worker, client)
    assert worker.unmounted == ["/t"]


@pytest.mark.parametrize("line", [b"\n", b"nonsense\n", b"[]\n", b'{"op": 3}\n', b'{"op": "mount"}\n', b"\xff\n",
                                  b'{"op": "mount", "order": {"image": 1}}\n'])
def test_malformed_lines_are_answered_with_an_error(line: bytes, caplog: pytest.LogCaptureFixture):
    answers = []

    def client(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            directory = os.open(path.parent, os.O_PATH)
            connection.connect(f"/proc/self/fd/{directory}/{path.name}")
            os.close(directory)
            connection.sendall(line)
            answers.append(json.loads(connection.makefile().readline()))

    serve(FakeWorker(), client)
    assert "error" in answers[0]


def test_no_worker_is_told_as_such(tmp_path: Path):
    with pytest.raises(protocol.WorkerGoneError):
        protocol.ControlClient.connect(tmp_path / "none.sock")
    dead = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(dead))
    with pytest.raises(protocol.WorkerGoneError):
        protocol.ControlClient.connect(dead)


def test_a_worker_that_never_answers_is_a_deadline():
    ours, theirs = socket.socketpair()
    client = protocol.ControlClient(ours)
    with theirs, pytest.raises(DeadlineError):
        client.request("list", 0.1)
    client.close()


def test_a_directory_that_its_last_worker_just_removes_is_locked_by_somebody_else(monkeypatch) -> None:
    directory = WorkerDir.of_cache("/cache")
    lock = directory.try_lock()
    assert lock is not None
    os.close(lock)
    monkeypatch.setattr(WorkerDir, "create", WorkerDir.remove)    # of another process, after our create()
    assert directory.try_lock() is None


def test_a_worker_that_ends_before_it_is_asked_is_heard(tmp_path: Path) -> None:
    """As one that may not have its cache directory: it says so while its starter is still busy elsewhere."""
    ours, theirs = socket.socketpair()
    theirs.sendall(b'{"error": {"kind": "CacheOwnedError", "message": "in use by process 1", "hint": "stop it"}}\n')
    theirs.close()
    with protocol.ControlClient(ours) as client, pytest.raises(CacheOwnedError, match="process 1"):
        client.request(protocol.MOUNT, 5, order={"x": "y" * 1000})
    ours, theirs = socket.socketpair()
    theirs.close()
    with protocol.ControlClient(ours) as client, pytest.raises(protocol.WorkerGoneError):
        client.request(protocol.LIST, 5)


# --- files in the cache directory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [None, 0, opening._COMPARE_BYTES, 2 * opening._COMPARE_BYTES + 4])
def test_a_file_holds_what_was_written_to_it_or_it_does_not(tmp_path: Path, at: int | None) -> None:
    data = bytearray(range(256)) * (2 * opening._COMPARE_BYTES // 256) + b"tail!"
    (tmp_path / "file").write_bytes(data)
    if at is not None:
        data[at] ^= 1
    mapped = opening._map_holding(tmp_path / "file", bytes(data))
    assert (mapped is not None) == (at is None)
    assert opening._map_holding(tmp_path / "file", bytes(data[:-1])) is None


def test_two_mounts_of_one_image_may_write_its_files_at_the_same_time(tmp_path: Path) -> None:
    path, problems = tmp_path / "cache" / "images" / f"{'a' * 64}.erofs", []
    path.parent.mkdir(parents=True)

    def write() -> None:
        for _ in range(50):
            try:
                opening._write_file(path, bytes(100_000))
                ImageRecord("app", ()).write(tmp_path / "cache", Digest("sha256:" + "a" * 64))
            except LazyfsError as error:
                problems.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert sorted(one.name for one in path.parent.iterdir()) == [f"{'a' * 64}.erofs", f"{'a' * 64}.json"]


def test_what_a_killed_starter_half_made_is_removed_and_nothing_is_made_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZYFS_RUN_DIR", str(tmp_path / "run"))
    directory = WorkerDir.of_cache("/cache")
    assert clean_and_remove(directory) == []
    assert not (tmp_path / "run").exists()
    directory.root.mkdir(parents=True)
    assert clean_and_remove(directory) == []
    assert list((tmp_path / "run").iterdir()) == []
