"""
`lazyfs profile run`: one image, started several times, each time on a mount that nobody has read from.

Layer: runner. Who calls: cli.profile_run. For each run: a lazy mount by a worker of our own (so that its page cache is
empty, and every read reaches the worker, which knows the order), a container on overlayfs above it, a recording taken
at the moment the stop rule is met (what the program reads to end itself is no part of its start), then the container's
and the mount's end. The data cache may be the same for all runs: it changes when bytes come, not which are asked for.

Why runc and not the node's containerd: there an image has one mount for all of its containers. What one of them has
read is in the kernel's page cache, complete devices are read past the worker, and a mount in use cannot be made anew;
so the first touches of a second start would not be seen. `ctr run --rootfs` on our own mount would be runc again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyfs.errors import BusyError, HostError, LazyfsError, NotReadyError, ProgramError
from lazyfs.image.manifest import parse_lazy_manifest, parse_manifest
from lazyfs.node.launch import find_daemon, mount_image
from lazyfs.node.order import MountOrder
from lazyfs.node.rundir import WorkerDir
from lazyfs.registry import open_source
from lazyfs.registry.fields import from_fields
from lazyfs.registry.reference import RegistryReference, parse_reference
from lazyfs.registry.select import select_image
from lazyfs.runner.container import Container, Ending, Outcome
from lazyfs.runner.imageconfig import ProcessConfig, merge_environment, parse_process
from lazyfs.runner.probe import refuse_open
from lazyfs.runner.recording import MountedTables, recording_of
from lazyfs.runner.rootfs import read_inside
from lazyfs.runner.rules import StopRules
from lazyfs.runner.spec import HOSTNAME, ExtraMount, Network, Program, runtime_spec
from lazyfs.runner.users import FILE_BYTES_MAX, resolve_user
from lazyfs.runner.workspace import CGROUPS, Workspace, open_workspace

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs.profile.files import ImageFiles
    from lazyfs.profile.recording import Recording

_RESOLV_BYTES_MAX = 64 * 1024


@dataclass(frozen=True, slots=True)
class RunOrder:
    """
    What to run, and how. `registry`: registry.RegistryOptions as registry.fields writes them.

    Attributes:
        image: absolute (cli.mount.absolute_image).
        command, entrypoint: the user's words, see ProcessConfig.arguments.
        user, cwd: instead of the image's; None: the image's.
        cache_dir: absolute, resolved; None: an empty one that goes with the run.
        keep_failed: a program that fails, or is late, is recorded all the same.

    """

    image: str
    command: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    env: tuple[str, ...] = field(default=(), repr=False)
    user: str | None = None
    cwd: str | None = None
    network: Network = Network.NONE
    mounts: tuple[ExtraMount, ...] = ()
    rules: StopRules = field(default_factory=StopRules)
    runs: int = 1
    keep_failed: bool = False
    cache_dir: str | None = None
    driver: str = "auto"
    platform: str | None = None
    registry: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Run:
    """One recorded run. `failure`: why it should not count, if keep_failed kept it."""

    recording: Recording
    outcome: Outcome
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Recorded:
    """All runs, and the image's files to name what they read. `left`: what could not be taken away, in words."""

    image: str
    runs: tuple[Run, ...]
    files: ImageFiles
    left: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Image:
    """What the registry says. `name`: with the digest; `reference`: to mount just this one."""

    name: str
    reference: str
    bootstrap: str
    process: ProcessConfig


def record_runs(order: RunOrder, *, on_line: Callable[[bytes], None], on_run: Callable[[int, Run], None]) -> Recorded:
    """
    Run the image `order.runs` times. Nothing is left behind, whatever happens.

    Args:
        order: what and how.
        on_line: is told every line that the program says.
        on_run: is told every run that is over, with its number from 1.

    Raises:
        ProgramError: the program failed, or could not be started. NotReadyError: its stop rule was not met.
        LazyfsError: whatever else is in the way.

    """
    check_host()
    image = _find_image(order)
    words = image.process.arguments(order.command, order.entrypoint)
    if order.network is Network.HOST:
        refuse_open(order.rules)
    runs: list[Run] = []
    with open_workspace() as place:
        cache = str(place.cache) if order.cache_dir is None else order.cache_dir
        _refuse_shared(cache)
        session = _Session(order, image, words, place, cache, on_line)
        for number in range(1, order.runs + 1):
            runs.append(session.run(number))
            on_run(number, runs[-1])
    assert session.files is not None
    return Recorded(image.name, tuple(runs), session.files, tuple(place.left))


def check_host() -> None:
    """Raises HostError: this machine cannot run containers on lazy mounts."""
    if os.geteuid() != 0:
        raise HostError("profiling runs a container, which needs root", hint="run it with sudo")
    if not Path("/dev/fuse").exists():
        raise HostError("there is no /dev/fuse", hint="load it with: modprobe fuse")
    if shutil.which("runc") is None:
        raise HostError("there is no runc", hint="install it: apt-get install runc")


def _find_image(order: RunOrder) -> _Image:
    source = open_source(order.image, from_fields(order.registry))
    try:
        document = select_image(source, order.platform)
        lazy = parse_lazy_manifest(parse_manifest(document.data, document.media_type), source.name)
        process = parse_process(source.read_blob(lazy.config.digest, lazy.config.size))
    finally:
        source.close()
    reference = parse_reference(order.image)
    pinned = order.image
    if isinstance(reference, RegistryReference) and reference.digest is None:
        pinned = f"{order.image}@{document.digest}"   # a tag may move between two runs
    base = reference.identity.removeprefix("docker://")
    return _Image(f"{base}@{document.digest}", pinned, str(lazy.bootstrap.digest), process)


