"""Which of containerd's refusals mean that nothing was done, so that a call may be made again."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import grpc
import pytest

from lazyfs.errors import HostError
from snapshotter.containerdwords import translate, was_unsent

if TYPE_CHECKING:
    from pathlib import Path


class Refusal(grpc.RpcError):
    """As gRPC raises it; these texts were seen while a snapshotter was killed under pulls."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


@pytest.mark.parametrize("details", [
    'connection error: desc = "transport: Error while dialing: dial unix /s.sock: connect: connection refused"',
    'connection error: desc = "error reading server preface: read unix @->/s.sock: use of closed network connection"',
    'connection error: desc = "error reading server preface: read unix @->/s.sock: read: connection reset by peer"',
    "timed out waiting for server handshake",
    "connection closed: unavailable",
])
def test_a_connection_that_never_was_has_sent_nothing(details: str) -> None:
    refusal = Refusal(grpc.StatusCode.UNAVAILABLE, details)
    assert was_unsent(refusal)
    assert not was_unsent(Refusal(grpc.StatusCode.INTERNAL, details))


def test_a_call_that_was_cut_may_have_been_done() -> None:
    assert not was_unsent(Refusal(grpc.StatusCode.UNAVAILABLE, "error reading from server: EOF"))


def test_a_containerd_that_is_mute_is_not_said_to_be_away(tmp_path: Path) -> None:
    """It was stopped: the message was gRPC's own, without a next step."""
    address = str(tmp_path / "c.sock")
    refusal = Refusal(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses; last error: UNKNOWN: unix:/c: "
                                                   "connection attempt timed out before receiving SETTINGS frame")
    assert "containerd does not answer at" in str(translate(refusal, address))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        error = translate(refusal, address)
    assert "listens" in str(error)
    assert error.hint


def test_a_snapshotter_that_is_away_is_said_so() -> None:
    with_socket = Refusal(grpc.StatusCode.UNKNOWN, 'connection error: desc = "error reading server preface: EOF"')
    error = translate(with_socket, "/nowhere")
    assert isinstance(error, HostError)
    assert "lazyfs-snapshotter" in error.hint
