"""
One container of a profiling run: overlayfs on the lazy mount, runc on that, watched until a stop rule is met.

Layer: runner. Who calls: runner.session. One thread, one loop over the program's output, runc's end and the probe;
every wait has a deadline. What it makes is in the run's workspace: `close` takes it away, and if that is never called,
the workspace's own clean-up does.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import select
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyfs.errors import HostError, LazyfsError, ProgramError
from lazyfs.fs import mountapi
from lazyfs.node.unmount import unmount_directly
from lazyfs.runner.output import Lines
from lazyfs.runner.probe import Probe
from lazyfs.runner.workspace import Workspace, run_runc

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs.runner.rules import StopRules

_READ_BYTES = 64 * 1024
_KILLED_S = 10.0                 # from SIGKILL to runc's end: it removes cgroups
_DRAIN_S = 1.0                   # for the last words of a program that has ended
_RUNC_LOG_BYTES_MAX = 64 * 1024


class Ending(enum.Enum):
    """How the watched part of a run ended."""

    EXITED = "exited"
    READY = "ready"
    LATE = "late"


@dataclass(frozen=True, slots=True)
class Outcome:
    """`exit_code`: of a program that has ended; `reason`: in words; `elapsed_s`: since the container's start."""

    ending: Ending
    reason: str
    elapsed_s: float
    exit_code: int | None = None


