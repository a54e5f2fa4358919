"""systemd's protocols: datagrams to NOTIFY_SOCKET, descriptors from LISTEN_FDS."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from lazyfs.node import notify

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def receiver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(tmp_path / "notify"))
        made.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield made


def test_a_state_is_sent(receiver: socket.socket) -> None:
    assert notify.notify("READY=1\nSTATUS=well")
    assert receiver.recv(100) == b"READY=1\nSTATUS=well"


def test_a_descriptor_is_stored_and_forgotten(receiver: socket.socket, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    with (tmp_path / "file").open() as file:
        assert notify.store("name", file.fileno())
    data, descriptors, _, _ = socket.recv_fds(receiver, 100, 2)
    assert data == b"FDSTORE=1\nFDNAME=name\nFDPOLL=0"
    (descriptor,) = descriptors
    assert os.read(descriptor, 100) == b"content"
    os.close(descriptor)
    assert notify.forget("name")
    assert receiver.recv(100) == b"FDSTOREREMOVE=1\nFDNAME=name"


def test_an_abstract_address_works(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"lazyfs-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind("\0" + name)
        made.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        assert notify.notify("STOPPING=1")
        assert made.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("address", ["", "relative", "/nonexistent/socket"])
def test_nobody_to_tell_is_no_error(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify.notify("READY=1")


def test_stored_descriptors_are_for_the_named_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    monkeypatch.setenv("LISTEN_FDS", "2")
    monkeypatch.setenv("LISTEN_FDNAMES", "fuse:control")
    assert notify.take_stored() == {}
    assert "LISTEN_FDS" not in os.environ
