"""Daemons that are peers: what one has the others need not fetch; and what is wrong with peers ends no read."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from lazyfs import config
from lazyfs.doctor import Status, Subject, examine
from lazyfs.doctor.peers import check_peers, check_trackers
from lazyfs.node import protocol
from tests import daemonkit
from tests.convertkit import registry_with, tar_of
from tests.faultproxy import FaultProxy
from tests.mountkit import LAZYFS, Machine, require_mounting
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.daemonkit import Daemon

pytestmark = pytest.mark.mount
MIB = 1 << 20
FILES = {f"f{number}": random.Random(number).randbytes(4 * MIB) for number in range(4)}
IMAGE_BYTES = len(FILES) * 4 * MIB
WAIT_S = 60.0


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    require_mounting()
    layers = [tar_of({"f0": FILES["f0"], "f1": FILES["f1"]}), tar_of({"f2": FILES["f2"], "f3": FILES["f3"]})]
    with registry_with(tmp_path_factory.mktemp("registry"), {"app": layers}) as running:
        yield running.host


@pytest.fixture
def registry(upstream: str) -> Iterator[FaultProxy]:
    with FaultProxy(upstream) as proxy:
        yield proxy


class Nodes:
    """`count` daemons that know each other by a list."""

    def __init__(self, path: Path, count: int, **keys: str) -> None:
        self.places = [f"127.0.0.1:{free_port()}" for _ in range(count)]
        self.machines = [Machine(path / f"n{number}") for number in range(count)]
        self.daemons = [self._start(number, keys) for number in range(count)]
        for daemon in self.daemons:
            daemon.wait_ready()
        for number in range(count):
            until(lambda number=number: self.peers(number).get("listens"))

    def _start(self, number: int, keys: dict[str, str]) -> Daemon:
        known = {} if "tracker" in keys else {"static": ",".join(self.places)}
        peers = {"cluster": "test", "node": f"n{number}", "address": self.places[number], **known, **keys}
        environment = {f"LAZYFS_PEERS_{name.upper()}": value for name, value in peers.items()}
        return daemonkit.start_daemon(self.machines[number],
                                      environment={**environment, "LAZYFS_CACHE_FULL_COPY": "off"})

    def status(self, number: int) -> dict[str, Any]:
        with protocol.ControlClient.connect(self.daemons[number].directory.socket) as client:
            found: dict[str, Any] = client.request(protocol.STATUS, 20)
            return found

    def peers(self, number: int) -> dict[str, Any]:
        return self.status(number).get("peers", {})

    def mount(self, number: int, registry: FaultProxy) -> Path:
        target = self.machines[number].target("app")
        self.machines[number].lazyfs("mount", f"{registry.host}/app:lazy", target, "--insecure")
        return target

    def stop(self) -> None:
        for daemon in self.daemons:
            daemonkit.end_daemon(daemon)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Callable[..., Nodes]]:
    made: list[Nodes] = []

    def make(count: int, **keys: str) -> Nodes:
        made.append(Nodes(tmp_path, count, **keys))
        return made[-1]

    with contextlib.ExitStack() as stack:
        yield make
        for one in made:
            stack.callback(one.stop)


def until(condition: Callable[[], object], seconds: float = WAIT_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


def read(target: Path, *names: str) -> None:
    for name in names or FILES:
        assert (target / name).read_bytes() == FILES[name]


def blob_bytes(registry: FaultProxy) -> int:
    """What was asked for of blobs, by ranges."""
    total = 0
    for seen in registry.seen("GET", r"/blobs/"):
        start, _, end = seen.headers.get("range", "").partition("=")[2].partition("-")
        total += int(end) - int(start) + 1 if end else 0
    return total


def test_what_a_peer_has_the_registry_is_not_asked_for(registry: FaultProxy, nodes: Callable[..., Nodes]) -> None:
    two = nodes(2)
    first, second = two.mount(0, registry), two.mount(1, registry)
    read(first)
    before = blob_bytes(registry)
    assert before >= IMAGE_BYTES
    registry.down()
    read(second)
    assert two.status(1)["fetch"]["peer_bytes"] + two.status(1)["fetch"]["fetched_stored_bytes"] >= IMAGE_BYTES
    assert two.peers(0)["uploads"]["bytes"] > 0
    assert blob_bytes(registry) == before


def test_an_unmounted_image_is_given_too_and_a_dead_peer_is_no_obstacle(
    registry: FaultProxy, nodes: Callable[..., Nodes]
) -> None:
    three = nodes(3)
    first = three.mount(0, registry)
    read(first)
    three.machines[0].lazyfs("umount", first)
    second = three.mount(1, registry)
    read(second, "f0", "f1")
    assert three.status(1)["fetch"]["peer_bytes"] > 0
    os.kill(three.daemons[0].process.pid, signal.SIGKILL)
    os.kill(three.daemons[0].worker(), signal.SIGKILL)
    began = time.monotonic()
    read(second, "f2", "f3")
    assert time.monotonic() - began < WAIT_S / 2


def test_a_worker_that_is_replaced_serves_its_peers_again(registry: FaultProxy, nodes: Callable[..., Nodes]) -> None:
    two = nodes(2)
    first, second = two.mount(0, registry), two.mount(1, registry)
    read(first)
    old = two.daemons[0].worker()
    os.kill(old, signal.SIGKILL)
    two.daemons[0].wait_ready(not_worker=old)
    until(lambda: two.peers(0).get("listens"))
    registry.down()
    read(second)


@contextlib.contextmanager
def running_tracker(**keys: str) -> Iterator[str]:
    """Its URL; `keys` of [tracker]."""
    environment = {**os.environ, **{f"LAZYFS_TRACKER_{name.upper()}": value for name, value in keys.items()}}
    words = [*LAZYFS, "tracker", "--json", "--address", f"127.0.0.1:{free_port()}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          env=environment) as process:
        try:
            assert process.stdout is not None
            yield f"http://{json.loads(process.stdout.readline())['addresses'][0]}"
        finally:
            process.terminate()


def peers_results(peers: config.Peers, run_dir: Path) -> dict[str, Status]:
    """What `lazyfs doctor` says of peers."""
    found = config.Config()
    whole = replace(found, daemon=replace(found.daemon, run_dir=str(run_dir)), peers=peers)
    results = examine(Subject(whole), (check_trackers, check_peers))
    return {one.name: one.status for one in results}


def test_daemons_with_a_tracker_find_each_other_and_go_on_without_it(
    registry: FaultProxy, nodes: Callable[..., Nodes]
) -> None:
    with running_tracker() as url:
        two = nodes(2, tracker=url)
        first, second = two.mount(0, registry), two.mount(1, registry)
        read(first, "f0", "f1")
        until(lambda: two.peers(1)["membership"]["members"] == 2)
        read(second, "f0", "f1")
        assert two.status(1)["fetch"]["peer_bytes"] > 0
        shown = subprocess.run([*LAZYFS, "peers"], env=two.machines[1].environment, capture_output=True, text=True,
                               check=True, timeout=30).stdout
        assert "cluster test: n1" in shown
        assert "n0" in shown
        peers = config.Peers(cluster="test", tracker=(url,), address=two.places[1])
        ok = Status.OK
        assert peers_results(peers, two.machines[1].run_dir) == {"tracker": ok, "peers": ok, "peer server": ok}
    read(first, "f2", "f3")
    before = two.status(1)["fetch"]["peer_bytes"]
    read(second, "f2", "f3")    # the tracker is gone, the members are known
    assert two.status(1)["fetch"]["peer_bytes"] > before
    assert peers_results(peers, two.machines[1].run_dir)["tracker"] is Status.FAILED


def test_with_tokens_those_who_may_pull_an_image_share_it(registry: FaultProxy, nodes: Callable[..., Nodes]) -> None:
    with running_tracker(tokens="resource", registries=registry.host) as url:
        two = nodes(2, tracker=url, tokens="resource")
        first, second = two.mount(0, registry), two.mount(1, registry)
        read(first, "f0", "f1")
        until(lambda: two.peers(1)["membership"]["members"] == 2)
        read(second, "f0", "f1")
        assert two.status(1)["fetch"]["peer_bytes"] > 0
        assert two.peers(1)["tokens"]["issued"] > 0
        assert two.peers(0)["tokens"]["admitted"] > 0
        peers = config.Peers(cluster="test", tracker=(url,), address=two.places[1], tokens="resource")
        assert peers_results(peers, two.machines[1].run_dir)["tracker"] is Status.OK


def test_without_a_token_all_comes_from_the_registry_and_nobody_is_blamed(
    registry: FaultProxy, nodes: Callable[..., Nodes]
) -> None:
    with running_tracker(tokens="resource", registries="registry.example") as url:     # it does not ask ours
        two = nodes(2, tracker=url, tokens="resource")
        first, second = two.mount(0, registry), two.mount(1, registry)
        read(first, "f0", "f1")
        until(lambda: two.peers(1)["membership"]["members"] == 2)
        read(second)
        assert two.status(1)["fetch"]["peer_bytes"] == two.peers(0)["uploads"]["bytes"] == 0
        assert two.peers(1)["tokens"]["failed"] > 0
        assert not any(one["away"] for one in two.peers(1)["peers"])
        assert "this tracker does not ask" in two.peers(1)["tokens"]["last_failed"]["why"]
        peers = config.Peers(cluster="test", tracker=(url,), address=two.places[1], tokens="resource")
        assert peers_results(peers, two.machines[1].run_dir)["tokens"] is Status.WARNING


@pytest.mark.parametrize(("shown", "status", "said"), [
    ("right-word-of-this-tracker", Status.OK, "is ready"),
    ("another-word-of-this-tracker", Status.FAILED, "this is not it"),
    ("short", Status.FAILED, "at least 16"),
    ("", Status.FAILED, "this is not it"),
])
def test_the_doctor_shows_the_tracker_the_word(tmp_path: Path, shown: str, status: Status, said: str) -> None:
    for name, word in (("theirs", "right-word-of-this-tracker"), ("ours", shown)):
        (tmp_path / name).write_text(word)
        (tmp_path / name).chmod(0o600)
    with running_tracker(token_file=str(tmp_path / "theirs")) as url:
        ours = str(tmp_path / "ours") if shown else ""
        peers = config.Peers(cluster="test", tracker=(url,), tracker_token_file=ours)
        [found] = examine(Subject(replace(config.Config(), peers=peers)), (check_trackers,))
    assert found.status is status
    assert said in found.text
    assert status is Status.OK or found.hint


def test_peers_that_are_all_gone_cost_a_mount_nothing(
    machine: Machine, registry: FaultProxy
) -> None:
    environment = {"LAZYFS_PEERS_CLUSTER": "test", "LAZYFS_PEERS_TRACKER": f"http://127.0.0.1:{free_port()}",
                   "LAZYFS_PEERS_ADDRESS": f"127.0.0.1:{free_port()}", "LAZYFS_CACHE_FULL_COPY": "off"}
    daemon = daemonkit.start_daemon(machine, environment=environment)
    try:
        daemon.wait_ready()
        target = machine.target("app")
        machine.lazyfs("mount", f"{registry.host}/app:lazy", target, "--insecure")
        began = time.monotonic()
        read(target)
        assert time.monotonic() - began < WAIT_S / 2
    finally:
        daemonkit.end_daemon(daemon)
