"""The units of tracker and mirror in packaging/systemd: systemd takes them, and the programs keep what they promise."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.trackerkit import START_S, environment

if TYPE_CHECKING:
    from collections.abc import Iterator

UNITS = Path(__file__).resolve().parents[2] / "packaging/systemd"
EXPOSURE_MAX = {"lazyfs-tracker.service": 2.0, "lazyfs-mirror.service": 3.5}    # systemd's measure: 0 safe, 10 not


def analyze(*words: str) -> str:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed (package systemd)")
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False, timeout=60,
                          env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning", "LC_ALL": "C"})
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", EXPOSURE_MAX)
def test_systemd_takes_the_unit_and_finds_it_closed(name: str, tmp_path: Path) -> None:
    program = tmp_path / "lazyfs"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / name
    unit.write_text((UNITS / name).read_text().replace("/usr/bin/lazyfs", str(program)))
    said = analyze("verify", "--man=no", str(unit))
    assert not [line for line in said.splitlines() if "lazyfs" in line], said
    said = analyze("security", "--offline=true", "--no-pager", str(unit))
    found = re.search(r"exposure level for \S+ ([0-9.]+)", said)
    assert found is not None
    assert float(found[1]) <= EXPOSURE_MAX[name]


@pytest.fixture
def told(tmp_path: Path) -> Iterator[socket.socket]:
    """What systemd would be told, a datagram each."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(START_S)
        yield listener


def wait_for(told: socket.socket, word: bytes) -> None:
    limit = time.monotonic() + START_S
    while word not in told.recv(4096):
        assert time.monotonic() < limit, word


@contextlib.contextmanager
def service(words: list[str], told: socket.socket) -> Iterator[subprocess.Popen[bytes]]:
    """As its unit starts it, with the capabilities that the unit leaves it."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root, and setpriv")
    own = {**environment(), "NOTIFY_SOCKET": told.getsockname(), "WATCHDOG_USEC": "300000", "LAZYFS_CONFIG": ""}
    text = (UNITS / f"lazyfs-{words[0]}.service").read_text()
    kept = re.findall(r"CAP_(\w+)", "".join(re.findall(r"^CapabilityBoundingSet=.*$", text, re.MULTILINE)))
    bounds = ",".join(["-all", *(f"+{name.lower()}" for name in kept)])
    process = subprocess.Popen(["setpriv", "--bounding-set", bounds, "--inh-caps", "-all", "--no-new-privs",
                                sys.executable, "-m", "lazyfs", *words], env=own, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_tracker_says_that_it_is_ready_and_alive(told: socket.socket) -> None:
    with service(["tracker", "--address", "127.0.0.1:0"], told) as process:
        wait_for(told, b"READY=1")
        for _ in range(2):
            wait_for(told, b"WATCHDOG=1")
        process.send_signal(signal.SIGTERM)
        assert process.wait(START_S) == 0


def test_the_mirror_runs_with_what_its_unit_leaves_it(told: socket.socket, tmp_path: Path) -> None:
    with service(["mirror", "--address", "127.0.0.1:0", "--dir", str(tmp_path / "mirror")], told) as process:
        wait_for(told, b"READY=1")
        held = re.search(r"^CapPrm:\s*([0-9a-f]+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
        assert held is not None
        assert int(held[1], 16) == 1 << 2       # CAP_DAC_READ_SEARCH
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=START_S)[1]
        assert b"could be given up" not in said, said
