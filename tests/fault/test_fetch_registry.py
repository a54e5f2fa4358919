"""
Reads through the fetch engine from a real registry behind a proxy that misbehaves.

Each kind of fault, once and for ever: either the right bytes or one error of the source's family before the deadline;
never wrong bytes, never anything wrong in the cache, and right bytes as soon as the fault is gone.
"""

from __future__ import annotations

import http.client
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from lazyfs.cache.store import CacheDir
from lazyfs.errors import LazyfsError
from lazyfs.fetch.engine import Fetcher, FetchLimits
from lazyfs.registry.opening import open_source
from lazyfs.registry.options import RegistryOptions
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.fetchkit import CHUNK, make_sample
from tests.registrykit import Registry, running_registry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from lazyfs.fetch.device import FetchDevice

pytestmark = pytest.mark.trio
SAMPLE = make_sample(24, seed=11)
BLOBS = r"/blobs/sha256"
DEADLINE_S = 6.0
SHORT_DEADLINE_S = 1.0    # where the fault lasts anyway
SLACK_S = 5.0    # of a busy machine


def upload(host: str, data: bytes, digest: str) -> None:
    name, _, port = host.partition(":")
    connection = http.client.HTTPConnection(name, int(port), timeout=20)
    try:
        connection.request("POST", "/v2/repo/blobs/uploads/")
        answer = connection.getresponse()
        answer.read()
        place = answer.headers["Location"]
        connection.request("PUT", f"{place}&digest={digest}", body=data)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 201
    finally:
        connection.close()


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        upload(running.host, SAMPLE.stored, str(SAMPLE.blob))
        yield running


@pytest.fixture
def proxy(registry) -> Iterator[FaultProxy]:
    with FaultProxy(registry.host) as made:
        yield made


@asynccontextmanager
async def mounted(tmp_path, proxy, *, io_timeout_s: float = 1.0) -> AsyncIterator[tuple[Fetcher, FetchDevice]]:
    options = RegistryOptions(insecure=True, io_timeout_s=io_timeout_s)
    source = open_source(f"docker://{proxy.host}/repo:tag", options)
    with CacheDir.open(tmp_path / "cache") as cache:
        device = SAMPLE.device(cache, source)
        async with Fetcher(FetchLimits(readahead=False)) as fetcher:
            yield fetcher, device
        check_cache(device)
        device.cached.release()
    source.close()


def check_cache(device: FetchDevice) -> None:
    """What is present is right."""
    for index in range(SAMPLE.table.chunk_count):
        data = device.cached.read_if_present(index * CHUNK, SAMPLE.table.chunk_bytes(index))
        assert data is None or data == SAMPLE.chunk(index)


async def read(fetcher: Fetcher, device: FetchDevice, first: int, count: int,
               deadline_s: float = DEADLINE_S) -> LazyfsError | None:
    """The right bytes, or the error; in time either way."""
    offset, size = first * CHUNK, min(count * CHUNK, device.size - first * CHUNK)
    began = time.monotonic()
    try:
        data = await fetcher.read(device, offset, size, deadline=began + deadline_s)
    except LazyfsError as error:
        return error
    finally:
        assert time.monotonic() - began < deadline_s + SLACK_S
    assert data == SAMPLE.data[offset : offset + size]
    return None


FAULTS = [
    Fault(Kind.CUT, at=0),
    Fault(Kind.CUT, at=20_000),
    Fault(Kind.RESET, at=-1),
    Fault(Kind.RESET, at=30_000),
    Fault(Kind.SHORT, size=1),
    Fault(Kind.SHORT, size=20_000),
    Fault(Kind.LONG, size=1),
    Fault(Kind.WRONG_LENGTH, size=5),
    Fault(Kind.WRONG_LENGTH, size=-5),
    Fault(Kind.IGNORE_RANGE),
    Fault(Kind.WRONG_RANGE, size=1),
    Fault(Kind.NO_CONTENT_RANGE),
    Fault(Kind.FLIP, at=0),
    Fault(Kind.FLIP, at=25_000),
    Fault(Kind.STATUS, status=500),
    Fault(Kind.STATUS, status=503, headers={"Retry-After": "1"}),
    Fault(Kind.STATUS, status=429, headers={"Retry-After": "1"}),
    Fault(Kind.STATUS, status=429, headers={"Retry-After": "3600"}),
    Fault(Kind.STATUS, status=401),
    Fault(Kind.STATUS, status=404),
    Fault(Kind.BLACK_HOLE),
    Fault(Kind.STALL, at=10_000),
    Fault(Kind.GARBAGE),
    Fault(Kind.ENCODING),
    Fault(Kind.CHUNKED),
    Fault(Kind.DELAY, seconds=0.3),
    Fault(Kind.DRIP, size=1, seconds=0.3),
    Fault(Kind.DRIP, size=2000, seconds=0.001),
]
# Lasting by nature: trying again is pointless, or not allowed within the deadline.
LASTING = {(Kind.STATUS, 401), (Kind.STATUS, 404), (Kind.ENCODING, 503)}
HARMLESS = {Kind.CHUNKED, Kind.DELAY}


