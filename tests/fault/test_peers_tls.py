"""Certificates between peers: who is let in, whose name counts, and that a new file counts at once."""

from __future__ import annotations

import logging
import re
import socket
import ssl
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trustme

from lazyfs.errors import ConfigError, PeerError
from lazyfs.peers.model import Member
from lazyfs.peers.tlsfiles import TlsFiles, check_server
from tests.certkit import issue

ROOT = Path(__file__).resolve().parents[2]


def talk(server: ssl.SSLContext, client: ssl.SSLContext) -> dict[str, Any]:
    """One connection over a socket pair: what the client saw of the server. Raises the client's error."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with suppress(OSError), server.wrap_socket(theirs, server_side=True) as end:
            end.sendall(end.recv(1))

    with ours, theirs:
        ours.settimeout(30)
        theirs.settimeout(30)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with client.wrap_socket(ours, server_hostname="node-1") as end:
                end.sendall(b"x")
                if end.recv(1) != b"x":
                    raise ssl.SSLError("refused")
                return dict(end.getpeercert() or {}) | {"version": end.version()}
        finally:
            thread.join()


def test_members_of_one_authority_speak_tls_1_3(tmp_path: Path) -> None:
    authority = trustme.CA()
    first, second = issue(tmp_path / "1", authority, "node-1"), issue(tmp_path / "2", authority, "node-2")
    first.load()
    assert talk(first.server(), second.client())["version"] == "TLSv1.3"
    old = second._make_client()
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(OSError):
        talk(first.server(), old)


def test_strangers_are_kept_out_on_both_sides(tmp_path: Path) -> None:
    ours, others = trustme.CA(), trustme.CA()
    node = issue(tmp_path / "1", ours, "node-1")
    forged = issue(tmp_path / "2", others, "node-2", believes=ours)
    bare = TlsFiles("peers", "", "", node.ca_file)
    for stranger in (forged, bare):
        with pytest.raises(OSError):
            talk(node.server(), stranger.client())
    with pytest.raises(ssl.SSLCertVerificationError):
        talk(forged.server(), node.client())


def test_another_members_certificate_does_not_stand_in_for_it(tmp_path: Path) -> None:
    authority = trustme.CA()
    client = issue(tmp_path / "0", authority, "node-0")

    def shown(*names: str) -> dict[str, Any]:
        return talk(issue(tmp_path / "n", authority, *names).server(), client.client())

    node, mirror = Member("node-1", "10.0.0.1:9451"), Member("node-1.mirror", "[fd00::1]:9452")
    for names, members in ((("node-1",), (node, mirror)), (("10.0.0.1",), (node,)), (("fd00:0::1",), (mirror,)),
                           (("NODE-1", "other"), (node, mirror))):
        seen = shown(*names)
        for member in members:
            check_server(seen, member)
    for names in (("node-2",), ("10.0.0.2",), ("*.mirror",), ("node-1.example",)):
        seen = shown(*names)
        for member in (node, mirror):
            with pytest.raises(PeerError, match="not one of"):
                check_server(seen, member)
    for nothing in (None, {}):
        with pytest.raises(PeerError):
            check_server(nothing, node)


def test_new_files_count_for_the_next_connection_and_broken_ones_do_not(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = trustme.CA(), trustme.CA()
    node, client = issue(tmp_path / "1", old, "node-1"), issue(tmp_path / "2", old, "node-2")
    talk(node.server(), client.client())
    assert node.server() is node.server()
    issue(tmp_path / "1", new, "node-1")
    issue(tmp_path / "2", new, "node-2")
    talk(node.server(), client.client())
    before = node.server()
    (tmp_path / "1/cert.pem").write_bytes(b"-----BEGIN CERT")
    with caplog.at_level(logging.WARNING, "lazyfs.peers"):
        assert node.server() is before
        assert node.server() is before
    assert len(caplog.records) == 1
    talk(node.server(), client.client())


def test_the_commands_of_the_document_make_certificates_that_count(tmp_path: Path) -> None:
    text = (ROOT / "docs/tokens.md").read_text()
    commands = re.findall(r"^\$ ((?:openssl|printf) .*)$", text, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True)
    node = TlsFiles("peers", *(str(tmp_path / name) for name in ("node-1.pem", "node-1.key", "ca.pem")))
    node.load()
    check_server(talk(node.server(), node.client()), Member("node-1", "10.9.9.9:9451"))


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    node = issue(tmp_path / "1", trustme.CA(), "node-1")
    (tmp_path / "1/key.pem").chmod(0o644)
    with pytest.raises(ConfigError, match="read by others") as caught:
        node.load()
    assert "chmod 600" in caught.value.hint
    for changed in ({"key_file": "/no/such"}, {"cert_file": str(tmp_path)}, {"ca_file": "/etc/hostname"}):
        (tmp_path / "1/key.pem").chmod(0o600)
        files = {"cert_file": node.cert_file, "key_file": node.key_file, "ca_file": node.ca_file, **changed}
        with pytest.raises(ConfigError, match=r"peers\."):
            TlsFiles("peers", **files).load()
