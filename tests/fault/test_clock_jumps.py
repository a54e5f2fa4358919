"""The wall clock jumps a day, forth and back: nobody waits longer, nothing expires at once (faults, row 36)."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from lazyfs.registry import open_source
from tests.daemonkit import WAIT_S, end_daemon, start_daemon
from tests.fault.test_registry_tokens import LAYER, World, kim, servers, world
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.hookkit import Hooks

if TYPE_CHECKING:
    from pathlib import Path

    from tests.mountkit import Machine

__all__ = ["servers", "world"]   # fixtures
DAY_S = 86_400.0
RNG = random.Random(37)
FILES = {f"f{number}": RNG.randbytes(300_000) for number in range(5)}
READ_TIMEOUT_S = 4


def read(path: Path) -> bytes | int:
    """Or the errno."""
    try:
        return path.read_bytes()
    except OSError as error:
        return error.errno or 0


def wait_until_right(path: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while read(path) != FILES[path.name]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.mount
def test_reads_and_takeovers_do_not_look_at_the_wall_clock(machine: Machine, registry: str, tmp_path: Path) -> None:
    hooks = Hooks(tmp_path)
    with FaultProxy(registry) as proxy:
        daemon = start_daemon(machine, environment=hooks.environment)
        try:
            worker = daemon.wait_ready()
            target = machine.target()
            machine.lazyfs("mount", f"{proxy.host}/app:lazy", target, "--insecure", "--read-timeout",
                           str(READ_TIMEOUT_S))
            for number, ahead_s in enumerate((DAY_S, -DAY_S)):
                wait_until_right(target / f"f{2 * number}")
                proxy.add(Fault(Kind.BLACK_HOLE, path="/blobs/"))
                found: list[bytes | int] = []
                name = f"f{2 * number + 1}"
                reader = threading.Thread(target=lambda name=name, found=found: found.append(read(target / name)))
                reader.start()
                hooks.set_clock(ahead_s)      # while it waits
                reader.join(60)
                assert not reader.is_alive(), "it waits for a clock that somebody set"
                assert found[0] in {errno.EIO, errno.ETIMEDOUT}
                proxy.clear()
                proxy.disconnect()
                wait_until_right(target / name)
                assert daemon.worker() == worker, "nobody took it for silent"
            os.kill(worker, signal.SIGKILL)
            daemon.wait_ready(not_worker=worker)
            for name in FILES:
                wait_until_right(target / name)
            machine.umount(target)
        finally:
            end_daemon(daemon)


def test_a_token_lives_by_the_clock_that_nobody_sets(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    source = open_source(world.text, kim())
    try:
        for ahead_s in (0.0, DAY_S, -DAY_S):
            monkeypatch.setattr(time, "time", lambda ahead_s=ahead_s: real() + ahead_s)
            with source.read_range(world.image.digest, 0, 10, time.monotonic() + 30) as stream:
                assert stream.read(10) == LAYER[:10]
    finally:
        source.close()
    assert len(world.tokens.requests) == 1
