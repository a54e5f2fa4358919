"""Mirrors of several nodes: an ordinary image comes from the registry about once, the rest from each other."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from lazyfs.image.digest import Digest
from tests.faultproxy import FaultProxy
from tests.mirrorkit import RunningMirror, image_of, push, running_mirror
from tests.ports import free_port
from tests.registrykit import Registry, running_registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1024 * 1024
COUNT = 3


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture(scope="module")
def mirrors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RunningMirror]]:
    """Each on an address of its own of loopback, with the same port, as nodes are."""
    port = free_port()
    addresses = [f"127.0.0.{number}:{port}" for number in range(2, 2 + COUNT)]
    with contextlib.ExitStack() as stack:
        found = []
        for number, address in enumerate(addresses):
            sections: dict[str, dict[str, Any]] = {"peers": {"cluster": "test", "static": addresses}}
            found.append(stack.enter_context(running_mirror(
                tmp_path_factory.mktemp(f"node{number}"), mirror={"peers_address": address}, sections=sections)))
        deadline = time.monotonic() + 30
        while not all("peers: listening" in one.log for one in found):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield found


def pull(mirror: RunningMirror, host: str, repository: str, blobs: list[bytes]) -> None:
    assert mirror.get(f"/v2/{repository}/manifests/1", ns=host).status == 200
    for blob in blobs:
        answer = mirror.get(f"/v2/{repository}/blobs/{Digest.of(blob)}", ns=host)
        assert (answer.status, answer.body == blob) == (200, True), mirror.log[-3000:]


def bytes_asked(proxy: FaultProxy) -> int:
    """Of blobs, by the ranges of the requests that the registry saw."""
    total = 0
    for one in proxy.seen("GET", "/blobs/"):
        first, _, last = one.headers.get("range", "").removeprefix("bytes=").partition("-")
        total += int(last) - int(first) + 1 if last else 0
    return total


def until(attempt: Callable[[int], bool]) -> None:
    """attempt(number), until it is true: on a busy machine peers find each other too slow for a while, and say so."""
    deadline = time.monotonic() + 120
    for number in itertools.count():
        if attempt(number):
            return
        assert time.monotonic() < deadline
        time.sleep(1)


def test_all_at_once_they_fetch_from_each_other(registry: Registry, mirrors: list[RunningMirror]) -> None:
    """How little of it comes from the registry is measured where each node has a link of its own (benchmarks)."""

    def attempt(number: int) -> bool:
        image, name = image_of([os.urandom(8 * MIB), os.urandom(300_000)]), f"together{number}"
        push(registry.host, name, "1", image)
        with FaultProxy(registry.host) as proxy, ThreadPoolExecutor(COUNT) as pool:
            for done in [pool.submit(pull, one, proxy.host, name, image.blobs) for one in mirrors]:
                done.result(120)
            return bytes_asked(proxy) < 0.7 * COUNT * sum(map(len, image.blobs))

    until(attempt)
    assert sum(one.figure('lazyfs_mirror_fetched_bytes_total{source="peer"}') for one in mirrors) > 2 * MIB


def test_who_comes_later_gets_it_from_peers(registry: Registry, mirrors: list[RunningMirror]) -> None:
    def attempt(number: int) -> bool:
        image, name = image_of([os.urandom(3 * MIB)]), f"later{number}"
        push(registry.host, name, "1", image)
        pull(mirrors[0], registry.host, name, image.blobs)
        with FaultProxy(registry.host) as proxy:
            pull(mirrors[1], proxy.host, name, image.blobs)
            return bytes_asked(proxy) < MIB

    until(attempt)


def test_a_peer_that_is_killed_costs_no_data(registry: Registry, mirrors: list[RunningMirror]) -> None:
    image = image_of([os.urandom(4 * MIB)])
    push(registry.host, "dies", "1", image)
    pull(mirrors[0], registry.host, "dies", image.blobs)
    mirrors[0].stop(signal.SIGKILL)
    try:
        pull(mirrors[1], registry.host, "dies", image.blobs)
    finally:
        mirrors[0].start()
    pull(mirrors[0], registry.host, "dies", image.blobs)
