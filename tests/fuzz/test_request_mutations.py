"""Hostile requests to what a node listens on: answered or cut off in time, and the next honest one is served."""

from __future__ import annotations

import json
import random
import socket
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from lazyfs.node import protocol
from snapshotter.api import snapshots_pb2 as api
from tests.daemonkit import WAIT_S, Daemon, running_daemon
from tests.fuzz.test_format_mutations import mutate
from tests.mountkit import Machine, require_mounting
from tests.snapshotter.test_service import running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.mount
COUNT = 150                      # a socket; each may cost a connection
REQUESTS: list[dict[str, Any]] = [
    {"op": "list"}, {"op": "stats"}, {"op": "health"}, {"op": "usage", "bootstrap": "sha256:" + "0" * 64},
    {"op": "evict", "quota": "1GiB", "floor": None, "all": False, "dryRun": True},
    {"op": "touched", "target": "/none", "start": 0, "fine": True}, {"op": "rest", "target": "/none"},
    {"op": "unmount", "target": "/none", "lazy": True, "force": False},
    {"op": "mount", "order": {"image": "127.0.0.1:1/a:b", "target": "/none", "driver": "auto", "registry": {}}},
    {"op": "credentials", "entries": [{"host": "a", "repository": "b", "username": "c", "password": "d"}]},
]
HOSTILE = [b"\n", b"null\n", b"[]\n", b'"op"\n', b'{"op": null}\n', b'{"op": {}}\n', b"[" * 200_000 + b"\n",
           b'{"op": "list", "x": ' + b"9" * 100_000 + b"}\n", b"\xff\xfe\n", b'{"op": "\\ud800"}\n', b"x" * (3 << 20),
           *(b'{"op": "upgrade", "settings": %b}\n' % text for text in (
               b'{"hang_s": "x"}', b'{"asked": 5}', b'{"worker": []}', b'{"abort_s": null}', b'{"start_s": {}}'))]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    require_mounting()
    with running_daemon(Machine(tmp_path_factory.mktemp("daemon"))) as made:
        yield made


def exchange(place: Path, data: bytes) -> bytes:
    """What comes back before it is closed; our side says that no more will come."""
    client = socket.socket(socket.AF_UNIX)
    with client:
        client.settimeout(WAIT_S)
        protocol.connect_to(client, place)
        found = b""
        try:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while part := client.recv(1 << 16):
                found += part
        except (BrokenPipeError, ConnectionResetError):
            pass     # cut off: an answer, too
        return found


@pytest.mark.parametrize("name", ["control.sock", "keeper.sock"])
def test_the_control_socket_answers_or_closes(daemon: Daemon, name: str, request: pytest.FixtureRequest) -> None:
    worker, place = daemon.worker(), daemon.directory.root / name
    rng = random.Random(f"lazyfs {name}")
    mutated = [mutate(rng, json.dumps(rng.choice(REQUESTS)).encode()) + b"\n"
               for _ in range(int(COUNT * request.config.getoption("--fuzz")))]
    for data in (*HOSTILE, *mutated):
        for line in exchange(place, data).splitlines():
            assert isinstance(json.loads(line), dict), data[:200]
    status = daemon.status()
    assert status is not None
    assert status["ready"]
    assert status["health"]["ready"]
    assert daemon.worker() == worker
    log = (daemon.machine.directory / "daemon.log").read_text()
    assert "incident" not in log


METHODS: dict[str, Any] = {
    "Prepare": api.PrepareSnapshotRequest(key="a", parent="b", labels={"containerd.io/snapshot.ref": "c"}),
    "View": api.ViewSnapshotRequest(key="a", parent="b"), "Mounts": api.MountsRequest(key="a"),
    "Commit": api.CommitSnapshotRequest(name="n", key="a"), "Remove": api.RemoveSnapshotRequest(key="a"),
    "Stat": api.StatSnapshotRequest(key="a"), "Update": api.UpdateSnapshotRequest(info=api.Info(name="a")),
    "List": api.ListSnapshotsRequest(filters=['name~="a.*"']), "Usage": api.UsageRequest(key="a"),
    "Cleanup": api.CleanupRequest(), "Nothing": api.StatSnapshotRequest(key="a"),
}


def test_the_snapshotter_refuses_with_a_status(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    require_mounting()
    rng = random.Random("lazyfs grpc")
    codes = set()
    with running(tmp_path) as server:
        for garbage in (b"\0" * 100_000, rng.randbytes(50_000), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 9_000,
                        b"GET / HTTP/1.1\r\n\r\n"):
            exchange(server.address, garbage)
        with grpc.insecure_channel(f"unix:{server.address}") as channel:
            for _ in range(int(COUNT * request.config.getoption("--fuzz"))):
                name, message = rng.choice(list(METHODS.items()))
                call = channel.unary_stream(f"/containerd.services.snapshots.v1.Snapshots/{name}",
                                            request_serializer=None, response_deserializer=None)
                codes.add(status_of(call, mutate(rng, message.SerializeToString() or b"\0")))
        label = {"x" * 5000: "y"}
        with pytest.raises(grpc.RpcError) as raised:
            server.stub.Prepare(api.PrepareSnapshotRequest(key="z", labels=label), timeout=WAIT_S)
        assert raised.value.code().name == "INVALID_ARGUMENT"
        assert server.stub.Prepare(api.PrepareSnapshotRequest(key="z"), timeout=WAIT_S).mounts
        assert server.process.poll() is None
        records = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
        assert not [one for one in records if "trace" in one and not one["logger"].startswith("grpc")]
    assert {"OK", "NOT_FOUND"} <= codes
    assert not codes & {"DEADLINE_EXCEEDED", "UNAVAILABLE"}


def status_of(call: Any, data: bytes) -> str:
    try:
        list(call(data, timeout=WAIT_S))
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"