def _refuse_shared(cache: str) -> None:
    """Another worker's mounts have its read-ahead, and would get ours."""
    daemon = find_daemon()
    if (daemon is not None and daemon.cache_dir == cache) or WorkerDir.of_cache(cache).worker() is not None:
        raise BusyError(f"the cache directory {cache} is in use by other lazy mounts",
                        hint="name another --cache-dir, or none: then the run has one of its own")


@dataclass(slots=True)
class _Session:
    """The runs of one order. `words`: the program's; `cache`: the data cache's directory; `files`: after a run."""

    order: RunOrder
    image: _Image
    words: tuple[str, ...]
    place: Workspace
    cache: str
    on_line: Callable[[bytes], None]
    files: ImageFiles | None = None

    def run(self, number: int) -> Run:
        """Mount, run, record, and take it all away. Raises as record_runs()."""
        order, folder = self.order, self.place.folder(str(number))
        target = folder / "mnt"
        target.mkdir()
        # No prefetch: an optimized image's hot blob would only take the link from what is asked for.
        mount = MountOrder(self.image.reference, str(target), driver=order.driver, platform=order.platform,
                           prefetch=False, registry=order.registry, record=True)
        with contextlib.ExitStack() as stack:
            handle = mount_image(mount, self.cache, attached=True)
            stack.callback(handle.close)
            if handle.result["bootstrap"] != self.image.bootstrap:
                raise BusyError(f"{order.image} has changed meanwhile", hint="run it again")
            container = Container(self.place, folder, f"{self.place.name}-{number}", self.on_line)
            stack.callback(container.close)
            container.prepare(target)
            return self._run_in(container, folder, str(target))

    def _run_in(self, container: Container, folder: Path, target: str) -> Run:
        order = self.order
        program = _program(order, self.image.process, self.words, container.rootfs)
        container.start(runtime_spec(
            program, order.network, order.mounts, _host_files(folder, order.network), cgroup=container.name,
            cgroup_namespace=(CGROUPS / "cgroup.controllers").exists()))
        outcome = container.watch(order.rules, own_network=order.network is Network.NONE)
        recording = recording_of(target, self.image.name)
        container.stop(program.stop_signal, order.rules.grace_s)
        failure = _failure(order.rules, outcome)
        if failure is not None and not order.keep_failed:
            raise failure
        if self.files is None:
            self.files = MountedTables.of(target).files
        return Run(recording, outcome, str(failure or ""))


def _program(order: RunOrder, image: ProcessConfig, words: tuple[str, ...], rootfs: Path) -> Program:
    """Looked up through the container's own root, as containerd does."""
    try:
        passwd = read_inside(rootfs, "/etc/passwd", FILE_BYTES_MAX) or b""
        group = read_inside(rootfs, "/etc/group", FILE_BYTES_MAX) or b""
    except OSError as error:
        raise HostError(f"{error.filename} of the image cannot be read: {error.strerror}",
                        hint="is the registry reachable?") from error
    user = resolve_user(image.user if order.user is None else order.user, passwd, group)
    return Program(words, merge_environment(image.env, order.env), order.cwd or image.cwd, user, image.stop_signal)


def _host_files(folder: Path, network: Network) -> dict[str, str]:
    """What every engine gives a container of the host's. Returns target: source."""
    files = folder / "files"
    files.mkdir(mode=0o755)
    resolv = b""
    with contextlib.suppress(OSError), Path("/etc/resolv.conf").open("rb") as file:
        resolv = file.read(_RESOLV_BYTES_MAX)
    hosts = f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.0.1\t{HOSTNAME}\n".encode()
    if network is Network.HOST:
        with contextlib.suppress(OSError), Path("/etc/hosts").open("rb") as file:
            hosts += file.read(_RESOLV_BYTES_MAX)
    found = {}
    for name, data in (("hosts", hosts), ("hostname", f"{HOSTNAME}\n".encode()), ("resolv.conf", resolv)):
        (files / name).write_bytes(data)
        (files / name).chmod(0o644)
        found[f"/etc/{name}"] = str(files / name)
    return found


def _failure(rules: StopRules, outcome: Outcome) -> LazyfsError | None:
    """Why this run does not count."""
    if outcome.ending is Ending.LATE:
        if rules.until_exit:
            return NotReadyError(f"the program did not end within {rules.timeout_s:g} s",
                                 hint="a server never ends: name a stop rule, for example --until-port or --for")
        return NotReadyError(f"the program did not become ready within {rules.timeout_s:g} s ({rules.describe()})",
                             hint="a longer --timeout, or another stop rule")
    if outcome.ending is Ending.EXITED and outcome.exit_code:
        return ProgramError(f"the program ended with exit code {outcome.exit_code} after {outcome.elapsed_s:.1f} s",
                            hint="what it said is above; --keep-failed records it all the same")
    if outcome.ending is Ending.EXITED and (rules.probes or rules.log is not None):
        return NotReadyError(f"the program ended after {outcome.elapsed_s:.1f} s, before its stop rule was met "
                             f"({rules.describe()})", hint="is the rule right? without one its end ends the run")
    return None
