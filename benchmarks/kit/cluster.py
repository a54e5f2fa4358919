"""
A real cluster on one machine: registry, Redis, trackers and node daemons, each in a network namespace of its own.

    with Cluster(session, 8, rate_bit_s=200_000_000) as cluster:
        image = cluster.image("some", 200 << 20)     # one file `data` of incompressible bytes
        for node in cluster.nodes: node.start()
        cluster.nodes[0].mount(image) / .data        # the file

Used by benchmarks.peerrows and tests/peers. Its directories, processes and namespaces are the workspace's, which takes
away whatever is left. `discovery`: "tracker" (two, on one Redis), "static", or "none": nodes without peers.
"""

from __future__ import annotations

import http.client
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from benchmarks.faultrows.images import random_image
from benchmarks.kit.daemon import NodeDaemon
from benchmarks.kit.lazy import COMMAND, trust
from benchmarks.kit.nets import Rack
from benchmarks.kit.proc import Daemon, ToolError, attempt
from benchmarks.kit.registry import Registry, start_registry
from benchmarks.kit.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.kit.nets import Machine
    from benchmarks.session import Session

_REGISTRY, _CONTROL = "registry", "control"
_REDIS_PORT = 6379
TRACKER_PORTS = (9461, 9462)
PEER_PORT = 9451
_START_TIMEOUT_S = 60.0
_POLL_S = 0.05


