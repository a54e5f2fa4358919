"""
Nodes of a small real cluster that pull ordinary images: on each a containerd, told by `lazyfs mirror install` of a
`lazyfs mirror`, which is a member of the cluster; all of it in the node's own network.

    with pull_nodes(session, tmp_path, ["2.x", "1.6", ""]) as rig:   # "": a mirror, and no containerd
        name, image = rig.push("app", [SIZE])                 # a layer of so many bytes
        rig.nodes[2].fetch(name, image)                       # into its mirror
        with rig.nodes[0].pulling(name) as pull:              # `ctr images pull`, under way
            assert pull.ended() == ""                         # or what it said
        assert rig.nodes[0].has(image)                        # its content store: every blob, to the byte

Nodes have links of RATE_BIT_S, both ways, and so has the registry.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.kit.cluster import TRACKER_PORTS, Cluster
from lazyfs.image.digest import Digest
from tests.containerdkit import Containerd, running_containerd
from tests.mirrorkit import PushedImage, RunningMirror, image_of, push, running_mirror
from tests.mountkit import LAZYFS
from tests.peerskit import RATE_BIT_S, WAIT_S, wait_for
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from benchmarks.kit.nets import Machine
    from benchmarks.session import Session

PEER_PORT = 9454


class Pull:
    """One `ctr images pull` that is under way."""

    def __init__(self, node: PullNode, name: str) -> None:
        self._process = node.containerd.start_ctr("images", "pull", "--plain-http", "--hosts-dir", str(node.certs),
                                                  name)

    def ended(self) -> str:
        """When it has: "", or what went wrong."""
        try:
            out, errors = self._process.communicate(timeout=WAIT_S)
        except subprocess.TimeoutExpired:
            return f"it hangs after {WAIT_S:g} s"
        return "" if self._process.returncode == 0 else (out + errors)[-2000:]

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


@dataclass(eq=False)
class PullNode:
    """See the module. `certs`: the directory of hosts.toml."""

    name: str
    machine: Machine
    mirror: RunningMirror
    certs: Path
    runtime: Containerd | None

    @property
    def containerd(self) -> Containerd:
        assert self.runtime is not None, f"{self.name} has no containerd"
        return self.runtime

    @contextlib.contextmanager
    def pulling(self, name: str) -> Iterator[Pull]:
        pull = Pull(self, name)
        try:
            yield pull
        finally:
            pull.close()

    def has(self, image: PushedImage) -> bool:
        """Whether its containerd's store has the manifest and all blobs as they were pushed."""
        store = self.containerd.root / "io.containerd.content.v1.content/blobs/sha256"
        return all((store / Digest.of(blob).hex).read_bytes() == blob for blob in [image.data, *image.blobs])

    def install(self) -> None:
        """`lazyfs mirror install`."""
        words = [*self.machine.inside(), *LAZYFS, "mirror", "install", "--config-path", str(self.certs)]
        done = subprocess.run(words, env={**os.environ, "LAZYFS_CONFIG": str(self.mirror.config)}, text=True,
                              capture_output=True, check=False, timeout=WAIT_S)
        assert done.returncode == 0, done.stderr

    def fetch(self, name: str, image: PushedImage) -> None:
        """All of it, by its mirror, for no containerd."""
        host, _, repository = name.rpartition(":")[0].partition("/")
        for path in (f"manifests/{image.digest}", *(f"blobs/{Digest.of(blob)}" for blob in image.blobs)):
            assert self.mirror.get(f"/v2/{repository}/{path}", ns=host).status == 200, self.mirror.log[-2000:]

    def from_peers(self) -> float:
        """Bytes that its mirror had from others."""
        return self.mirror.figure('lazyfs_mirror_fetched_bytes_total{source="peer"}')

    def freeze_mirror(self) -> None:
        assert self.mirror.process is not None
        os.kill(self.mirror.process.pid, signal.SIGSTOP)

    def spoil(self, begin: int) -> None:
        """From there on other bytes in all that its mirror has whole: the sizes stay right."""
        found = [path for path in (self.mirror.directory / "data/pieces/whole").rglob("*") if path.is_file()]
        assert found
        for path in found:
            with path.open("r+b") as file:
                for at in range(begin, path.stat().st_size, 64 << 10):
                    file.seek(at)
                    file.write(b"\xa5")


@dataclass(eq=False)
class Rig:
    cluster: Cluster
    session: Session
    nodes: list[PullNode] = field(default_factory=list)

    def push(self, repository: str, sizes: Sequence[int]) -> tuple[str, PushedImage]:
        """An image with a layer of so many random bytes for each, at the registry: its name there, and what it is."""
        layers = [TarBuilder().directory("d").file(f"d/{number}", os.urandom(size), mode=0o644).build()
                  for number, size in enumerate(sizes)]
        image = image_of(layers)
        push(self.session.near.host, repository, "1", image)
        return f"{self.cluster.registry.host}/{repository}:1", image

    def pull_all(self, name: str, nodes: Sequence[PullNode]) -> list[str]:
        """On these at once: how each ended."""
        with contextlib.ExitStack() as stack:
            pulls = [stack.enter_context(node.pulling(name)) for node in nodes]
            return [pull.ended() for pull in pulls]


@contextlib.contextmanager
def pull_nodes(session: Session, directory: Path, versions: Sequence[str], *,
               rate_bit_s: int = RATE_BIT_S, discovery: str = "static") -> Iterator[Rig]:
    """A node for each of these versions of containerd; all mirrors take part."""
    with Cluster(session, len(versions), rate_bit_s=rate_bit_s, discovery=discovery) as cluster, \
            contextlib.ExitStack() as stack:
        rig = Rig(cluster, session)
        places = ([f"http://{cluster.control.address}:{port}" for port in TRACKER_PORTS] if discovery == "tracker"
                  else [f"{node.machine.address}:{PEER_PORT}" for node in cluster.nodes])
        for node, version in zip(cluster.nodes, versions, strict=True):
            machine = node.machine
            home = directory / node.name
            home.mkdir()
            runtime = (stack.enter_context(running_containerd(home, version, inside=machine.inside())) if version
                       else None)
            mirror = stack.enter_context(running_mirror(home, machine=machine, mirror={
                "containerd_root": str(runtime.root) if runtime else "", "peers_address": f"0.0.0.0:{PEER_PORT}",
            }, sections={
                "peers": {"cluster": "pulls", discovery: places, "node": node.name,
                          "advertise": f"{machine.address}:{PEER_PORT}"},
                "snapshotter": {"containerd_address": str(runtime.address) if runtime else "/nowhere"},
                f'registry.host."{cluster.registry.host}"': {"insecure": True},
            }))
            rig.nodes.append(PullNode(node.name, machine, mirror, home / "certs", runtime))
        wait_for(lambda: all("peers: listening" in one.mirror.log for one in rig.nodes), "all take part")
        for one in rig.nodes:
            if one.runtime is not None:
                one.install()
        yield rig
