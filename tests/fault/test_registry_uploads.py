"""Pushing to a registry that misbehaves: all of it arrives, or an error does, and no tag before everything."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import LazyfsError, NotFoundError, SourceError
from lazyfs.image.digest import Digest
from lazyfs.registry import RegistryOptions, open_destination, open_source, upload
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.registrykit import Registry, running_registry
from tests.smallimage import SmallImage, write_image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OPTIONS = RegistryOptions(request_deadline_s=5.0, io_timeout_s=1.0, retry_count=3)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def proxy(registry: Registry) -> Iterator[FaultProxy]:
    with FaultProxy(registry.host) as running:
        yield running


def push(host: str, name: str, layer: bytes, options: RegistryOptions = OPTIONS) -> SmallImage:
    destination = open_destination(f"{host}/{name}:1", options)
    try:
        return write_image(destination, [layer])
    finally:
        destination.close()


def check(host: str, name: str, image: SmallImage) -> None:
    source = open_source(f"{host}/{name}:1", OPTIONS)
    assert source.root() == image.document
    assert source.read_blob(image.digest, len(image.layer)) == image.layer
    assert source.read_blob(Digest.of(image.config), len(image.config)) == image.config
    source.close()


@pytest.mark.parametrize("fault", [
    Fault(Kind.RESET, method="POST", at=-1, times=2), Fault(Kind.RESET, method="PUT", at=-1, times=2),
    Fault(Kind.LOSE_UPLOAD, method="PUT", times=1), Fault(Kind.LOSE_UPLOAD, method="POST", times=1),
    Fault(Kind.LOSE_UPLOAD, method="PUT", path="/manifests/", times=1), Fault(Kind.BLACK_HOLE, method="POST", times=1),
    Fault(Kind.STATUS, method="POST", status=503, times=2), Fault(Kind.STATUS, method="PUT", status=500, times=2),
    Fault(Kind.STATUS, method="PUT", status=429, headers={"Retry-After": "1"}, times=1),
    Fault(Kind.STATUS, method="PUT", path="/uploads/", status=404, times=1),
    Fault(Kind.STATUS, method="HEAD", status=502, times=1), Fault(Kind.GARBAGE, method="POST", times=1),
    Fault(Kind.STATUS, method="PUT", path="/manifests/", status=503, times=2),
], ids=lambda fault: f"{fault.method}-{fault.kind.name}-{fault.path.strip('/')}")
def test_a_push_survives_what_passes(registry: Registry, proxy: FaultProxy, fault: Fault) -> None:
    fault = proxy.add(replace(fault))
    layer = os.urandom(300_000)
    image = push(proxy.host, "app/a", layer)
    assert fault.times == 0
    check(registry.host, "app/a", image)


@pytest.mark.parametrize("fault", [
    Fault(Kind.RESET, method="PUT", at=-1), Fault(Kind.STATUS, method="POST", status=500),
    Fault(Kind.STATUS, method="POST", status=403), Fault(Kind.STATUS, method="PUT", path="/uploads/", status=400),
    Fault(Kind.STATUS, method="PUT", path="/manifests/", status=400), Fault(Kind.BLACK_HOLE, method="PUT"),
    Fault(Kind.STATUS, method="HEAD", status=500), Fault(Kind.STATUS, method="POST", status=202),
    Fault(Kind.STATUS, method="POST", status=202, headers={"Location": "ftp://x/"}),
], ids=lambda fault: f"{fault.method}-{fault.kind.name}-{fault.status}")
def test_a_push_that_cannot_be_ends_and_leaves_no_tag(
    registry: Registry, proxy: FaultProxy, fault: Fault, request: pytest.FixtureRequest
) -> None:
    proxy.add(replace(fault))
    name = f"app/{Digest.of(request.node.name.encode()).hex[:12]}"
    started = time.monotonic()
    with pytest.raises(LazyfsError):
        push(proxy.host, name, os.urandom(5000))
    assert time.monotonic() - started < 2 * OPTIONS.request_deadline_s + 3
    source = open_source(f"{registry.host}/{name}:1", OPTIONS)
    with pytest.raises(NotFoundError):
        source.root()
    source.close()


def test_large_bodies_go_in_pieces_where_whole_ones_are_refused(
    registry: Registry, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "_PIECE_BYTES", 100_000)
    proxy.add(Fault(Kind.STATUS, method="PUT", path="/uploads/", status=413, times=1))
    layer = os.urandom(250_001)
    image = push(proxy.host, "app/pieces", layer)
    check(registry.host, "app/pieces", image)
    ranges = [seen.headers["content-range"] for seen in proxy.seen("PATCH")]
    assert ranges == ["0-99999", "100000-199999", "200000-250000"]


def test_a_wrong_digest_is_refused_by_the_registry(registry: Registry) -> None:
    destination = open_destination(f"{registry.host}/app/wrong:1", OPTIONS)
    with pytest.raises(SourceError) as caught:
        destination.put_bytes(b"other bytes", Digest.of(b"bytes"))
    assert not caught.value.transient
    assert "DIGEST_INVALID" in str(caught.value)
    destination.close()


def test_a_registry_that_restarts_in_the_middle(tmp_path: Path) -> None:
    with running_registry(tmp_path) as registry, FaultProxy(registry.host) as proxy:
        destination = open_destination(f"{proxy.host}/app:1", OPTIONS)
        destination.put_bytes(b"before", Digest.of(b"before"))
        registry.restart()
        proxy.disconnect()
        image = write_image(destination, [b"after", b"before"])
        destination.close()
        check(registry.host, "app", image)


def test_locations_without_a_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "_PIECE_BYTES", 1000)
    with running_registry(tmp_path, relative_urls=True) as registry, FaultProxy(registry.host) as proxy:
        check(registry.host, "app", push(proxy.host, "app", b"whole"))
        proxy.add(Fault(Kind.STATUS, method="PUT", path="/uploads/", status=413, times=1))
        check(registry.host, "app", push(proxy.host, "app", b"pieces" * 1000))


def test_a_read_only_registry(tmp_path: Path) -> None:
    with running_registry(tmp_path, read_only=True) as registry:
        destination = open_destination(f"{registry.host}/app:1", OPTIONS)
        with pytest.raises(SourceError) as caught:
            destination.put_bytes(b"x", Digest.of(b"x"))
        assert "405" in str(caught.value)
        assert not destination.mount_blob(Digest.of(b"x"), 1, f"docker://{registry.host}/other")
        destination.close()
