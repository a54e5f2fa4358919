"""`lazyfs snapshotter` as a process: its socket, its statuses, its end; and many requests at once."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import socket
import stat
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from snapshotter.api import snapshots_pb2 as api
from snapshotter.api.snapshots_pb2_grpc import SnapshotsStub
from snapshotter.door import ADDRESS_BYTES_MAX
from snapshotter.lazyhook import LABEL_BOOTSTRAP
from snapshotter.model import LABEL_REF
from tests.mountkit import LAZYFS
from tests.snapkit import blob_labels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the snapshotter needs root")
WAIT_S = 20.0


@dataclass
class Running:
    process: subprocess.Popen[str]
    address: Path
    stub: Any = None

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT_S)


def start(directory: Path, address: Path | None = None, more: Sequence[str] = (), **environment: str) -> Running:
    address = address or directory / "s.sock"
    words = [*LAZYFS, "snapshotter", "--root", str(directory / "root"), "--address", str(address),
             "--containerd-address", str(directory / "none.sock"), *more]
    with (directory / "log").open("a") as log:
        process = subprocess.Popen(words, env={**os.environ, **environment}, stdout=log, stderr=log, text=True)
    return Running(process, address)


@contextlib.contextmanager
def running(directory: Path, address: Path | None = None, more: Sequence[str] = (),
            **environment: str) -> Iterator[Running]:
    """One that answers, with a client. `more`: options."""
    found = start(directory, address, more, **environment)
    channel = grpc.insecure_channel(f"unix:{found.address}")
    try:
        grpc.channel_ready_future(channel).result(WAIT_S)
        found.stub = SnapshotsStub(channel)
        yield found
    finally:
        channel.close()
        if found.process.poll() is None:
            found.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("snapshotter")) as found:
        yield found


@pytest.fixture(scope="module")
def stub(server: Running) -> Any:
    return server.stub


def code_of(call: Any, request: Any, **options: Any) -> str:
    with pytest.raises(grpc.RpcError) as raised:
        call(request, timeout=WAIT_S, **options)
    assert raised.value.details().isprintable(), "one line"
    return raised.value.code().name


def commit(stub: Any, name: str, parent: str = "", **labels: str) -> None:
    stub.Prepare(api.PrepareSnapshotRequest(key=f"x{name}", parent=parent, labels=labels))
    stub.Commit(api.CommitSnapshotRequest(name=name, key=f"x{name}", labels=labels))


def test_all_ten_calls(stub: Any) -> None:
    commit(stub, "t/base", label="1")
    mounts = stub.Prepare(api.PrepareSnapshotRequest(key="t/a", parent="t/base")).mounts
    assert [mount.type for mount in mounts] == ["overlay"]
    assert stub.Mounts(api.MountsRequest(key="t/a")).mounts == mounts
    assert stub.View(api.ViewSnapshotRequest(key="t/v", parent="t/base")).mounts[0].options == ["ro", "rbind"]
    before = time.time()
    info = stub.Stat(api.StatSnapshotRequest(key="t/base")).info
    assert (info.name, info.kind, dict(info.labels)) == ("t/base", api.COMMITTED, {"label": "1"})
    assert before - 60 < info.created_at.ToNanoseconds() / 1e9 <= time.time()
    request = api.UpdateSnapshotRequest(info=api.Info(name="t/base", labels={"label": "2", "other": "3"}))
    request.update_mask.paths.append("labels.label")
    assert dict(stub.Update(request).info.labels) == {"label": "2"}
    filters = ["parent==t/base,kind==view", "name==t/base"]
    listed = [info.name for page in stub.List(api.ListSnapshotsRequest(filters=filters)) for info in page.info]
    assert listed == ["t/base", "t/v"]
    assert stub.Usage(api.UsageRequest(key="t/a")).inodes == 1
    for key in ("t/a", "t/v", "t/base"):
        stub.Remove(api.RemoveSnapshotRequest(key=key))
    stub.Cleanup(api.CleanupRequest())


def test_refusals_have_the_status_that_containerd_knows(stub: Any) -> None:
    commit(stub, "r/base")
    stub.Prepare(api.PrepareSnapshotRequest(key="r/a", parent="r/base"))
    assert code_of(stub.Stat, api.StatSnapshotRequest(key="r/none")) == "NOT_FOUND"
    assert code_of(stub.Prepare, api.PrepareSnapshotRequest(key="r/a")) == "ALREADY_EXISTS"
    assert code_of(stub.Prepare, api.PrepareSnapshotRequest(key="r/b", parent="r/none")) == "NOT_FOUND"
    assert code_of(stub.Prepare, api.PrepareSnapshotRequest(key="r/b", parent="r/a")) == "INVALID_ARGUMENT"
    assert code_of(stub.Remove, api.RemoveSnapshotRequest(key="r/base")) == "FAILED_PRECONDITION"
    assert code_of(stub.Mounts, api.MountsRequest(key="r/base")) == "FAILED_PRECONDITION"
    long = {"key": "v" * 4094}
    assert code_of(stub.Prepare, api.PrepareSnapshotRequest(key="r/b", labels=long)) == "INVALID_ARGUMENT"
    assert code_of(lambda request, **options: list(stub.List(request, **options)),
                   api.ListSnapshotsRequest(filters=["name=="])) == "INVALID_ARGUMENT"
    assert code_of(stub.Prepare, api.PrepareSnapshotRequest(key="r/c\n", parent="a\nb")) == "NOT_FOUND"


def test_a_lazy_layer_exists_already(stub: Any) -> None:
    request = api.PrepareSnapshotRequest(key="l/x", labels=blob_labels("sha256:l"))
    assert code_of(stub.Prepare, request) == "ALREADY_EXISTS"
    listed = [info for page in stub.List(api.ListSnapshotsRequest(
        filters=[f'labels."{LABEL_REF}"=="sha256:l",parent==""'])) for info in page.info]
    assert [(info.name, info.kind) for info in listed] == [("sha256:l", api.COMMITTED)]


def test_no_daemon_is_unavailable(stub: Any) -> None:
    labels = {LABEL_REF: "sha256:m", LABEL_BOOTSTRAP: "sha256:" + "0" * 64}
    commit(stub, "m/image", **labels)
    assert code_of(stub.Prepare, api.PrepareSnapshotRequest(key="m/c", parent="m/image")) == "UNAVAILABLE"


def test_the_namespace_header_is_not_looked_at(stub: Any) -> None:
    metadata = (("containerd-namespace", "other"),)
    stub.Prepare(api.PrepareSnapshotRequest(key="default/1/header"), metadata=metadata)
    assert stub.Stat(api.StatSnapshotRequest(key="default/1/header")).info.name == "default/1/header"


def test_a_long_list_comes_in_pages(stub: Any) -> None:
    labels = {f"l{number}": "v" * 4000 for number in range(5)}
    for number in range(130):
        stub.Prepare(api.PrepareSnapshotRequest(key=f"p/{number}", labels=labels))
    pages = list(stub.List(api.ListSnapshotsRequest(filters=["name~=^p/"])))
    assert len(pages) > 1
    assert sum(len(page.info) for page in pages) == 130


def test_a_hundred_at_once(server: Running) -> None:
    stub, root = server.stub, server.address.parent / "root" / "snapshots"
    commit(stub, "h/base")
    before = {path.name for path in root.iterdir()}

    def one(number: int) -> int:
        key = f"h/{number}"
        stub.Prepare(api.PrepareSnapshotRequest(key=key, parent="h/base"), timeout=60)
        with contextlib.suppress(grpc.RpcError):
            stub.Prepare(api.PrepareSnapshotRequest(key="h/same", parent="h/base"), timeout=60)
        mounts = stub.Mounts(api.MountsRequest(key=key), timeout=60).mounts
        stub.Cleanup(api.CleanupRequest(), timeout=60)
        if number % 2:
            stub.Remove(api.RemoveSnapshotRequest(key=key), timeout=60)
        return len(mounts)

    with concurrent.futures.ThreadPoolExecutor(25) as pool:
        assert list(pool.map(one, range(100))) == [1] * 100
    stub.Cleanup(api.CleanupRequest())
    left = {path.name for path in root.iterdir()} - before
    assert len(left) == 51, "50 and the one that all wanted"
    for number in range(0, 100, 2):
        assert stub.Mounts(api.MountsRequest(key=f"h/{number}")).mounts
        stub.Remove(api.RemoveSnapshotRequest(key=f"h/{number}"))
    stub.Remove(api.RemoveSnapshotRequest(key="h/same"))
    stub.Cleanup(api.CleanupRequest())
    assert {path.name for path in root.iterdir()} == before


def test_the_socket_is_for_root_only(server: Running) -> None:
    status = server.address.stat()
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600


def test_a_second_one_is_refused_and_harms_nothing(server: Running, tmp_path: Path) -> None:
    same_root = start(server.address.parent, tmp_path / "other.sock")
    assert same_root.process.wait(WAIT_S) == 42
    same_socket = start(tmp_path, server.address)
    assert same_socket.process.wait(WAIT_S) == 42
    assert "somebody answers" in (tmp_path / "log").read_text()
    assert server.stub.List(api.ListSnapshotsRequest(), timeout=WAIT_S)
    assert server.address.exists()


def test_a_socket_that_a_killed_one_left_is_replaced(tmp_path: Path) -> None:
    with running(tmp_path) as first:
        commit(first.stub, "base")
        first.process.kill()
        first.process.wait(WAIT_S)
        assert first.address.exists()
    with running(tmp_path) as second:
        assert second.stub.Stat(api.StatSnapshotRequest(key="base")).info.kind == api.COMMITTED


def test_it_ends_well_on_sigterm_and_removes_its_socket(tmp_path: Path) -> None:
    with running(tmp_path) as found:
        commit(found.stub, "base")
        assert found.stop() == 0
        assert not found.address.exists()
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_socket_paths_up_to_the_limit(tmp_path: Path) -> None:
    long = Path("/tmp") / ("x" * (ADDRESS_BYTES_MAX - len("/tmp/") - 1))
    try:
        with running(tmp_path, long) as found:
            assert list(found.stub.List(api.ListSnapshotsRequest())) == []
    finally:
        long.unlink(missing_ok=True)
    too_long = start(tmp_path, Path(f"{long}yy"))
    assert too_long.process.wait(WAIT_S) == 2
    assert "shorter" in (tmp_path / "log").read_text()


def test_it_does_not_replace_what_is_no_socket(tmp_path: Path) -> None:
    (tmp_path / "s.sock").write_text("precious")
    assert start(tmp_path).process.wait(WAIT_S) == 2
    assert (tmp_path / "s.sock").read_text() == "precious"


def test_systemd_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(WAIT_S)
        with running(tmp_path, NOTIFY_SOCKET=str(tmp_path / "notify")) as found:
            assert listener.recv(100) == b"FDSTORE=1\nFDNAME=snapshotter\nFDPOLL=0"
            assert listener.recv(100) == b"READY=1"
            found.stop()
            assert listener.recv(100) == b"STOPPING=1"
