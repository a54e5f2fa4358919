"""
containerd instances of a test's own: own root, state, socket and configuration; nothing is left of them afterwards.

    @pytest.mark.parametrize("version", VERSIONS)
    def test_it(tmp_path, version):
        with running_containerd(tmp_path, version, snapshotter=socket_of_lazyfs) as containerd:
            containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", reference)
            containerd.run(reference, "/bin/true", snapshotter="overlayfs")
            containerd.kill(); containerd.start()          # or restart(): containers go on meanwhile

VERSIONS: "1.6" is Debian's, "2.x" what scripts/setup builds (scripts/setup-go); a test is skipped, saying why, where
one is missing.
`snapshotter`: socket of a proxy snapshotter, named lazyfs. `cri`: enable the CRI plugin, with `snapshotter`, and a
network of its own (ptp, no bridge to leave behind). `hosts_dir`: registry configuration (hosts.toml) of CRI.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lazyfs.fs import mountapi
from tests.registrykit import _die_with_parent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

VERSIONS = ("1.6", "2.x")
VERSION_2 = "v2.2.6"             # scripts/setup-go builds it
GO_DIR = Path(os.environ.get("LAZYFS_GO_DIR", "/var/tmp/lazyfs-go"))
CNI_DIR = Path("/usr/lib/cni")
START_S = 30.0
END_S = 20.0
PLUGINS_OFF = [f"io.containerd.snapshotter.v1.{name}"
               for name in ("aufs", "btrfs", "devmapper", "zfs", "blockfile", "erofs")]


@dataclass(frozen=True)
class Programs:
    """Where containerd, ctr and the shim of a version are: in one directory."""

    version: str
    directory: Path

    @property
    def containerd(self) -> Path:
        return self.directory / "containerd"

    @property
    def ctr(self) -> Path:
        return self.directory / "ctr"

    @property
    def shim(self) -> Path:
        return self.directory / "containerd-shim-runc-v2"

    @property
    def is_2(self) -> bool:
        return self.version == "2.x"


def require_containerd(version: str) -> Programs:
    """The programs of a version; skips the calling test where they are not."""
    if os.geteuid() != 0:
        pytest.skip("containerd needs root")
    programs = Programs(version, GO_DIR / VERSION_2 if version == "2.x" else Path("/usr/bin"))
    for program in (programs.containerd, programs.ctr, programs.shim):
        if not program.exists():
            pytest.skip(f"containerd {version}: there is no {program} (scripts/setup installs it)")
    if shutil.which("runc") is None:
        pytest.skip("runc is not installed (apt-get install runc)")
    return programs


@dataclass
class Containerd:
    """One instance. Sockets in `directory`, which therefore must have a short name."""

    programs: Programs
    directory: Path
    config: dict[str, Any]
    inside: Sequence[str] = ()                   # words before its commands, of another network
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def address(self) -> Path:
        return self.directory / "c.sock"

    @property
    def root(self) -> Path:
        return self.directory / "root"

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def log(self) -> str:
        path = self.directory / "containerd.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def _environment(self) -> dict[str, str]:
        path = f"{self.programs.directory}:/usr/sbin:/usr/bin:/sbin:/bin"
        return {**os.environ, "PATH": path, "CONTAINERD_ADDRESS": str(self.address)}

    # --- the process --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start it, and wait until it serves."""
        assert self.process is None, "already started"
        path = self.directory / "config.toml"
        path.write_text("".join(_toml(self.config)))
        with (self.directory / "containerd.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.inside, self.programs.containerd, "--config", path], stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, env=self._environment, preexec_fn=_die_with_parent)  # noqa: PLW1509 - nothing but one prctl
        deadline = time.monotonic() + START_S
        while not (self.address.exists() and self._ctr(["version"], 10).returncode == 0):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"containerd {self.programs.version} did not start: {self.log[-3000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End it as systemd would: containers go on."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        self.stop()
        self.start()

    def _end(self, number: signal.Signals) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    # --- its client ---------------------------------------------------------------------------------------------------

    def _ctr(self, words: list[str], timeout_s: float, namespace: str = "default") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.inside, self.programs.ctr, "--address", self.address, "--namespace", namespace, *words],
            env=self._environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=timeout_s)

    def ctr(self, *words: str | Path, namespace: str = "default", code: int = 0, timeout_s: float = 120) -> str:
        """Run ctr; returns what it wrote to stdout. `code`: the exit code it must have."""
        done = self._ctr([str(word) for word in words], timeout_s, namespace)
        found = f"ctr {words}: {done.returncode}: {done.stdout}{done.stderr}\n{self.log[-3000:]}"
        assert done.returncode == code, found
        return done.stdout

    def start_ctr(self, *words: str | Path, namespace: str = "default") -> subprocess.Popen[str]:
        """ctr in the background, its outputs as pipes; the caller waits for it."""
        return subprocess.Popen(
            [*self.inside, self.programs.ctr, "--address", self.address, "--namespace", namespace, *map(str, words)],
            text=True, env=self._environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, image: str, *command: str, snapshotter: str = "lazyfs", namespace: str = "default",
            code: int = 0) -> str:
        """
        Run a container to its end; its output and its errors. The container is gone afterwards.

        Written by the shim to a file, not through ctr: as ctr 2.2 sees the end it closes its pipes, read or not
        (`cancel` in pkg/cio/io_unix.go), and one of some thousand busy starts lost its words.
        """
        name = f"run-{uuid.uuid4().hex[:12]}"
        output = self.directory / f"{name}.out"
        output.touch()
        try:
            self.ctr("run", "--rm", "--log-uri", f"file://{output}", "--snapshotter", snapshotter, image, name,
                     *command, namespace=namespace, code=code)
            return output.read_text()
        finally:
            output.unlink()

    def namespaces(self) -> list[str]:
        return self.ctr("namespaces", "list", "--quiet").split()

    # --- the end ------------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """End it and all its containers; take away their mounts, cgroups and network. Works however it was left."""
        self.stop()
        for tasks in ("io.containerd.runtime.v2.task", "io.containerd.runtime.v1.linux"):
            for bundle in sorted((self.state / tasks).glob("*/*")):
                self._end_task(bundle)
        for pid in self._shims():        # of tasks that never came into being
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while entries := [entry for entry in mountapi.mounts() if entry.target.startswith(f"{self.directory}/")]:
            for entry in reversed(entries):
                mountapi.unmount(entry.target, mountapi.MNT_DETACH)

    def _end_task(self, bundle: Path) -> None:
        """What containerd does for a task whose shim has died: `shim delete`, which kills and unmounts."""
        for pid in self._shims(bundle.name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        subprocess.run(
            [self.programs.shim, "-namespace", bundle.parent.name, "-address", self.address, "-id", bundle.name,
             "-bundle", bundle, "-publish-binary", self.programs.containerd, "delete"],
            cwd=bundle, env=self._environment, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60)

    def _shims(self, name: str = "") -> list[int]:
        """Pids of our shims: they name our socket."""
        found = []
        for path in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (path / "cmdline").read_bytes().split(b"\0") if path.name.isdigit() else []
                if words and Path(os.fsdecode(words[0])).name.startswith("containerd-shim") and (
                        os.fsencode(self.address) in words) and (not name or name.encode() in words):
                    found.append(int(path.name))
        return found


@contextlib.contextmanager
def running_containerd(
    directory: Path, version: str, *, snapshotter: Path | None = None, cri: bool = False,
    hosts_dir: Path | None = None, sandbox_image: str = "", more: dict[str, Any] | None = None,
    inside: Sequence[str] = (),
) -> Iterator[Containerd]:
    """
    A containerd that serves; with all its containers taken away at the end.

    `more`: tables for its configuration, merged over ours. `inside`: words before its commands, of another network.

    """
    programs = require_containerd(version)
    home = directory / f"c{version[0]}"
    home.mkdir(parents=True)
    containerd = Containerd(programs, home, {}, inside)
    config = base_config(containerd, snapshotter)
    if cri:
        _merge(config["plugins"], cri_config(containerd, snapshotter, hosts_dir, sandbox_image))
    else:
        config["disabled_plugins"].append("io.containerd.grpc.v1.cri")
    _merge(config, more or {})
    containerd.config = config
    try:
        containerd.start()
        yield containerd
    finally:
        containerd.clear()


def base_config(containerd: Containerd, snapshotter: Path | None) -> dict[str, Any]:
    """Nothing shared with any other containerd, and nothing that takes time to start."""
    directory = containerd.directory
    config: dict[str, Any] = {
        "version": 3 if containerd.programs.is_2 else 2,
        "root": str(containerd.root),
        "state": str(containerd.state),
        "disabled_plugins": [*PLUGINS_OFF],
        "grpc": {"address": str(containerd.address)},
        "plugins": {"io.containerd.internal.v1.opt": {"path": str(directory / "opt")}},
    }
    if containerd.programs.is_2:
        config["disabled_plugins"] += ["io.containerd.nri.v1.nri", "io.containerd.tracing.processor.v1.otlp",
                                       "io.containerd.internal.v1.tracing"]
    if snapshotter is not None:
        config["proxy_plugins"] = {"lazyfs": {"type": "snapshot", "address": str(snapshotter)}}
        if containerd.programs.is_2:     # without it, the transfer service unpacks with its own snapshotter only
            unpack = [{"platform": platform, "snapshotter": name} for platform, name in
                      (("linux", "lazyfs"), ("linux", "overlayfs"))]
            config["plugins"]["io.containerd.transfer.v1.local"] = {"unpack_config": unpack}
    return config


def cri_config(
    containerd: Containerd, snapshotter: Path | None, hosts_dir: Path | None, sandbox: str,
) -> dict[str, Any]:
    """The CRI plugin's tables."""
    name = "overlayfs" if snapshotter is None else "lazyfs"
    cni = {"bin_dir": str(CNI_DIR), "conf_dir": str(write_network(containerd.directory))}
    registry = {"config_path": str(hosts_dir)} if hosts_dir else {}
    annotations = {"disable_snapshot_annotations": snapshotter is None}
    often = {"stats_collect_period": 1}     # seconds; 10 by default: tests wait for what is collected
    common = {"netns_mounts_under_state_dir": True, "enable_selinux": False, "restrict_oom_score_adj": True}
    if containerd.programs.is_2:
        images: dict[str, Any] = {"snapshotter": name, "registry": registry, **annotations, **often}
        if sandbox:
            images["pinned_images"] = {"sandbox": sandbox}
        return {
            "io.containerd.cri.v1.images": images,
            "io.containerd.cri.v1.runtime": {**common, "cni": {"bin_dirs": [cni["bin_dir"]],
                                                               "conf_dir": cni["conf_dir"]}},
        }
    return {"io.containerd.grpc.v1.cri": {
        **common, **often, **({"sandbox_image": sandbox} if sandbox else {}), "registry": registry, "cni": cni,
        "containerd": {"snapshotter": name, **annotations}}}


def write_network(directory: Path) -> Path:
    """A CNI configuration: a pair of interfaces a pod, which goes when the pod's network namespace goes."""
    if not (CNI_DIR / "ptp").exists():
        pytest.skip(f"there is no {CNI_DIR}/ptp (apt-get install containernetworking-plugins)")
    path = directory / "cni"
    path.mkdir()
    subnet = f"10.211.{os.getpid() % 256}.0/24"      # each address is a route of the host: not those of tests beside us
    ipam = {"type": "host-local", "dataDir": str(directory / "ipam"), "ranges": [[{"subnet": subnet}]],
            "routes": [{"dst": "0.0.0.0/0"}]}
    (path / "10-test.conflist").write_text(json.dumps({
        "cniVersion": "0.4.0", "name": f"t{uuid.uuid4().hex[:8]}",
        "plugins": [{"type": "ptp", "ipMasq": False, "ipam": ipam}]}))
    return path


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _toml(table: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[str]:
    """Plain values first, then tables: enough for containerd's configuration. JSON's strings and lists are TOML's."""
    if path:
        yield "[" + ".".join(json.dumps(part) for part in path) + "]\n"
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    lists = {key: value for key, value in table.items()
             if isinstance(value, list) and value and isinstance(value[0], dict)}
    for key, value in table.items():
        if key not in tables and key not in lists:
            yield f"{json.dumps(key)} = {json.dumps(value)}\n"
    for key, value in tables.items():
        yield from _toml(value, (*path, key))
    for key, values in lists.items():
        for value in values:
            yield "[[" + ".".join(json.dumps(part) for part in (*path, key)) + "]]\n"
            yield from _toml(value)
