"""
CRI's ImageService on our socket: each call is passed on to containerd, byte for byte, and the answer back.

Kubelet is told to ask here (`--image-service-endpoint`), so that we see which credentials it pulls an image with: the
pod's imagePullSecrets and its own providers', refreshed by each pull. Only PullImage is looked into; what is passed on
is what came, so that fields and calls which we do not know survive.

Layer: snapshotter.credentials. Who calls: the command line, adds it to the snapshotter's server; kubelet, crictl.
State: one channel to containerd, made anew by gRPC when that restarts; two thread pools of its own: containerd asks our
snapshotter while it pulls, and must not find all its threads waiting for that very pull.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.protobuf.message import DecodeError

from snapshotter.api.cri_pb2 import PullImageRequest
from snapshotter.credentials.pulled import pulled_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from snapshotter.credentials.pulled import Pulled

SERVICES: Final = ("runtime.v1.ImageService", "runtime.v1alpha2.ImageService")
_UNARY: Final = {"ListImages", "ImageStatus", "PullImage", "RemoveImage", "ImageFsInfo"}
MESSAGE_BYTES_MAX = 16 * 1024 * 1024     # kubelet's own bound
_TIMEOUT_S_MAX = 1e6
_PULL_THREADS, _OTHER_THREADS = 64, 8    # a pull may take minutes; kubelet makes many only when told to
_KEYS_DROPPED: Final = {"user-agent", "content-type", "te"}
_LOG = logging.getLogger("lazyfs.snapshotter")


class ImageServiceProxy(grpc.GenericRpcHandler):   # type: ignore[misc]
    """See the module. `note` is given the credentials of a pull before it begins; it must not block."""

    def __init__(self, containerd_address: str, note: Callable[[Pulled], None]) -> None:
        self._address = containerd_address
        self._note = note
        self._lock = threading.Lock()
        self._channel: Any = None
        self._pulls = ThreadPoolExecutor(_PULL_THREADS, thread_name_prefix="cri-pull")
        self._others = ThreadPoolExecutor(_OTHER_THREADS, thread_name_prefix="cri")

    def add_to(self, server: Any) -> None:
        """Serve on this grpc.Server; before it starts."""
        server.add_generic_rpc_handlers((self,))

    def close(self) -> None:
        """After the server has stopped."""
        for pool in (self._pulls, self._others):
            pool.shutdown(wait=True, cancel_futures=True)
        if self._channel is not None:
            self._channel.close()

    def service(self, handler_call_details: Any) -> Any:
        """Who serves a method, as gRPC asks; None: not we."""
        method = handler_call_details.method
        service, _, name = method.lstrip("/").partition("/")
        if service not in SERVICES:
            return None
        if name in _UNARY:
            behaviour = _Behaviour(self._unary, method)
            behaviour.experimental_thread_pool = self._pulls if name == "PullImage" else self._others
            return grpc.unary_unary_rpc_method_handler(behaviour)
        stream = _Behaviour(self._stream, method)   # of whatever kind: one message each way is a stream, too
        stream.experimental_thread_pool = self._others
        return grpc.stream_stream_rpc_method_handler(stream)

    def _unary(self, method: str, request: bytes, context: Any) -> bytes:
        if method.endswith("/PullImage"):
            self._look(request)
        call = self._containerd().unary_unary(method).future(request, **_terms(context))
        if not context.add_callback(call.cancel):   # the caller is gone already
            call.cancel()
        try:
            answer: bytes = call.result()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            _pass_on(error, context)
            raise   # not reached: abort() raises
        context.send_initial_metadata(_passable(call.initial_metadata()))
        context.set_trailing_metadata(_passable(call.trailing_metadata()))
        return answer

    def _stream(self, method: str, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        call = self._containerd().stream_stream(method)(requests, **_terms(context))
        if not context.add_callback(call.cancel):
            call.cancel()
        try:
            yield from call
        except grpc.RpcError as error:
            _pass_on(error, context)
        context.set_trailing_metadata(_passable(call.trailing_metadata()))

    def _look(self, request: bytes) -> None:
        """Note what the pull is made with. Whatever is wrong with it is containerd's to say."""
        try:
            message = PullImageRequest.FromString(request)
        except DecodeError:
            return
        pulled = pulled_of(message.image.image, message.auth) if message.HasField("auth") else None
        if pulled is not None:
            _LOG.debug("credentials seen for %s/%s", pulled.host, pulled.repository)
            self._note(pulled)

    def _containerd(self) -> Any:
        with self._lock:
            if self._channel is None:
                terms = [("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
                         ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
                         ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000),
                         ("grpc.default_authority", "localhost")]
                self._channel = grpc.insecure_channel(f"unix:{self._address}", terms)
            return self._channel


class _Behaviour:
    """A handler for one method; gRPC looks for its thread pool here."""

    experimental_thread_pool: ThreadPoolExecutor

    def __init__(self, function: Callable[[str, Any, Any], Any], method: str) -> None:
        self._function = function
        self._method = method

    def __call__(self, request: Any, context: Any) -> Any:
        return self._function(self._method, request, context)


def _terms(context: Any) -> dict[str, Any]:
    """Time limit and metadata of a call, for the call that is made instead."""
    left_s = context.time_remaining()   # infinite: gRPC says so, and would not take it
    return {"timeout": left_s if left_s is not None and left_s < _TIMEOUT_S_MAX else None,
            "metadata": _passable(context.invocation_metadata())}


def _passable(metadata: Any) -> tuple[tuple[str, Any], ...]:
    """Without what belongs to one connection; with the details of errors."""
    return tuple((key, value) for key, value in metadata or ()
                 if key not in _KEYS_DROPPED and not key.startswith(":")
                 and (not key.startswith("grpc-") or key == "grpc-status-details-bin"))


def _pass_on(error: Any, context: Any) -> None:
    """Give the caller containerd's refusal. Raises what gRPC's abort() raises."""
    if isinstance(error, grpc.FutureCancelledError):
        context.abort(grpc.StatusCode.CANCELLED, "cancelled")
    context.set_trailing_metadata(_passable(error.trailing_metadata()))
    context.abort(error.code(), error.details() or "")
