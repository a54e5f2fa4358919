"""
A whole node for tests: registry, daemon, `lazyfs snapshotter` and a containerd of its own that uses it.

    with running_node(tmp_path, "2.x") as node:
        image = node.push("app", FILES)                # converted: host/app:lazy, with a static busybox in it
        node.pull(image)
        node.containerd.run(image, "/bin/busybox", "sha256sum", "/data/f1")
        node.snapshotter.kill(); node.snapshotter.start()
        node.remove_all(); node.assert_nothing_left()
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from lazyfs.image.manifest import parse_manifest
from lazyfs.registry import RegistryOptions, open_source
from snapshotter.api import snapshots_pb2 as api
from snapshotter.api.snapshots_pb2_grpc import SnapshotsStub
from tests.containerdkit import Containerd, require_containerd, running_containerd
from tests.convertkit import LAYER_TYPE, Layout, run_convert
from tests.daemonkit import Daemon, end_daemon, start_daemon
from tests.mountkit import LAZYFS, Machine, require_mounting
from tests.registrykit import Registry, require_registry, running_registry
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lazyfs.image.digest import Digest

BUSYBOX = Path("/usr/bin/busybox")
WAIT_S = 30.0
OPTIONS = RegistryOptions(insecure=True)


@dataclass
class SnapshotterProcess:
    """`lazyfs snapshotter` of a test."""

    machine: Machine
    containerd_address: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    words: tuple[str, ...] = ()      # options besides

    @property
    def root(self) -> Path:
        return self.machine.directory / "snapshots"

    @property
    def address(self) -> Path:
        return self.machine.directory / "s.sock"

    @property
    def log(self) -> Path:
        return self.machine.directory / "snapshotter.log"

    def start(self) -> None:
        """Start it, and wait until it listens."""
        words = ["snapshotter", "--root", self.root, "--address", self.address,
                 "--containerd-address", self.containerd_address, *self.words]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*LAZYFS, *words], env={**self.machine.environment, **self.environment}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log)
        deadline = time.monotonic() + WAIT_S
        while not self._answers():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def end(self, number: signal.Signals) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(number)
            process.wait(WAIT_S)

    def kill(self) -> None:
        self.end(signal.SIGKILL)

    def kill_server(self) -> None:
        """Kill what answers behind the door; returns when it is gone."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        (server,) = children.read_text(encoding="ascii").split()
        os.kill(int(server), signal.SIGKILL)
        deadline = time.monotonic() + WAIT_S
        while server in children.read_text(encoding="ascii").split():
            assert time.monotonic() < deadline, "it does not die"
            time.sleep(0.01)

    def _answers(self) -> bool:
        """Really: the door takes connections before there is a server."""
        with grpc.insecure_channel(f"unix:{self.address}") as channel:
            try:
                list(SnapshotsStub(channel).List(api.ListSnapshotsRequest(filters=["name==none"]), timeout=2))
            except grpc.RpcError:
                return False
            return True


