"""`lazyfs preheat` through a real tracker, to a real daemon and real mirrors; peers spare the server."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import time
from base64 import b64encode
from contextlib import asynccontextmanager, contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import pytest
import trio

from lazyfs import config
from lazyfs.image.digest import Digest
from lazyfs.limits import MIB
from lazyfs.mirror import web
from lazyfs.mirror.geturl import Getter, Wanted
from lazyfs.mirror.serving import opened
from lazyfs.mirror.urls import Urls
from lazyfs.registry.options import RegistryOptions
from tests import daemonkit
from tests.convertkit import registry_with, tar_of
from tests.faultproxy import FaultProxy
from tests.mirrorkit import image_of, push
from tests.mountkit import LAZYFS
from tests.ports import free_port
from tests.registrykit import running_registry
from tests.trackerkit import Running, tracker, until
from tests.urlkit import web_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.mountkit import Machine

NAMES = ["n1", "n2", "n3"]
TRIES = 4
DATA = random.Random(5).randbytes(6 * MIB + 5)


def settings(running: Running, path: Path, name: str, **mirror: Any) -> config.Config:
    plain = config.Config()
    peers = dataclasses.replace(plain.peers, cluster="prod", tracker=(running.url,), node=name)
    own = dataclasses.replace(plain.mirror, dir=str(path / name), containerd_root="",
                              peers_address=f"127.0.1.{name[1:]}:{free_port()}", **mirror)
    return dataclasses.replace(plain, peers=peers, mirror=own)


@asynccontextmanager
async def mirrors(running: Running, path: Path, names: list[str], **keys: Any) -> AsyncIterator[list[str]]:
    """Their addresses for clients; each is known to the tracker."""
    async with trio.open_nursery() as nursery:
        places: list[str] = []

        async def serve(name: str, *, task_status: Any) -> None:
            listeners = await web.listen("127.0.0.1:0")
            async with opened(settings(running, path, name, **keys)) as mirror, trio.open_nursery() as inner:
                inner.start_soon(web.serve, listeners, mirror.handle)
                places.append(":".join(map(str, listeners[0].socket.getsockname()[:2])))
                task_status.started()
                await trio.sleep_forever()

        for name in names:
            await nursery.start(serve, name)
        await until(lambda: len(getattr(running.tracker.store.clusters.get("prod"), "members", ())) == len(names))
        yield places
        nursery.cancel_scope.cancel()


@contextmanager
def running_tracker() -> Iterator[str]:
    words = [*LAZYFS, "tracker", "--json", "--address", f"127.0.0.1:{free_port()}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            yield f"http://{json.loads(process.stdout.readline())['addresses'][0]}"
        finally:
            process.terminate()


async def get(url: str, output: Path, mirror: str) -> None:
    def run() -> None:
        urls = Urls(RegistryOptions())
        try:
            got = Getter(urls, Wanted(url, {}), mirror, begun=lambda size, done: None, progress=lambda size: None)
            assert got.get(output).by == "mirror"
        finally:
            urls.close()

    await trio.to_thread.run_sync(run)


async def preheat(running: Running, *words: str) -> tuple[int, dict[str, Any]]:
    found = await trio.run_process(
        [*LAZYFS, "preheat", *words, "--cluster", "prod", "--tracker", running.url, "--wait", "--json"],
        capture_stdout=True, capture_stderr=True, check=False)
    assert b"Traceback" not in found.stderr, found.stderr
    return found.returncode, json.loads(found.stdout) if found.stdout else {"stderr": found.stderr.decode()}


@pytest.mark.trio
async def test_an_ordinary_image_comes_to_all_mirrors_and_about_once_from_the_registry(tmp_path: Path) -> None:
    with running_registry(tmp_path / "registry") as registry, FaultProxy(registry.host) as proxy:
        async with tracker() as running, mirrors(running, tmp_path, NAMES):
            for number in range(TRIES):
                data = DATA + bytes([number])
                image = image_of([data, b"small layer"])
                push(registry.host, "app", str(number), image)
                code, found = await preheat(running, f"{proxy.host}/app:{number}")
                assert (code, found["state"], found["done"]) == (0, "SUCCESS", len(NAMES)), found
                assert all(one["total"] == one["done"] == sum(map(len, image.blobs)) for one in found["nodes"])
                for name in NAMES:
                    assert (tmp_path / name / f"pieces/whole/blob-{Digest.of(data).hex}").read_bytes() == data
                if asked_bytes(proxy, data) <= 1.6 * len(data):
                    break      # on a busy machine views may come too late for one image, not for all
            else:
                pytest.fail("the registry gave it to each of them")
            code, found = await preheat(running, f"{proxy.host}/none:1", "--nodes", "1")
            assert (code, found["failed"]) == (20, 1)


def asked_bytes(proxy: FaultProxy, data: bytes) -> int:
    ranges = [one.headers["range"].removeprefix("bytes=").partition("-") for one in
              proxy.seen("GET", str(Digest.of(data)))]
    return sum(int(last) - int(first) + 1 for first, _, last in ranges)


@pytest.mark.trio
async def test_a_file_that_a_peer_has_costs_its_server_nothing(tmp_path: Path) -> None:
    with web_server() as server:
        async with tracker() as running, mirrors(running, tmp_path, NAMES, proxy_hosts=(server.host,)) as places:
            for number in range(TRIES):
                data, path = DATA + bytes([number]), f"/model{number}.bin"
                server.files[path] = data
                server.headers[path] = {"Repr-Digest": f"sha-256=:{b64encode(sha256(data).digest()).decode()}:"}
                await get(f"http://{server.host}{path}", tmp_path / "one", places[0])
                before, key = server.body_bytes, ("", f"file/{Digest.of(data)}")
                found = running.tracker.store.clusters["prod"].swarms
                await until(lambda key=key, found=found: key in found and found[key].complete > 0)
                await get(f"http://{server.host}{path}", tmp_path / "two", places[1])
                assert (tmp_path / "two").read_bytes() == data
                if server.body_bytes == before:
                    break
            else:
                pytest.fail("the server gave it to each of them")
            server.files["/not-here.bin"] = DATA       # who has it already would have nothing to ask for
            code, found = await preheat(running, f"http://{server.host}/not-here.bin", "--nodes", "1")
            assert (code, found["done"]) == (20, 0)    # a task leads nobody to the node itself


@pytest.mark.mount
def test_a_lazy_image_comes_into_the_daemons_cache(tmp_path: Path, machine: Machine) -> None:
    with registry_with(tmp_path / "registry", {"app": [tar_of({"f": DATA})]}) as registry, running_tracker() as url:
        place = f"127.0.0.1:{free_port()}"
        environment = {"LAZYFS_PEERS_CLUSTER": "prod", "LAZYFS_PEERS_TRACKER": url, "LAZYFS_PEERS_NODE": "n1",
                       "LAZYFS_PEERS_ADDRESS": place}
        daemon = daemonkit.start_daemon(machine, environment=environment)
        try:
            daemon.wait_ready()
            words = [*LAZYFS, "preheat", f"{registry.host}/app:lazy", "--cluster", "prod", "--tracker", url]
            deadline = time.monotonic() + 60
            while True:      # until the tracker knows the node
                run = subprocess.run([*words, "--wait", "--json"], capture_output=True, check=False, timeout=120)
                found = json.loads(run.stdout)
                if found["count"]:
                    break
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert (run.returncode, found["state"], found["done"]) == (0, "SUCCESS", 1), run
            listed = json.loads(subprocess.run([*LAZYFS, "cache", "--cache-dir", machine.cache, "ls", "--json"],
                                               capture_output=True, check=True, timeout=60).stdout)
            assert [one["present"] for one in listed["images"]] == [1.0], listed
        finally:
            daemonkit.end_daemon(daemon)
