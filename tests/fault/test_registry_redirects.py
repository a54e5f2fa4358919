"""Redirects: followed where it is safe, and nothing secret goes along."""

from __future__ import annotations

import ssl
import time
from typing import TYPE_CHECKING

import pytest
import trustme

from lazyfs.errors import AuthError, NotFoundError, SourceError
from lazyfs.registry import RegistryOptions, open_destination, open_source
from lazyfs.registry.addresses import Reach, origin_of, printable, reach_of
from lazyfs.registry.client import RegistryClient
from lazyfs.registry.transport import Call, Transport
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.registrykit import running_registry
from tests.smallimage import SmallImage, write_image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LAYER = bytes(range(256)) * 500
KIM = RegistryOptions(username="kim", password="hunter2", request_deadline_s=3.0, io_timeout_s=1.0, retry_count=1)
BLOBS = "/blobs/"


class World:
    """`front` stands before a registry with passwords; `store` before one without, that holds the same."""

    def __init__(self, image: SmallImage, front: FaultProxy, store: FaultProxy) -> None:
        self.image, self.front, self.store = image, front, store

    def read(self, options: RegistryOptions = KIM) -> bytes:
        source = open_source(f"{self.front.host}/app:1", options)
        try:
            assert source.root() == self.image.document  # credentials are known from here on
            with source.read_range(self.image.digest, 10, 1000, time.monotonic() + 10) as stream:
                got = b"".join(iter(lambda: stream.read(999), b""))
            with source.open_blob(self.image.digest, len(LAYER)) as stream:
                assert b"".join(iter(lambda: stream.read(9999), b"")) == LAYER
            return got
        finally:
            source.close()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SmallImage, str, str]]:
    path = tmp_path_factory.mktemp("registry")
    with (running_registry(path, username="kim", password="hunter2") as private,
          running_registry(path, storage=private.storage) as public):
        destination = open_destination(f"{private.host}/app:1", KIM)
        image = write_image(destination, [LAYER])
        destination.close()
        yield image, private.host, public.host


@pytest.fixture
def world(hosts: tuple[SmallImage, str, str]) -> Iterator[World]:
    with FaultProxy(hosts[1]) as front, FaultProxy(hosts[2]) as store:
        yield World(hosts[0], front, store)


def secrets_in(text: str) -> bool:
    return any(secret in text for secret in ("hunter2", "a2ltOmh1bnRlcjI", "X-Signature"))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_blobs_elsewhere_are_read_without_credentials(world: World, status: int) -> None:
    world.front.add(Fault(Kind.REDIRECT, path=BLOBS, status=status, location=f"http://{world.store.host}"))
    assert world.read() == LAYER[10:1010]
    assert all("authorization" in seen.headers for seen in world.front.seen(path=BLOBS))
    assert len(world.store.seen("GET", BLOBS)) == 2
    assert all("authorization" not in seen.headers for seen in world.store.requests)
    assert world.store.seen("GET", BLOBS)[0].headers["range"] == "bytes=10-1009"


def test_elsewhere_on_the_same_host_keeps_credentials(world: World) -> None:
    target = f"http://{world.front.host}/v2/app/blobs/{world.image.digest}?again=1"
    world.front.add(Fault(Kind.REDIRECT, path=r"/blobs/[^?]*$", location=target, exact=True))
    assert world.read() == LAYER[10:1010]
    world.front.clear()
    world.front.add(Fault(Kind.REDIRECT, path=r"/blobs/[^?]*$", location="?relative=1", exact=True))
    assert world.read() == LAYER[10:1010]


def test_back_and_forth_keeps_them_apart(world: World) -> None:
    world.front.add(Fault(Kind.REDIRECT, path=r"/blobs/[^?]*$", location=f"http://{world.store.host}"))
    home = f"http://{world.front.host}/v2/app/blobs/{world.image.digest}?home=1"
    world.store.add(Fault(Kind.REDIRECT, path=BLOBS, location=home, exact=True))
    assert world.read() == LAYER[10:1010]
    assert all("authorization" not in seen.headers for seen in world.store.requests)


