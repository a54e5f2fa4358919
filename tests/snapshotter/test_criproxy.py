"""The proxy of CRI's image service: what passes through it, what it keeps. Behind it is a gRPC server of the test."""

from __future__ import annotations

import base64
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from lazyfs.registry.options import Secret
from snapshotter.api.cri_pb2 import AuthConfig, ImageSpec, PullImageRequest
from snapshotter.credentials import pulled as pulled_module
from snapshotter.credentials.criproxy import ImageServiceProxy
from snapshotter.credentials.pulled import Pulled, PulledCredentials, pulled_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

V1 = "/runtime.v1.ImageService/"
UNKNOWN_FIELD = b"\xba\x3e\x05hello"       # field 999, five bytes: of a version to come


@dataclass
class Containerd(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers every call with what it was sent, and what `answer` says; keeps what it saw."""

    calls: list[tuple[str, bytes, dict[str, str]]] = field(default_factory=list)
    answer: Callable[[bytes, Any], bytes] = lambda request, _: b"answer to " + request

    def service(self, details: Any) -> Any:
        def unary(request: bytes, context: Any) -> bytes:
            self.calls.append((details.method, request, dict(context.invocation_metadata())))
            return self.answer(request, context)

        def stream(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
            for request in requests:
                self.calls.append((details.method, request, dict(context.invocation_metadata())))
                yield from (b"one", b"two")

        if details.method.endswith("Stream"):
            return grpc.stream_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)


@dataclass
class World:
    containerd: Containerd
    back: grpc.Server
    channel: grpc.Channel
    noted: list[Pulled]
    socket: Path

    def call(self, name: str, request: bytes, **more: Any) -> bytes:
        answer: bytes = self.channel.unary_unary(name)(request, timeout=20, **more)
        return answer

    def pull(self, image: str, extra: bytes = b"", **auth: str) -> bytes:
        message = PullImageRequest(image=ImageSpec(image=image), auth=AuthConfig(**auth) if auth else None)
        return self.call(V1 + "PullImage", message.SerializeToString() + extra)


def start_server(socket: Path, threads: int, handler: Any) -> grpc.Server:
    server = grpc.server(ThreadPoolExecutor(threads))
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    return server


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    containerd, noted = Containerd(), list[Pulled]()
    back = start_server(tmp_path / "c.sock", 8, containerd)
    proxy = ImageServiceProxy(str(tmp_path / "c.sock"), noted.append)
    front = grpc.server(ThreadPoolExecutor(1))     # as many as the snapshotter may have for itself
    proxy.add_to(front)
    front.add_insecure_port(f"unix:{tmp_path / 's.sock'}")
    front.start()
    with grpc.insecure_channel(f"unix:{tmp_path / 's.sock'}") as channel:
        made = World(containerd, back, channel, noted, tmp_path / "s.sock")
        yield made
    front.stop(0).wait(10)
    proxy.close()
    made.back.stop(0).wait(10)


@pytest.mark.parametrize("name", ["ListImages", "ImageStatus", "PullImage", "RemoveImage", "ImageFsInfo", "NewCall"])
@pytest.mark.parametrize("service", ["runtime.v1", "runtime.v1alpha2"])
def test_every_call_passes_unchanged(world: World, service: str, name: str) -> None:
    method = f"/{service}.ImageService/{name}"
    request = b"\x01 not even protobuf \xff" + bytes(100_000)
    assert world.call(method, request, metadata=[("x-key", "value")]) == b"answer to " + request
    ((seen, got, metadata),) = world.containerd.calls
    assert (seen, got, metadata["x-key"]) == (method, request, "value")
    assert world.noted == []


def test_calls_that_stream_pass_too(world: World) -> None:
    method = V1 + "SomethingStream"
    assert list(world.channel.stream_stream(method)(iter([b"a", b"b"]))) == [b"one", b"two"] * 2
    assert [request for _, request, _ in world.containerd.calls] == [b"a", b"b"]


def test_other_services_are_not_ours(world: World) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        world.call("/runtime.v1.RuntimeService/Version", b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert world.containerd.calls == []


def test_a_pulls_credentials_are_noted_and_its_bytes_are_kept(world: World) -> None:
    world.pull("reg.example:5000/team/app:1", UNKNOWN_FIELD, username="kim", password="hunter2")
    ((_, request, _),) = world.containerd.calls
    assert request.endswith(UNKNOWN_FIELD)
    (found,) = world.noted
    assert (found.host, found.repository, found.username) == ("reg.example:5000", "team/app", "kim")
    assert found.password.reveal() == "hunter2"
    assert "hunter2" not in repr(found)
    assert "kim" not in repr(found)


def test_a_refusal_passes_with_its_details(world: World) -> None:
    def refuse(_: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\x08\x05details"), ("x-why", "because")))
        context.abort(grpc.StatusCode.NOT_FOUND, "no such image")
        raise AssertionError

    world.containerd.answer = refuse
    with pytest.raises(grpc.RpcError) as caught:
        world.pull("reg.example/app:1", username="kim", password="hunter2")
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, "no such image")
    trailing = dict(caught.value.trailing_metadata())
    assert (trailing["grpc-status-details-bin"], trailing["x-why"]) == (b"\x08\x05details", "because")


def test_containerd_down_and_back(world: World, tmp_path: Path) -> None:
    world.back.stop(0).wait(10)
    with pytest.raises(grpc.RpcError) as caught:
        world.call(V1 + "ListImages", b"")
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    world.back = start_server(tmp_path / "c.sock", 4, world.containerd)
    deadline = time.monotonic() + 20
    while True:     # as kubelet does
        try:
            assert world.call(V1 + "ListImages", b"x") == b"answer to x"
        except grpc.RpcError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            break


def test_pulls_leave_the_snapshotters_threads_alone(world: World) -> None:
    """containerd asks the snapshotter while it pulls: a pull that kept its thread would wait for itself."""
    inner: list[bytes] = []

    def pull(request: bytes, _: Any) -> bytes:
        with grpc.insecure_channel(f"unix:{world.socket}") as channel:
            inner.append(channel.unary_unary(V1 + "ImageStatus")(b"status", timeout=10))
        return request

    def answer(request: bytes, context: Any) -> bytes:
        return b"fine" if request == b"status" else pull(request, context)

    world.containerd.answer = answer
    threads = [threading.Thread(target=world.pull, args=(f"reg.example/app:{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert inner == [b"fine"] * 4


def test_who_goes_away_takes_the_call_along(world: World) -> None:
    arrived, ended = threading.Event(), threading.Event()

    def wait(_: bytes, context: Any) -> bytes:
        context.add_callback(ended.set)
        arrived.set()
        ended.wait(20)
        return b""

    world.containerd.answer = wait
    call = world.channel.unary_unary(V1 + "ListImages").future(b"")
    assert arrived.wait(20)
    assert not ended.is_set()
    call.cancel()
    assert ended.wait(20)


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("image", "auth", "expected"), [
    ("nginx", {"username": "kim", "password": "pw"}, ("docker.io", "library/nginx", "kim", "pw", "")),
    ("reg.example/a@sha256:" + "0" * 64, {"username": "kim"}, ("reg.example", "a", "kim", "", "")),
    ("reg.example/a", {"auth": base64.b64encode(b"kim:p:w").decode()}, ("reg.example", "a", "kim", "p:w", "")),
    ("reg.example/a", {"identity_token": "t"}, ("reg.example", "a", "", "", "t")),
    ("reg.example/a", {"username": "kim", "server_address": "https://reg.example/v2/"},
     ("reg.example", "a", "kim", "", "")),
    ("nginx", {"username": "kim", "server_address": "https://index.docker.io/v1/"},
     ("docker.io", "library/nginx", "kim", "", "")),
    ("reg.example/a", {"username": "kim", "server_address": "other.example"}, None),
    ("reg.example/a", {"username": "kim", "server_address": "http://[::1"}, None),
    ("reg.example/a", {"password": "pw"}, None),
    ("reg.example/a", {"auth": "%%%"}, None),
    ("reg.example/a", {"username": "k" * 70_000}, None),
    ("no reference!", {"username": "kim"}, None),
    ("", {"username": "kim"}, None),
])
def test_what_a_pull_tells(image: str, auth: dict[str, str], expected: tuple[str, ...] | None) -> None:
    found = pulled_of(image, AuthConfig(**auth))
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert (found.host, found.repository, found.username, found.password.reveal(),
                found.identity_token.reveal()) == expected


def one(repository: str, username: str = "kim") -> Pulled:
    return Pulled("reg.example", repository, username, Secret("pw"), Secret(""))


def test_the_newest_counts_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulled_module, "COUNT_MAX", 5)
    keep = PulledCredentials()
    for number in range(9):
        keep.note(one(f"r{number}"))
    keep.note(one("r5", "lee"))
    assert [found.repository for found in keep.after(0)] == ["r4", "r6", "r7", "r8", "r5"]
    assert [found.username for found in keep.after(9)] == ["lee"]
    assert keep.after(10) == []


def test_what_nobody_uses_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(pulled_module.time, "monotonic", lambda: now[0])
    keep = PulledCredentials(lifetime_s=100)
    keep.note(one("a"))
    keep.note(one("b"))
    now[0] = 90
    keep.used([("reg.example", "b"), ("reg.example", "unknown")])
    now[0] = 120
    assert [found.repository for found in keep.after(0)] == ["b"]