@dataclass
class Node:
    """All of it. `images`: what was pushed, in order."""

    machine: Machine
    registry: Registry
    daemon: Daemon
    snapshotter: SnapshotterProcess
    containerd: Containerd
    images: list[str] = field(default_factory=list)

    def push(self, name: str, files: Mapping[str, bytes], *, lazy: bool = True) -> str:
        """An image of two layers, busybox and data/*, pushed; its reference."""
        data = TarBuilder().directory("data")
        for path, content in files.items():
            data.file(f"data/{path}", content)
        return self.push_layers(name, [data.build()], lazy=lazy)

    def push_layers(self, name: str, layers: list[bytes], *, lazy: bool = True) -> str:
        """An image of these layers above busybox, pushed; its reference."""
        layout = Layout(self.machine.directory / f"{name}-source")
        layout.add_image(name, [busybox_layer(), *layers])
        image = f"{self.registry.host}/{name}:{'lazy' if lazy else 'plain'}"
        if lazy:
            run_convert(layout.reference(name), f"docker://{image}", registry=OPTIONS)
        else:
            copy_image(layout.reference(name), f"docker://{image}")
        self.images.append(image)
        return image

    def pull(self, image: str, *, namespace: str = "default") -> None:
        """As a user does: containerd 2.x pulls by its transfer service, 1.6 needs `lazyfs pull`."""
        if self.containerd.programs.is_2:
            self.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "lazyfs", image,
                                namespace=namespace)
        else:
            self.lazyfs_pull(image, namespace=namespace)

    def lazyfs_pull(self, image: str, *, namespace: str = "default") -> None:
        self.machine.lazyfs("pull", "--containerd-address", self.containerd.address, "--namespace", namespace,
                            "--insecure", image)

    def sums(self, image: str, names: list[str], *, namespace: str = "default") -> dict[str, str]:
        """SHA-256 of files in data/, computed by a container."""
        output = self.containerd.run(image, "/bin/busybox", "sha256sum", *(f"/data/{name}" for name in names),
                                     namespace=namespace)
        return {Path(line.split()[1]).name: line.split()[0] for line in output.splitlines()}

    def content(self, *, namespace: str = "default") -> set[str]:
        """Digests in the content store."""
        return set(self.containerd.ctr("content", "list", "--quiet", namespace=namespace).split())

    def lazy_mounts(self) -> list[str]:
        below = f"{self.snapshotter.root}/images/"
        return [entry.target for entry in self.machine.mounts() if entry.target.startswith(below)]

    def collect(self, *, namespace: str = "default") -> None:
        """Have containerd collect garbage now: removing a lease can wait for it."""
        self.containerd.ctr("leases", "create", "--id", "gone", namespace=namespace)
        self.containerd.ctr("leases", "delete", "--sync", "gone", namespace=namespace)

    def remove_all(self, *namespaces: str) -> None:
        """Remove all images, and wait for containerd to have collected what was theirs."""
        for namespace in namespaces or ("default",):
            names = self.containerd.ctr("images", "list", "--quiet", namespace=namespace).split()
            if names:
                self.containerd.ctr("images", "remove", "--sync", *names, namespace=namespace)

    def start_snapshotter(self) -> None:
        """Start it again, and wait until containerd has found it: gRPC tries anew after a second or three only."""
        self.snapshotter.start()
        deadline = time.monotonic() + WAIT_S
        while not self._finds_snapshotter():
            assert time.monotonic() < deadline, self.snapshotter.log.read_text()
            time.sleep(0.05)

    def _finds_snapshotter(self) -> bool:
        with self.containerd.start_ctr("snapshots", "--snapshotter", "lazyfs", "list") as listing:
            listing.communicate(timeout=WAIT_S)
        return listing.returncode == 0

    def restart_daemon(self) -> None:
        """After `daemon.stop()`."""
        self.daemon.process = start_daemon(self.machine).process
        self.daemon.wait_ready()

    def reboot(self) -> None:
        """Processes and mounts are gone, and what is below /run; state directories stay. Then everything starts."""
        self.containerd.clear()
        shutil.rmtree(self.containerd.state)
        self.snapshotter.kill()
        end_daemon(self.daemon)      # keeper, worker, and all mounts
        shutil.rmtree(self.machine.run_dir)
        self.restart_daemon()
        self.snapshotter.start()
        self.containerd.start()

    def assert_nothing_left(self) -> None:
        """No lazy mount, no mount point, no record, no snapshot, nothing that the daemon serves."""
        deadline = time.monotonic() + WAIT_S
        while left := self._left():
            assert time.monotonic() < deadline, f"{left}\n{self.snapshotter.log.read_text()[-3000:]}"
            time.sleep(0.1)

    def _left(self) -> list[str]:
        health = self.daemon.health()
        served = [] if health["mounts"] + health["detached"] == 0 else ["served by the daemon"]
        kept = [str(path) for name in ("images", "lazy", "snapshots") if (self.snapshotter.root / name).is_dir()
                for path in (self.snapshotter.root / name).iterdir()]
        return [*served, *kept, *self.lazy_mounts()]


def busybox_layer() -> bytes:
    if not BUSYBOX.exists() or shutil.which("skopeo") is None:
        pytest.skip("busybox-static or skopeo is not installed")
    return TarBuilder().directory("bin").file("bin/busybox", BUSYBOX.read_bytes(), mode=0o755).build()