def test_loops_end(world: World) -> None:
    world.front.add(Fault(Kind.REDIRECT, path=BLOBS, location=f"http://{world.store.host}"))
    world.store.add(Fault(Kind.REDIRECT, path=BLOBS, location=f"http://{world.front.host}"))
    with pytest.raises(SourceError, match="redirects") as caught:
        world.read()
    assert not caught.value.transient
    assert len(world.front.seen("GET", BLOBS)) + len(world.store.seen("GET", BLOBS)) <= 2 * 6 + 1


@pytest.mark.parametrize("location", ["", "file:///etc/passwd", "gopher://x/", "http://", "http://[bad/", "//",
                                      "http://host:99999/", "http://a b/"])
def test_redirects_to_nowhere(world: World, location: str) -> None:
    world.front.add(Fault(Kind.REDIRECT, path=BLOBS, location=location, exact=True))
    with pytest.raises(SourceError):
        world.read()


@pytest.mark.parametrize("fault", [
    Fault(Kind.STATUS, status=500), Fault(Kind.STATUS, status=404), Fault(Kind.STATUS, status=403),
    Fault(Kind.STATUS, status=401, headers={"WWW-Authenticate": "Basic realm=steal"}), Fault(Kind.GARBAGE),
    Fault(Kind.RESET, at=-1), Fault(Kind.CUT, at=5), Fault(Kind.WRONG_RANGE), Fault(Kind.BLACK_HOLE),
], ids=lambda fault: f"{fault.kind.name}-{fault.status}")
def test_signatures_of_redirects_stay_out_of_messages(world: World, fault: Fault) -> None:
    target = f"http://{world.store.host}/v2/app/blobs/{world.image.digest}?X-Signature=hunter2#hunter2"
    world.front.add(Fault(Kind.REDIRECT, path=BLOBS, location=target, exact=True))
    world.store.add(fault)
    with pytest.raises(SourceError) as caught:
        world.read()
    assert not secrets_in(f"{caught.value} {caught.value!r} {caught.value.hint}")
    assert world.store.host in str(caught.value), "it says who failed"
    assert all("authorization" not in seen.headers for seen in world.store.requests)
    assert world.store.seen(path=BLOBS)[0].path.endswith("?X-Signature=hunter2")


def test_a_foreign_hosts_challenge_gets_nothing(world: World) -> None:
    world.front.add(Fault(Kind.REDIRECT, path=BLOBS, location=f"http://{world.store.host}"))
    world.store.add(Fault(Kind.STATUS, status=401, headers={"WWW-Authenticate": 'Basic realm="steal"'}))
    with pytest.raises(AuthError):
        world.read()
    assert len(world.store.requests) == 1


