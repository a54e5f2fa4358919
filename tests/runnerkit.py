"""
Images to profile, and `lazyfs profile run` on them.

    image = profiled_image(tmp_path)                 # oci:...:app with a static busybox, users, data/f0..f5
    profiler = Profiler(Machine(tmp_path), image)
    done = profiler.run("--until-port", "80", "--", "httpd", "-f")      # done.list_text, done.said
    profiler.assert_nothing_left()                   # of no call of it: files, mounts, cgroups, processes
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lazyfs.fs import mountapi
from lazyfs.image.prefetch import parse_prefetch
from lazyfs.runner.workspace import BASE, CGROUPS
from tests.convertkit import Layout, run_convert
from tests.mountkit import LAZYFS, Machine, require_mounting
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Mapping

BUSYBOX = Path("/usr/bin/busybox")
COMMAND = [*LAZYFS, "profile", "run"]
RUN_S = 60.0
_ELSEWHERE = """
import sys, pathlib, lazyfs.runner.workspace
lazyfs.runner.workspace.BASE = pathlib.Path(sys.argv[1])
from lazyfs.cli.main import main
main(sys.argv[2:])
"""
FILE_BYTES = 300_000             # some five chunks of 64 KiB
APPLETS = ("cat", "echo", "env", "httpd", "id", "ls", "mkdir", "sh", "sleep", "sync", "true")


def require_runc() -> None:
    require_mounting()
    if shutil.which("runc") is None or not BUSYBOX.exists():
        pytest.skip("runc or busybox-static is not installed")


def profiled_image(directory: Path, extra: TarBuilder | None = None, **process: Any) -> str:
    """Convert one; `process`: fields of the image config's process; `extra`: a layer on top. Returns its reference."""
    rng = random.Random(3)
    system = TarBuilder().directory("bin").file("bin/busybox", BUSYBOX.read_bytes(), mode=0o755)
    for name in APPLETS:
        system.symlink(f"bin/{name}", "busybox")
    data = TarBuilder().directory("etc")
    data.file("etc/passwd", b"root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/data:/bin/sh\n")
    data.file("etc/group", b"app:x:1001:\nvideo:x:44:app\n").directory("data")
    for number in range(6):
        data.file(f"data/f{number}", rng.randbytes(FILE_BYTES))
    layout = Layout(directory / "source")
    layers = [system.build(), data.build(), *([] if extra is None else [extra.build()])]
    config = {"Cmd": ["sh", "-c", "cat /data/f3 /data/f1 >/dev/null"], "Env": ["A=image"], **process}
    layout.add_image("app", layers, config={"config": config})
    run_convert(layout.reference("app"), f"oci:{directory / 'lazy'}:app")
    return f"oci:{directory / 'lazy'}:app"


@dataclass(frozen=True)
class Done:
    """`list_text`: what came on stdout; `said`: all of stderr."""

    list_text: str
    said: str

    @property
    def program(self) -> list[str]:
        """The lines that the program said."""
        return [line[2:] for line in self.said.splitlines() if line.startswith("| ")]

    @property
    def paths(self) -> list[str]:
        """The files of the list, in its order, each once."""
        return list(dict.fromkeys(entry.pattern.decode() for entry in parse_prefetch(self.list_text).entries))


@dataclass
class Profiler:
    """`lazyfs profile run` in a test's machine. `pids`: of the calls it made; `base`: where its workspaces are."""

    machine: Machine
    image: str
    base: Path = BASE
    pids: list[int] = field(default_factory=list)

    def start(self, *words: str | Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        command = COMMAND if self.base == BASE else [sys.executable, "-c", _ELSEWHERE, str(self.base), "profile", "run"]
        started = subprocess.Popen([*command, self.image, *map(str, words)], text=True,
                                   env={**self.machine.environment, **(environment or {})}, **pipes)  # type: ignore[call-overload]
        self.pids.append(started.pid)
        return started  # type: ignore[no-any-return]

    def run(self, *words: str | Path, code: int = 0, environment: Mapping[str, str] | None = None) -> Done:
        with self.start(*words, environment=environment) as process:
            try:
                out, said = process.communicate(timeout=RUN_S)
            except BaseException:
                process.kill()
                raise
        assert process.returncode == code, f"{words}: exit code {process.returncode}: {said}"
        assert "Traceback" not in said, said
        return Done(out, said)

    def workspace(self, pid: int) -> Path | None:
        return next(iter(self.base.glob(f"lazyfs-profile-{pid}-*")), None)

    def left(self) -> list[str]:
        """What is on the machine of any call that was made."""
        if not self.pids:
            return []
        found = [str(path) for pid in self.pids for path in self.base.glob(f"lazyfs-profile-{pid}-*")]
        ours = re.compile("|".join(rf"lazyfs-profile-{pid}-" for pid in self.pids))
        found += [f"mount {entry.target}" for entry in mountapi.mounts() if ours.search(entry.target)]
        found += [f"cgroup {path}" for top in (CGROUPS, *CGROUPS.glob("*/")) for path in top.glob("lazyfs-profile-*")
                  if ours.search(path.name)]
        for path in Path("/proc").iterdir():
            if path.name.isdigit() and int(path.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if ours.search((path / "cmdline").read_bytes().decode(errors="replace")):
                        found.append(f"process {path.name}")
        return found

    def assert_nothing_left(self) -> None:
        deadline = time.monotonic() + 30
        while left := self.left():
            assert time.monotonic() < deadline, left
            time.sleep(0.02)
        self.machine.assert_clean()


def wait_said(process: subprocess.Popen[str], text: str) -> str:
    """Until the process has said so on stderr; what it said until then."""
    assert process.stderr is not None
    said, deadline = b"", time.monotonic() + RUN_S
    while text.encode() not in said:
        left_s = deadline - time.monotonic()
        assert left_s > 0, said.decode(errors="replace")
        if select.select([process.stderr], [], [], left_s)[0]:
            data = os.read(process.stderr.fileno(), 65536)
            assert data, f"it ended: {said.decode(errors='replace')}"
            said += data
    return said.decode(errors="replace")