def copy_image(source: str, destination: str) -> None:
    """By skopeo, digests kept."""
    subprocess.run(["skopeo", "copy", "--quiet", "--preserve-digests", "--src-tls-verify=false",
                    "--dest-tls-verify=false", source, destination], check=True)


def sums_of(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def layer_digests(image: str) -> tuple[list[Digest], Digest]:
    """Of a lazy image: its blobs, its bootstrap."""
    source = open_source(image, OPTIONS)
    try:
        root = source.root()
        layers = [layer.digest for layer in parse_manifest(root.data, root.media_type).layers]
    finally:
        source.close()
    return layers[:-1], layers[-1]


def add_layer(image: str, tar: bytes, directory: Path) -> str:
    """The image with an ordinary layer on top, as `docker build FROM image` makes it; pushed as <image>-more."""
    copy_image(f"docker://{image}", f"oci:{directory}:more")
    index = json.loads((directory / "index.json").read_bytes())
    blobs = directory / "blobs" / "sha256"

    def put(data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    def get(descriptor: dict[str, str]) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((blobs / descriptor["digest"].removeprefix("sha256:")).read_bytes())
        return found

    manifest = get(index["manifests"][0])
    config = get(manifest["config"])
    layer = put(tar)
    config["rootfs"]["diff_ids"].append(layer["digest"])
    config.get("history", []).append({"created_by": "test"})
    manifest["config"].update(put(json.dumps(config).encode()))
    manifest["layers"].append({"mediaType": LAYER_TYPE, **layer})
    index["manifests"][0].update(put(json.dumps(manifest).encode()))
    (directory / "index.json").write_text(json.dumps(index))
    copy_image(f"oci:{directory}:more", f"docker://{image}-more")
    return f"{image}-more"


class Reader(threading.Thread):
    """Reads files in turn, past the page cache, until told to stop; keeps what went wrong."""

    def __init__(self, directory: Path, files: Mapping[str, bytes]) -> None:
        super().__init__()
        self._directory, self._files = directory, files
        self.problems: list[str] = []
        self.rounds = 0
        self._stop_it = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stop_it.is_set():
            for name, data in self._files.items():
                try:
                    descriptor = os.open(self._directory / name, os.O_RDONLY)
                    try:
                        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                        found = os.pread(descriptor, len(data) + 1, 0)
                    finally:
                        os.close(descriptor)
                    if found != data:
                        self.problems.append(f"{name}: wrong bytes")
                except OSError as error:
                    self.problems.append(f"{name}: {error}")
            self.rounds += 1

    def finish(self) -> None:
        """Two whole rounds more, then the end; everything was right."""
        goal, deadline = self.rounds + 2, time.monotonic() + 60
        while self.rounds < goal and not self.problems:
            assert time.monotonic() < deadline, "the reader is stuck"
            time.sleep(0.01)
        self._stop_it.set()
        self.join(60)
        assert not self.is_alive(), "the reader is stuck"
        assert not self.problems, self.problems[:5]


@contextlib.contextmanager
def running_node(directory: Path, version: str, *, driver: str = "auto", cri: bool = False) -> Iterator[Node]:
    """A node that serves; nothing of it is left afterwards."""
    require_mounting()
    require_registry()
    require_containerd(version)
    machine = Machine(directory)
    socket_of_containerd = directory / f"c{version[0]}" / "c.sock"
    snapshotter = SnapshotterProcess(machine, socket_of_containerd, {"LAZYFS_DAEMON_DRIVER": driver})
    with contextlib.ExitStack() as stack:
        daemon = start_daemon(machine)
        stack.callback(end_daemon, daemon)
        registry = stack.enter_context(running_registry(directory / "registry"))    # while the daemon imports
        daemon.wait_ready()
        stack.callback(snapshotter.kill)
        snapshotter.start()
        containerd = stack.enter_context(
            running_containerd(directory, version, snapshotter=snapshotter.address, cri=cri))
        yield Node(machine, registry, daemon, snapshotter, containerd)


def kill_worker(daemon: Daemon) -> int:
    """SIGKILL; the pid that it had."""
    worker = daemon.worker()
    os.kill(worker, signal.SIGKILL)
    return worker