def test_from_https_to_http_is_refused(world: World, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    options = RegistryOptions(ca_file=tmp_path / "ca.pem", request_deadline_s=3.0, retry_count=1)
    with FaultProxy(world.store.upstream, ssl_context=context) as secure:
        source = open_source(f"{secure.host}/app:1", options)
        assert source.root() == world.image.document
        secure.add(Fault(Kind.REDIRECT, path=BLOBS, location=f"http://{world.store.host}"))
        with pytest.raises(SourceError, match="from https") as caught:
            source.read_range(world.image.digest, 0, 10, time.monotonic() + 10)
        assert not caught.value.transient
        assert not world.store.requests
        source.close()
        # http -> https is fine
        secure.clear()
        world.front.add(Fault(Kind.REDIRECT, path=BLOBS, location=f"https://{secure.host}"))
        kim = RegistryOptions(username="kim", password="hunter2", ca_file=tmp_path / "ca.pem", retry_count=1)
        assert world.read(kim) == LAYER[10:1010]
        assert all("authorization" not in seen.headers for seen in secure.requests)


def test_a_registry_elsewhere_may_not_send_us_to_this_machine(world: World, tmp_path: Path) -> None:
    """127.1 resolves to this machine, but a registry of that name counts as one elsewhere."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    with FaultProxy(world.store.upstream, ssl_context=context) as secure:
        elsewhere = secure.host.replace("127.0.0.1", "127.1")
        source = open_source(f"{elsewhere}/app:1", RegistryOptions(insecure=True, retry_count=1))
        assert source.root() == world.image.document
        secure.add(Fault(Kind.REDIRECT, path=BLOBS, location=f"https://{secure.host}", times=1))
        with pytest.raises(SourceError, match="may not send us there") as caught:
            source.read_range(world.image.digest, 0, 10, time.monotonic() + 10)
        assert not caught.value.transient
        with source.read_range(world.image.digest, 0, 10, time.monotonic() + 10) as stream:
            assert stream.read(10) == LAYER[:10]
        source.close()


def test_insecure_speaks_plain_http_to_hosts_elsewhere(world: World) -> None:
    elsewhere = world.store.host.replace("127.0.0.1", "127.1")
    source = open_source(f"{elsewhere}/app:1", RegistryOptions(insecure=True, io_timeout_s=1.0))
    assert source.root() == world.image.document
    source.close()
    source = open_source(f"{elsewhere}/app:1", RegistryOptions(io_timeout_s=1.0, request_deadline_s=2.0))
    with pytest.raises(SourceError) as caught:
        source.root()
    assert not secrets_in(str(caught.value))
    source.close()
    assert all(seen.path == "/v2/" or "manifests" in seen.path for seen in world.store.requests)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_guarded_calls_do_not_even_connect(world: World, host: str) -> None:
    transport = Transport(RegistryOptions())
    url = f"http://{world.store.host.replace('127.0.0.1', host)}/v2/"
    with pytest.raises(SourceError, match="may not send us there"):
        transport.send(Call("GET", url, reach=Reach.PRIVATE), time.monotonic() + 10)
    assert not world.store.requests
    transport.send(Call("GET", url), time.monotonic() + 10).close()
    transport.close()


def test_upload_locations(world: World) -> None:
    """Relative, absolute, with a query, and http behind a proxy that speaks TLS."""
    client = RegistryClient(world.front.host, "app", KIM)
    deadline = time.monotonic() + 3
    base = f"http://{world.front.host}"
    for location, expected in [("/up/1?state=a%2Fb", f"{base}/up/1?state=a%2Fb"), (f"{base}/up/2", f"{base}/up/2"),
                               ("3", f"{base}/v2/3"), ("http://other.example/4?x=1", "http://other.example/4?x=1")]:
        world.front.clear()
        world.front.add(Fault(Kind.STATUS, status=202, headers={"Location": location}))
        with client.send("POST", f"{base}/v2/x", deadline) as answer:
            assert client.place(answer, deadline) == expected
    world.front.clear()
    world.front.add(Fault(Kind.STATUS, status=202))
    with client.send("POST", f"{base}/v2/x", deadline) as answer, pytest.raises(SourceError, match="no Location"):
        client.place(answer, deadline)
    client.close()


def test_what_is_shown_of_urls() -> None:
    assert printable("https://kim:hunter2@host/a?token=x#y") == "https://host/a"
    assert printable("x" * 1000) == "x" * 300
    assert origin_of("HTTP://Host:80/x") == origin_of("http://host")
    assert origin_of("https://[::1]:5000/x").netloc == "[::1]:5000"
    for url in ("", "host", "ftp://host", "http://"):
        with pytest.raises(SourceError):
            origin_of(url)


@pytest.mark.parametrize(("reach", "addresses"), [
    (Reach.MACHINE, ["127.8.9.1", "::1", "169.254.169.254", "fe80::1%eth0", "::ffff:127.0.0.1", "0.0.0.0", "::",
                     "224.0.0.1", "ff02::1", "localhost", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe",
                     "2002:7f00:1::", "::127.0.0.1", "fd00:ec2::254", "100.100.100.200"]),
    (Reach.PRIVATE, ["10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "198.18.0.1", "fd12::1", "fec0::1",
                     "::ffff:10.0.0.1", "64:ff9b::c0a8:101", "64:ff9b:1::1", "2002:a00:1::", "240.0.0.1"]),
    (Reach.PUBLIC, ["1.1.1.1", "172.32.0.1", "2606:4700::1", "::ffff:1.1.1.1", "64:ff9b::101:101", "a.name"]),
])
def test_how_far_addresses_reach(reach: Reach, addresses: list[str]) -> None:
    assert {address: reach_of(address) for address in addresses} == dict.fromkeys(addresses, reach)


def test_not_found_through_a_redirect(world: World) -> None:
    world.front.add(Fault(Kind.REDIRECT, path=BLOBS, location=f"http://{world.store.host}/nothing?sig=hunter2"))
    with pytest.raises(NotFoundError) as caught:
        world.read()
    assert not secrets_in(str(caught.value))
