"""Name servers that do not answer: a request still ends at its deadline."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from lazyfs.registry import names

if TYPE_CHECKING:
    from pathlib import Path

SERVER = ("127.0.0.77", 53)      # a loopback address of this test alone
SCRIPT = """
import time
from lazyfs.errors import DeadlineError, SourceError
from lazyfs.registry import RegistryOptions
from lazyfs.registry.transport import Call, Transport

for options, kind in ((RegistryOptions(), DeadlineError), (RegistryOptions(connect_timeout_s=0.3), SourceError)):
    for _ in range(2):      # the second one finds the first one's lookup still running
        started = time.monotonic()
        try:
            deadline = started + (60 if kind is SourceError else 1)
            Transport(options).send(Call("GET", "https://registry.example/v2/"), deadline)
        except kind as error:
            assert "no name server answered in time" in str(error) and "resolv.conf" in error.hint, error
            assert type(error) is kind and error.transient
        else:
            raise AssertionError("no error")
        assert time.monotonic() - started < 10, "it waited for the name server"
print("in time")
"""


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root, for its own resolv.conf")
def test_a_silent_name_server_does_not_hold_a_request(tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text(f"nameserver {SERVER[0]}\noptions timeout:10 attempts:2\n")
    (tmp_path / "nsswitch.conf").write_text("hosts: files dns\n")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(SERVER)      # it takes questions, and says nothing
        server.settimeout(30)
        shell = ('mount --bind "$1/resolv.conf" /etc/resolv.conf && mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf '
                 '&& exec "$2" -c "$3"')
        done = subprocess.run(["unshare", "--mount", "--propagation", "slave", "sh", "-c", shell, "sh", tmp_path,
                               sys.executable, SCRIPT], capture_output=True, text=True, check=False, timeout=60)
        assert done.stdout == "in time\n", done.stderr
        assert b"registry\x07example" in server.recv(4096), "the question never came here"


def test_who_waits_for_a_name_shares_one_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = [], threading.Event()
    real = socket.getaddrinfo

    def slow(host: str, *rest: int) -> names.Addresses:
        if rest[-1] == socket.AI_NUMERICHOST:
            return real(host, *rest)
        asked.append(host)
        assert answer.wait(30)
        return real("127.0.0.1", *rest)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    for _ in range(5):
        with pytest.raises(TimeoutError):
            names.find_addresses("name.test", 5000, time.monotonic() + 0.02)
    assert names.find_addresses("127.0.0.9", 1, time.monotonic() - 1)[0][4] == ("127.0.0.9", 1)   # nobody is asked
    assert asked == ["name.test"]
    answer.set()
    assert names.find_addresses("name.test", 5000, time.monotonic() + 30)[0][4] == ("127.0.0.1", 5000)