class Node:
    """One machine of the cluster with its daemon. `data`: the image's one file."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.name = name
        self.machine: Machine = cluster.rack[name]
        self.place = Workspace(os.getpid())
        self.place.top = cluster.place.folder(name)
        self.place.stack = cluster.place.stack
        self.mount_path = self.place.top / "mnt"
        self._cluster = cluster
        self._daemon: NodeDaemon | None = None

    @property
    def daemon(self) -> NodeDaemon:
        assert self._daemon is not None, "start it first"
        return self._daemon

    @property
    def data(self) -> Path:
        return self.mount_path / "data"

    def start(self, *, ready: bool = True, **peers: str) -> None:
        """Start its daemon, with an empty cache. `peers`: keys of [peers] as TOML values, besides the cluster's."""
        trust(self.place, self._cluster.registry.host)
        keys = {**self._cluster.settings(self), **peers} if self._cluster.discovery != "none" else {}
        config = self.place.top / "lazyfs.toml"
        text = config.read_text().partition("[peers]")[0]
        config.write_text(text + "[peers]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items()))
        self._daemon = NodeDaemon(self.place, self.place.folder("cache"), inside=self.machine.inside(),
                                  ready=ready)

    def mount(self, image: str, *, prefetch: bool = True) -> None:
        """Ask the daemon, as the snapshotter does."""
        if prefetch:
            self.daemon.ask_mount(image, self.mount_path)
        else:
            self.daemon.mount(image, self.mount_path, "--no-prefetch")

    def freeze(self) -> None:
        """SIGSTOP its keeper and its worker."""
        for pid in (self.daemon.keeper, self.daemon.worker):
            os.kill(pid, signal.SIGSTOP)

    def kill(self) -> None:
        """Its processes, at once; its mounts stay behind, dead, until the cluster goes."""
        self.daemon.kill()

    def peers(self) -> dict[str, Any]:
        """What the worker says of its peers (node.peering): {} while it does not."""
        found: dict[str, Any] = self.daemon.status().get("peers", {})
        return found

    def takes_part(self) -> bool:
        """It listens, and a tracker (if there is one) has answered it."""
        found = self.peers()
        membership = found.get("membership", {})
        return bool(found.get("listens") and not membership["lost_s"] and membership.get("tracker", "static"))

    def close(self) -> None:
        """Take its processes away: quickly, for what it leaves goes with its directory."""
        if self._daemon is not None:
            self._daemon.kill()


class Cluster:
    """See the module. Enter it before anything else."""

    def __init__(self, session: Session, count: int, *, rate_bit_s: int = 0, registry_bit_s: int = 0,
                 discovery: str = "tracker") -> None:
        """`rate_bit_s`: of every link, both ways; 0: unshaped. `registry_bit_s`: the registry's, where another."""
        self.place, self.session = session.place, session
        self._count, self._rate, self._registry_rate = count, rate_bit_s, registry_bit_s or rate_bit_s
        self.discovery = discovery
        self.nodes: list[Node] = []
        self.trackers: list[Daemon] = []
        self.redis: Daemon | None = None

    def __enter__(self) -> Self:
        names = [f"n{number}" for number in range(1, self._count + 1)]
        self.rack = Rack(f"{self.place.net_name}-{os.urandom(2).hex()}", [_REGISTRY, _CONTROL, *names])
        self.rack.__enter__()
        try:
            for name in names if self._rate else ():
                self.rack.shape(name, self._rate)
            if self._registry_rate:
                self.rack.shape(_REGISTRY, self._registry_rate)
            if self.discovery == "tracker":
                self.start_redis()
                for number in range(len(TRACKER_PORTS)):
                    self.trackers.append(self.start_tracker(number))
            self.nodes = [Node(self, name) for name in names]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.close()
        for server in (*self.trackers, self.redis):
            if server is not None:
                attempt(["kill", "-CONT", str(server.pid)])
                server.close()
        if "registry" in self.__dict__:
            self.registry.close()
        self.rack.__exit__()
        for node in self.nodes:
            self.place.folder(node.name).rmdir()     # what a killed one had mounted, too

    @cached_property
    def registry(self) -> Registry:
        """The registry behind its own link; the session's images are in it."""
        return start_registry(self.place, link=self.rack[_REGISTRY])

    def restart_registry(self) -> None:
        """Kill it, if it lives, and start it again: same address, same images."""
        self.registry.close()
        self.__dict__["registry"] = start_registry(self.place, link=self.rack[_REGISTRY])

    @property
    def control(self) -> Machine:
        """Where Redis and the trackers are."""
        return self.rack[_CONTROL]

    def image(self, name: str, size: int) -> str:
        """The reference that the nodes use; made when first asked for."""
        return random_image(self.session, name, size, self.registry)

    def origin_bytes(self) -> int:
        """That the registry's machine has sent since the cluster was made, headers included."""
        return self.rack.counted()[_REGISTRY].sent

    def settings(self, node: Node) -> dict[str, str]:
        """The [peers] of a node: TOML values."""
        keys = {"cluster": '"bench"', "node": f'"{node.name}"', "address": f'"0.0.0.0:{PEER_PORT}"',
                "advertise": f'"{node.machine.address}:{PEER_PORT}"'}
        if self.discovery == "tracker":
            urls = [f'"http://{self.control.address}:{port}"' for port in TRACKER_PORTS]
            return {**keys, "tracker": f"[{', '.join(urls)}]"}
        places = [f'"{one.machine.address}:{PEER_PORT}"' for one in self.nodes]
        return {**keys, "static": f"[{', '.join(places)}]"}

    def start_redis(self) -> None:
        address = self.control.address
        words = ["redis-server", "--bind", address, "--port", str(_REDIS_PORT), "--protected-mode", "no", "--save", "",
                 "--appendonly", "no", "--dir", str(self.place.top)]
        self.redis = Daemon([*self.control.inside(), *words], log=self.place.top / "redis.log")
        cli = [*self.control.inside(), "redis-cli", "-h", address, "-p", str(_REDIS_PORT), "ping"]
        _wait("Redis answers", lambda: attempt(cli), self.redis)

    def start_tracker(self, number: int) -> Daemon:
        """Start one (again)."""
        address = f"{self.control.address}:{TRACKER_PORTS[number]}"
        config = self.place.top / f"tracker{number}.toml"
        config.write_text(f'[tracker]\naddress = "{address}"\n'
                          f'redis = "redis://{self.control.address}:{_REDIS_PORT}/0"\n')
        config.chmod(0o600)
        server = Daemon([*self.control.inside(), COMMAND, "tracker"], log=self.place.top / f"tracker{number}.log",
                        env={"LAZYFS_CONFIG": str(config)})
        _wait(f"the tracker at {address} answers", lambda: self.control.reach(lambda: _is_ready(address)), server)
        return server

    def start(self, **peers: str) -> None:
        """Start all daemons at once; returns when they take part. `peers`: as of Node.start."""
        for node in self.nodes:
            node.start(ready=False, **peers)
        for node in self.nodes:
            node.daemon.wait_ready()
        for node in self.nodes if self.discovery != "none" else ():
            _wait(f"{node.name} takes part", node.takes_part, None)

    def mount(self, image: str, *, prefetch: bool = True) -> None:
        """On all nodes at once."""
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            list(pool.map(lambda node: node.mount(image, prefetch=prefetch), self.nodes))


def _is_ready(address: str) -> bool:
    connection = http.client.HTTPConnection(address, timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _wait(what: str, condition: Callable[[], bool], server: Daemon | None) -> None:
    limit = time.monotonic() + _START_TIMEOUT_S
    while not condition():
        if server is not None:
            server.check()
        if time.monotonic() > limit:
            raise ToolError(f"expected that {what}")
        time.sleep(_POLL_S)
