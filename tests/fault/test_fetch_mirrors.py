"""Reads through the fetch engine past mirrors that misbehave for ever: right bytes, no error, soon no try at them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import trio

from lazyfs.cache.store import CacheDir
from lazyfs.fetch.engine import Fetcher, FetchLimits
from lazyfs.image.digest import Digest
from lazyfs.registry import RegistryOptions, open_destination, open_source
from lazyfs.registry.mirrors import HEALTH
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.fetchkit import CHUNK, make_sample
from tests.registrykit import running_registry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.trio
SAMPLE = make_sample(24, seed=13)
DEADLINE_S = 15.0
FAULTS = [
    Fault(Kind.FLIP, at=0), Fault(Kind.FLIP, at=100), Fault(Kind.CUT, at=100), Fault(Kind.RESET, at=-1),
    Fault(Kind.STALL, at=100), Fault(Kind.BLACK_HOLE), Fault(Kind.DRIP, size=1, seconds=0.3),
    Fault(Kind.STATUS, status=404), Fault(Kind.STATUS, status=500), Fault(Kind.STATUS, status=401),
    Fault(Kind.SHORT, size=100), Fault(Kind.WRONG_RANGE), Fault(Kind.GARBAGE), Fault(Kind.ENCODING),
]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        destination = open_destination(f"{running.host}/repo:1", RegistryOptions())
        destination.put_bytes(SAMPLE.stored, Digest(str(SAMPLE.blob)))
        destination.close()
        yield running.host


@pytest.fixture
def proxies(registry: str) -> Iterator[list[FaultProxy]]:
    """The registry as it is named, and its two mirrors."""
    HEALTH.__init__()  # type: ignore[misc]  # what earlier tests taught it
    with FaultProxy(registry) as upstream, FaultProxy(registry) as first, FaultProxy(registry) as second:
        yield [upstream, first, second]


def options(directory: Path, proxies: list[FaultProxy]) -> RegistryOptions:
    place = directory / "certs.d" / proxies[0].host
    place.mkdir(parents=True)
    (place / "hosts.toml").write_text("".join(f'[host."http://{proxy.host}"]\n' for proxy in proxies[1:]))
    return RegistryOptions(hosts_dir=directory / "certs.d", io_timeout_s=1.0)


def blob_requests(proxy: FaultProxy) -> int:
    return sum("/blobs/" in seen.path for seen in proxy.requests)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kind.name}-{fault.status}-{fault.at}")
async def test_no_reader_notices_bad_mirrors(tmp_path: Path, proxies: list[FaultProxy], fault: Fault) -> None:
    upstream, *mirrors = proxies
    for mirror in mirrors:
        mirror.add(Fault(fault.kind, path="/blobs/", at=fault.at, size=fault.size, seconds=fault.seconds,
                         status=fault.status))
    source = open_source(f"{upstream.host}/repo:1", options(tmp_path, proxies))
    with CacheDir.open(tmp_path / "cache") as cache:
        device = SAMPLE.device(cache, source)
        async with Fetcher(FetchLimits(readahead=False)) as fetcher:

            async def read(index: int) -> None:
                offset, size = index * CHUNK, min(CHUNK, device.size - index * CHUNK)
                data = await fetcher.read(device, offset, size, deadline=time.monotonic() + DEADLINE_S)
                assert data == SAMPLE.data[offset : offset + size]

            async with trio.open_nursery() as nursery:
                for index in range(6):
                    nursery.start_soon(read, index)
            tried = [blob_requests(mirror) for mirror in mirrors]
            assert all(tried)
            for index in range(6, 12):
                await read(index)
            if not (fault.kind is Kind.STATUS and fault.status == 404):
                assert [blob_requests(mirror) for mirror in mirrors] == tried, "they are left alone now"
            assert blob_requests(upstream)
        device.cached.release()
    source.close()
