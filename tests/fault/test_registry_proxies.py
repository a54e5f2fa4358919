"""HTTP_PROXY, HTTPS_PROXY, NO_PROXY: who is asked through what, what nobody gets to see, and what goes wrong."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import trustme

from lazyfs.errors import DeadlineError, LazyfsError, SourceError, UsageError
from lazyfs.registry import RegistryOptions, open_destination, open_source
from lazyfs.registry.addresses import Reach, origin_of
from lazyfs.registry.proxies import Proxies
from lazyfs.registry.transport import Call, Transport
from tests.ports import free_port
from tests.registrykit import running_registry
from tests.smallimage import SmallImage, write_image
from tests.webproxy import WebProxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.registrykit import Registry

LAYER = bytes(range(256)) * 5000
PASSWORD = "s3cret"
LIMITS = {"request_deadline_s": 5.0, "io_timeout_s": 2.0, "retry_count": 0}


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Registry, Path]]:
    path = tmp_path_factory.mktemp("secure")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(path / "ca.pem")
    pem = path / "leaf.pem"
    authority.issue_cert("registry.test").private_key_and_cert_chain_pem.write_to_path(pem)
    with running_registry(path, username="kim", password="hunter2", tls_certificate=pem, tls_key=pem) as registry:
        yield registry, path / "ca.pem"


def push_and_pull(text: str, options: RegistryOptions) -> SmallImage:
    destination = open_destination(text, options)
    try:
        image = write_image(destination, [LAYER])
    finally:
        destination.close()
    source = open_source(text, options)
    try:
        assert source.root() == image.document
        with source.open_blob(image.digest, len(LAYER)) as stream:
            assert b"".join(iter(lambda: stream.read(99_999), b"")) == LAYER
        with source.read_range(image.digest, 100, 1000, time.monotonic() + 5) as stream:
            assert stream.read(1000) == LAYER[100:1100]
    finally:
        source.close()
    return image


def test_https_goes_through_a_tunnel(secure: tuple[Registry, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    registry, ca_file = secure
    with WebProxy({"registry.test:443": registry.host}, password=f"me:{PASSWORD}") as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:{PASSWORD}@{proxy.host}")
        push_and_pull("registry.test/app:1", RegistryOptions(ca_file=ca_file, username="kim", password="hunter2"))
        assert {(one.method, one.target) for one in proxy.requests} == {("CONNECT", "registry.test:443")}
        assert len(proxy.requests) < 5, "connections are not used again"


def test_plain_http_names_the_whole_address(plain: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    with WebProxy({"registry.test": plain.host}) as proxy:
        monkeypatch.setenv("http_proxy", proxy.host)    # as curl wants it; and without a scheme
        image = push_and_pull("registry.test:80/app:1", RegistryOptions(insecure=True, **LIMITS))
        assert f"http://registry.test/v2/app/blobs/{image.digest}" in {one.target for one in proxy.requests}


def test_this_machine_is_never_asked_through_a_proxy(plain: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    push_and_pull(f"{plain.host}/local:1", RegistryOptions(**LIMITS))
    push_and_pull(f"localhost:{plain.host.rpartition(':')[2]}/local:1", RegistryOptions(**LIMITS))


@pytest.mark.parametrize(("listed", "url", "is_proxied"), [
    ("", "https://registry.example/", True), ("*", "https://registry.example/", False),
    ("registry.example", "https://registry.example/", False), ("example", "https://registry.example/", False),
    (".example", "https://registry.example/", False), ("*.example", "https://registry.example/", False),
    ("try.example", "https://registry.example/", True), ("registry.example.com", "https://registry.example/", True),
    ("REGISTRY.example:443", "https://registry.example/", False), ("registry.example:80", "https://a.example/", True),
    (" other , registry.example ", "https://registry.example/", False), (",,", "https://registry.example/", True),
    ("10.0.0.0/8", "https://10.1.2.3:5000/", False), ("10.0.0.0/8", "https://11.1.2.3/", True),
    ("10.1.2.3", "https://10.1.2.3/", False), ("10.1.2.3:5000", "https://10.1.2.3:5001/", True),
    ("fd00::/8", "https://[fd00::1]:5000/", False), ("[fd00::1]:5000", "https://[fd00::1]:5000/", False),
    ("10.0.0.0/99", "https://10.1.2.3/", True), (".", "https://registry.example/", True),
    ("", "https://127.0.0.9/", False), ("", "https://[::1]/", False), ("", "https://localhost/", False),
    ("", "http://registry.example/", False),
])
def test_exceptions(listed: str, url: str, is_proxied: bool) -> None:
    proxies = Proxies.of_environment({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": listed})
    assert (proxies.find(origin_of(url)) is not None) == is_proxied


@pytest.mark.parametrize("text", [f"socks5://me:{PASSWORD}@proxy:1080", f"https://me:{PASSWORD}@proxy", "http://",
                                  f"http://me:{PASSWORD}@proxy:99999", f"http://me:{PASSWORD}@[::1", "http:///x"])
def test_what_is_no_http_proxy_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", text)
    with pytest.raises(UsageError, match="HTTPS_PROXY is no address") as caught:
        open_source("registry.test/app:1", RegistryOptions())
    assert PASSWORD not in str(caught.value)


def failure(host: str, options: RegistryOptions) -> LazyfsError:
    source = open_source(f"{host}/app:1", options)
    try:
        with pytest.raises(LazyfsError) as caught:
            source.root()
    finally:
        source.close()
    shown = f"{caught.value} {caught.value.hint}"
    assert PASSWORD not in shown
    return caught.value


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_what_goes_wrong_names_the_proxy(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    host, options = "registry.test", RegistryOptions(insecure=scheme == "http", **LIMITS)
    with WebProxy({}, password="other:one") as proxy:
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", f"http://me:{PASSWORD}@{proxy.host}")
        error = failure(host, options)
        assert f"the proxy {proxy.host}: it wants a user name and password" in str(error)
        assert "NO_PROXY" in error.hint
        assert isinstance(error, SourceError)
        assert not error.transient
    error = failure(host, options)   # it is gone
    assert f"the proxy {proxy.host}: Connection refused" in str(error)


def test_a_proxy_that_does_not_know_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    with WebProxy({}) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.host}")
        assert "502 Bad Gateway" in str(failure("registry.test", RegistryOptions(**LIMITS)))


def test_a_silent_proxy_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with WebProxy({}, silent=True) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.host}")
        started = time.monotonic()
        with pytest.raises(DeadlineError, match=f"the proxy {proxy.host}"):
            Transport(RegistryOptions()).send(Call("GET", "https://registry.test/v2/"), time.monotonic() + 0.5)
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("host", ["169.254.169.254", "0.0.0.0", "10.1.2.3"])
def test_a_redirect_does_not_reach_the_proxys_own_machine(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    with WebProxy({host: "127.0.0.1:1"}) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://{proxy.host}")
        with pytest.raises(SourceError, match="may not send us there"):
            Transport(RegistryOptions()).send(Call("GET", f"http://{host}/", reach=Reach.PUBLIC), time.monotonic() + 5)
        assert not proxy.requests