class Container:
    """
    A container that can be started once.

    Attributes:
        rootfs: what the container sees as /; there after `prepare`.

    """

    def __init__(self, place: Workspace, folder: Path, name: str, on_line: Callable[[bytes], None]) -> None:
        """
        Note what belongs to it.

        Args:
            place: the workspace.
            folder: an empty directory of it.
            name: of the container and of its cgroup; begins with the workspace's name.
            on_line: is told every line of the program's output.

        """
        self._place = place
        self._folder = folder
        self.name = name
        self._on_line = on_line
        self._bundle = folder / "bundle"
        self.rootfs = self._bundle / "rootfs"
        self._pid_file = folder / "pid"
        self._log = folder / "runc.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        # Lines by descriptor, while it is open. Two pipes: runc copies the program's output and its errors side by
        # side, and in one pipe they would be cut into each other within a line.
        self._streams: dict[int, Lines] = {}
        self._begin = 0.0

    # --- making ------------------------------------------------------------------------------------------------------

    def prepare(self, lower: Path) -> None:
        """Put a writable layer on `lower`. Raises HostError: the kernel cannot."""
        for path in (self._bundle, self.rootfs):
            path.mkdir(mode=0o755)   # runc lets the container's user go through it
        try:
            self._mount_overlay(lower, self._folder)
        except LazyfsError:
            # /var/tmp is no place for an upper directory (itself an overlay: we are in a container): then memory is
            writable = self._folder / "writable"
            writable.mkdir()
            mountapi.mount("lazyfs-profile", str(writable), "tmpfs", mountapi.MS_NODEV, "mode=700")
            self._mount_overlay(lower, writable)

    def _mount_overlay(self, lower: Path, writable: Path) -> None:
        for name in ("upper", "work"):
            (writable / name).mkdir(exist_ok=True)
        root = lower.stat()   # the upper directory's own attributes are those of the container's /
        os.chown(writable / "upper", root.st_uid, root.st_gid)
        (writable / "upper").chmod(root.st_mode & 0o7777)
        options = f"lowerdir={lower},upperdir={writable / 'upper'},workdir={writable / 'work'}"
        mountapi.mount("overlay", str(self.rootfs), "overlay", 0, options)

    def start(self, spec: dict[str, Any]) -> None:
        """Run it by runc. Raises HostError: there is no runc."""
        (self._bundle / "config.json").write_text(json.dumps(spec), encoding="utf-8")
        words = ["runc", "--root", str(self._place.runc_state), "--log", str(self._log), "--log-format", "json",
                 "run", "--bundle", str(self._bundle), "--pid-file", str(self._pid_file), self.name]
        self._begin = time.monotonic()
        try:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True)   # a terminal's ^C is for us: we stop it in order
        except OSError as error:
            raise HostError(f"cannot run runc: {error.strerror}", hint="install it: apt-get install runc") from error
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            self._streams[pipe.fileno()] = Lines()
        self._pidfd = os.pidfd_open(self._process.pid)

    # --- watching ----------------------------------------------------------------------------------------------------

    def watch(self, rules: StopRules, *, own_network: bool) -> Outcome:
        """
        Wait until a rule is met, the program ends, or its time is over.

        Raises:
            ProgramError: the container could not be started. HostError: nobody can look into its network.

        """
        matched: list[bytes] = []

        def look(line: bytes) -> None:
            self._on_line(line)
            if rules.log is not None and not matched and rules.log.search(line):
                matched.append(line)

        end = self._begin + min(rules.timeout_s, rules.for_s or rules.timeout_s)
        with contextlib.ExitStack() as stack:
            probe = None
            if rules.probes:
                probe = stack.enter_context(Probe(rules, self._pid_file, own_network=own_network))
            ended = self._pump(end, look, () if probe is None else (probe.reader,), lambda: bool(matched))
            elapsed_s = time.monotonic() - self._begin
            if matched:
                return Outcome(Ending.READY, "its output matched", elapsed_s)
            if probe is not None and probe.met:
                return Outcome(Ending.READY, probe.met, elapsed_s)
            if probe is not None and probe.problem:
                raise HostError(probe.problem, hint="use --until-log or --for, or --net host")
        if ended:
            return Outcome(Ending.EXITED, "it ended", elapsed_s, self._exit_code())
        if rules.for_s is not None and rules.for_s <= rules.timeout_s:
            return Outcome(Ending.READY, f"{rules.for_s:g} s are over", elapsed_s)
        return Outcome(Ending.LATE, f"its {rules.timeout_s:g} s are over", elapsed_s)

    def stop(self, number: int, grace_s: float) -> None:
        """End the program: by signal `number`, and by SIGKILL after `grace_s`. Idempotent."""
        process = self._process
        if process is None or self._pidfd < 0:
            return
        if process.poll() is None and self._heeds(number):
            run_runc(self._place, "kill", self.name, str(int(number)))
            self._pump(time.monotonic() + grace_s, self._on_line)
        if process.poll() is None:
            if run_runc(self._place, "kill", self.name, str(int(signal.SIGKILL))):
                process.kill()   # it is still making the container: what is there is known by the cgroup's name
            self._pump(time.monotonic() + _KILLED_S, self._on_line)
        if process.poll() is None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILLED_S)

    def close(self) -> None:
        """Kill it if it lives, and take its state, cgroup and overlay away. Idempotent."""
        self.stop(signal.SIGKILL, 0.0)
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        self._streams.clear()
        for pipe in () if self._process is None else (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        if (self._place.runc_state / self.name).exists():
            run_runc(self._place, "delete", "--force", self.name)
        for path in (self.rootfs, self._folder / "writable"):
            while mountapi.mount_at(str(path)) is not None:
                unmount_directly(str(path), lazy=True)

    def _heeds(self, number: int) -> bool:
        """
        Whether the program has a use for this signal: the kernel drops what the first process of a PID namespace
        neither catches nor waits for (pid_namespaces(7)), and the grace would be spent for nothing. Likewise if it is
        not there yet.
        """
        with contextlib.suppress(OSError, ValueError):
            pid = int(self._pid_file.read_text(encoding="ascii"))
            text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
            sets = [int(line.split()[1], 16) for line in text.splitlines() if line.startswith(("SigCgt:", "SigBlk:"))]
            return any(found >> (number - 1) & 1 for found in sets)
        return False

    # --- details -----------------------------------------------------------------------------------------------------

    def _pump(
        self, deadline: float, on_line: Callable[[bytes], None], wake: tuple[int, ...] = (),
        done: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Take the output until the program ends (True), `deadline`, `done` or something to read in `wake` (False)."""
        while not done():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            ready = _ready((self._pidfd, *wake, *self._streams), left_s)
            self._take(ready, on_line)
            if done() or ready.intersection(wake):
                return False
            if self._pidfd in ready:
                self._take_rest(on_line)
                return not done()
        return False

    def _take(self, ready: set[int], on_line: Callable[[bytes], None]) -> None:
        """Read those of the program's pipes that are `ready`."""
        for descriptor in [one for one in self._streams if one in ready]:
            try:
                data = os.read(descriptor, _READ_BYTES)
            except BlockingIOError:
                continue
            lines = self._streams[descriptor]
            if not data:
                del self._streams[descriptor]
            for line in lines.feed(data) if data else lines.finish():
                on_line(line)

    def _take_rest(self, on_line: Callable[[bytes], None]) -> None:
        deadline = time.monotonic() + _DRAIN_S
        while self._streams and (left_s := deadline - time.monotonic()) > 0:
            self._take(_ready(tuple(self._streams), left_s), on_line)

    def _exit_code(self) -> int:
        """Of the program. Raises ProgramError: runc could not start it."""
        assert self._process is not None
        code = self._process.wait(_KILLED_S)
        problem = self._problem()
        if code and problem:
            raise ProgramError(f"the container could not be started: {problem}",
                               hint="is the program in the image, and for this machine?")
        return code

    def _problem(self) -> str:
        """The last error that runc wrote to its log."""
        with contextlib.suppress(OSError):
            for line in reversed(self._log.read_bytes()[-_RUNC_LOG_BYTES_MAX:].splitlines()):
                with contextlib.suppress(ValueError, AttributeError, TypeError):
                    entry = json.loads(line)
                    if entry.get("level") == "error":
                        return str(entry.get("msg", ""))[:500]
        return ""


def _ready(descriptors: tuple[int, ...], timeout_s: float) -> set[int]:
    """Those that can be read, or have ended. `descriptors`: at most four; they change from call to call."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(timeout_s * 1000)}