def name_of(fault: Fault) -> str:
    return f"{fault.kind.name}-{fault.status if fault.kind is Kind.STATUS else fault.at}-{fault.size}"


@pytest.mark.parametrize("fault", FAULTS, ids=name_of)
async def test_a_fault_once_is_not_seen_by_the_reader(tmp_path, proxy, fault):
    async with mounted(tmp_path, proxy) as (fetcher, device):
        proxy.add(Fault(**{**fault_fields(fault), "path": BLOBS, "times": 1}))
        error = await read(fetcher, device, 3, 4)
        slow = fault.kind is Kind.DRIP and fault.size == 1
        far = fault.headers.get("Retry-After") == "3600"
        if (fault.kind, fault.status) in LASTING or far:
            assert error is not None
        elif not slow:
            assert error is None, error
        proxy.clear()
        device._errors.clear()
        fetcher._scheduler.lanes.clear()    # an hour's pause
        assert await read(fetcher, device, 12, 3) is None


@pytest.mark.parametrize("fault", FAULTS, ids=name_of)
async def test_a_lasting_fault_is_an_error_in_time_and_never_wrong_bytes(tmp_path, proxy, fault):
    harmless = fault.kind in HARMLESS
    async with mounted(tmp_path, proxy, io_timeout_s=10 if harmless else 0.5) as (fetcher, device):
        proxy.add(Fault(**{**fault_fields(fault), "path": BLOBS}))
        async with trio.open_nursery() as nursery:
            errors: list[LazyfsError | None] = []

            async def reader(first: int) -> None:
                errors.append(await read(fetcher, device, first, 2, 3 * DEADLINE_S if harmless else SHORT_DEADLINE_S))

            for first in (0, 1, 8, 14, 22):
                nursery.start_soon(reader, first)
        if harmless:
            assert errors == [None] * 5
        check_cache(device)
        proxy.clear()
        device._errors.clear()
        fetcher._scheduler.lanes.clear()
        for flight in list(fetcher._scheduler.flights.values()):
            assert flight.waiters == 0
        assert await read(fetcher, device, 18, 2) is None


def fault_fields(fault: Fault) -> dict[str, object]:
    names = ("kind", "at", "size", "seconds", "status", "headers", "body", "location")
    return {name: getattr(fault, name) for name in names}


async def test_a_registry_that_comes_back_is_used_again(tmp_path, proxy):
    async with mounted(tmp_path, proxy) as (fetcher, device):
        assert await read(fetcher, device, 0, 2) is None
        proxy.down()
        async with trio.open_nursery() as nursery:
            results = []

            async def reader() -> None:
                results.append(await read(fetcher, device, 4, 2))

            nursery.start_soon(reader)
            await trio.sleep(0.3)
            assert await read(fetcher, device, 0, 2) is None    # what is here is served meanwhile
            proxy.up()
        assert results == [None]


async def test_a_herd_of_readers_asks_the_registry_once_a_chunk(tmp_path, proxy):
    # With the pauses of a registry: an answer that this machine is late for is asked for again.
    async with mounted(tmp_path, proxy, io_timeout_s=DEADLINE_S) as (fetcher, device):
        async with trio.open_nursery() as nursery:
            results: list[LazyfsError | None] = []

            async def reader(first: int) -> None:
                results.append(await read(fetcher, device, first, 3))

            for number in range(200):
                nursery.start_soon(reader, number % 22)
        assert results == [None] * 200
        assert fetcher.statistics.fetched_stored_bytes <= len(SAMPLE.stored)
        assert len([seen for seen in proxy.requests if seen.method == "GET"]) <= 25


async def test_a_prefetch_through_a_bad_link_completes(tmp_path, proxy):
    async with mounted(tmp_path, proxy) as (fetcher, device):
        proxy.add(Fault(Kind.CUT, path=BLOBS, at=100_000, times=2))
        proxy.add(Fault(Kind.RESET, path=BLOBS, at=50_000, times=1))
        handle = fetcher.prefetch([(device, index) for index in range(24)])
        with trio.fail_after(30):
            await handle.wait()
        assert handle.error is None
        assert device.cached.complete


async def test_a_blob_damaged_at_rest_gives_errors_for_its_chunk_only(tmp_path, registry, proxy):
    path = registry.blob_path(str(SAMPLE.blob))
    good = path.read_bytes()
    position = int(SAMPLE.table.rows["blob_offset"][6]) + 40
    path.write_bytes(good[:position] + bytes([good[position] ^ 8]) + good[position + 1 :])
    try:
        async with mounted(tmp_path, proxy) as (fetcher, device):
            error = await read(fetcher, device, 4, 4)
            assert error is not None
            assert error.exit_code in (10, 12)
            for first in (4, 5, 7):
                assert await read(fetcher, device, first, 1) is None
    finally:
        path.write_bytes(good)
