"""Mirrors of hosts.toml: order, fallback, being left alone, and lies; TLS with client certificates."""

from __future__ import annotations

import ssl
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
import trustme

from lazyfs.errors import AuthError, NotFoundError, SourceError, UsageError
from lazyfs.image.digest import Digest
from lazyfs.registry import RegistryOptions, mirrors, open_destination, open_source
from lazyfs.registry import client as client_module
from lazyfs.registry.mirrors import HEALTH
from lazyfs.registry.streams import distrust, read_exactly
from lazyfs.registry.trust import Trust, tls_context
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.registrykit import running_registry
from tests.smallimage import SmallImage, write_image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.registrykit import Registry

LAYER = bytes(range(256)) * 500
LIMITS = {"request_deadline_s": 10.0, "io_timeout_s": 2.0, "connect_timeout_s": 2.0, "retry_count": 1}
READ_S = 10.0                    # beside other tests an answer may take a while


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Registry, SmallImage]]:
    with running_registry(tmp_path_factory.mktemp("registry")) as registry:
        destination = open_destination(f"{registry.host}/team/app:1", RegistryOptions())
        image = write_image(destination, [LAYER])
        destination.close()
        yield registry, image


class World:
    """`upstream` is the registry that references name; `first` and `second` are its mirrors."""

    def __init__(self, directory: Path, image: SmallImage, proxies: list[FaultProxy]) -> None:
        self.directory, self.image = directory, image
        self.upstream, self.first, self.second = proxies
        self.text = f"{self.upstream.host}/team/app:1"
        self.write(self.default())

    def default(self) -> str:
        return "".join(f'[host."http://{proxy.host}"]\n' for proxy in (self.first, self.second))

    def write(self, content: str) -> None:
        place = self.directory / self.upstream.host
        place.mkdir(exist_ok=True)
        (place / "new").write_text(content)
        (place / "new").rename(place / "hosts.toml")

    def options(self, **more: object) -> RegistryOptions:
        return RegistryOptions(hosts_dir=self.directory, **{**LIMITS, **more})  # type: ignore[arg-type]

    def blobs(self, proxy: FaultProxy) -> int:
        return sum("/blobs/" in seen.path for seen in proxy.requests)

    def read(self, times: int = 1, options: RegistryOptions | None = None) -> None:
        source = open_source(self.text, options or self.options())
        try:
            for _ in range(times):
                with source.read_range(self.image.digest, 10, 100, time.monotonic() + READ_S) as stream:
                    assert read_exactly(stream, 100) == LAYER[10:110]
        finally:
            source.close()


@pytest.fixture
def world(servers: tuple[Registry, SmallImage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("HOME", str(tmp_path))
    HEALTH.__init__()  # type: ignore[misc]  # what earlier tests taught it
    monkeypatch.setattr(mirrors, "HEDGE_FIRST_S", READ_S)     # who is asked is counted: test_registry_hedges has these
    registry, image = servers
    certificates = tmp_path / "certs.d"
    certificates.mkdir()
    with FaultProxy(registry.host) as upstream, FaultProxy(registry.host) as first, FaultProxy(registry.host) as second:
        yield World(certificates, image, [upstream, first, second])


def test_the_first_mirror_serves_and_is_told_for_whom(world: World) -> None:
    source = open_source(world.text, world.options())
    try:
        assert source.root() == world.image.document
        assert source.read_blob(world.image.digest, len(LAYER)) == LAYER
    finally:
        source.close()
    world.read()
    assert world.blobs(world.first) == 2
    assert not world.second.requests
    assert not world.upstream.requests
    namespace = world.upstream.host.replace(":", "%3A")
    assert all(seen.path.endswith(f"?ns={namespace}") for seen in world.first.requests)


def test_the_registry_itself_is_not_told_its_own_name(world: World) -> None:
    world.write(f'server = "http://{world.upstream.host}"')
    world.read()
    assert world.blobs(world.upstream) == 1
    assert all("ns=" not in seen.path for seen in world.upstream.requests)


@pytest.mark.parametrize("fault", [
    Fault(Kind.STATUS, status=404), Fault(Kind.STATUS, status=403), Fault(Kind.STATUS, status=500),
    Fault(Kind.STATUS, status=503), Fault(Kind.STATUS, status=429), Fault(Kind.STATUS, status=401),
    Fault(Kind.RESET, at=-1), Fault(Kind.GARBAGE), Fault(Kind.BLACK_HOLE), Fault(Kind.IGNORE_RANGE),
    Fault(Kind.WRONG_RANGE), Fault(Kind.ENCODING), Fault(Kind.REDIRECT, location="http://127.0.0.1:1"),
], ids=lambda fault: f"{fault.kind.name}-{fault.status}")
def test_what_a_mirror_does_not_give_the_next_one_gives(world: World, fault: Fault) -> None:
    world.first.add(fault)
    world.read()
    assert world.blobs(world.second) == 1
    assert not world.upstream.requests
    world.first.clear()
    world.read()
    missing = fault.status == 404 and fault.kind is Kind.STATUS
    assert world.blobs(world.second) == 1 + (not missing), "it is left alone, but for 'not found'"


def test_both_mirrors_down(world: World) -> None:
    world.first.down()
    world.second.down()
    world.read(times=3)
    assert world.blobs(world.upstream) == 3


def test_everything_down_and_a_mirror_back(world: World) -> None:
    for proxy in (world.first, world.second, world.upstream):
        proxy.down()
    with pytest.raises(SourceError) as caught:
        world.read()
    assert caught.value.transient
    world.second.up()
    world.read()
    assert world.blobs(world.second) == 1, "left alone, but there is nobody else"


def test_not_found_is_the_registrys_word(world: World) -> None:
    source = open_source(f"{world.upstream.host}/team/app:none", world.options())
    with pytest.raises(NotFoundError):
        source.root()
    source.close()
    assert all(proxy.requests for proxy in (world.first, world.second, world.upstream))


def test_capabilities(world: World) -> None:
    world.write(f'[host."http://{world.first.host}"]\ncapabilities = ["pull"]\n'
                f'[host."http://{world.second.host}"]\ncapabilities = ["resolve"]\n')
    source = open_source(world.text, world.options())
    assert source.root() == world.image.document
    source.document(world.image.document.digest)
    source.close()
    assert [seen.path.split("?")[0] for seen in world.second.requests] == ["/v2/team/app/manifests/1"]
    assert [seen.path.split("?")[0] for seen in world.first.requests] == [
        f"/v2/team/app/manifests/{world.image.document.digest}"]


def test_pushes_go_to_the_registry_alone(world: World) -> None:
    destination = open_destination(f"{world.upstream.host}/team/other:1", world.options())
    write_image(destination, [LAYER])
    list(destination.documents())
    destination.close()
    assert not world.first.requests
    assert not world.second.requests


@pytest.mark.parametrize("kind", [Kind.CUT, Kind.STALL])
def test_a_body_that_ends_early_turns_the_next_try_elsewhere(world: World, kind: Kind) -> None:
    world.first.add(Fault(kind, path="/blobs/", at=20))
    with pytest.raises(SourceError):
        world.read()
    world.read()
    assert world.blobs(world.second) == 1


def test_a_lying_mirror_is_found_out_and_not_asked_again(world: World) -> None:
    for proxy in (world.first, world.second):
        proxy.add(Fault(Kind.FLIP, at=15))
    source = open_source(world.text, world.options())
    assert source.read_blob(world.image.digest, len(LAYER)) == LAYER
    assert (world.blobs(world.first), world.blobs(world.second), world.blobs(world.upstream)) == (1, 1, 1)
    world.upstream.down()
    with pytest.raises(SourceError):
        source.read_blob(world.image.digest, len(LAYER))
    assert world.blobs(world.first) == 1, "wrong bytes are not better than none"
    source.close()


def test_a_lying_mirrors_manifest(world: World) -> None:
    world.first.add(Fault(Kind.FLIP, path="/manifests/", at=15))
    source = open_source(f"{world.upstream.host}/team/app@{world.image.document.digest}", world.options())
    assert source.root() == world.image.document
    source.close()
    assert world.second.requests
    assert not world.upstream.requests


def test_ranges_can_be_distrusted(world: World) -> None:
    world.first.add(Fault(Kind.FLIP, at=0))
    world.second.down()
    source = open_source(world.text, world.options())
    found = []
    for _ in range(2):
        with source.read_range(world.image.digest, 10, 100, time.monotonic() + READ_S) as stream:
            data = read_exactly(stream, 100)
            found.append(data == LAYER[10:110] or distrust(stream, SourceError("wrong bytes")))
    assert found == [True, True]
    assert world.blobs(world.upstream) == 1
    with source.read_range(world.image.digest, 10, 100, time.monotonic() + READ_S) as stream:
        assert not distrust(stream, SourceError("wrong bytes")), "of the registry itself there is no other"
    source.close()


def test_credentials_of_the_registry_are_not_for_mirrors(world: World) -> None:
    world.first.add(Fault(Kind.STATUS, status=401, headers={"WWW-Authenticate": 'Basic realm="x"'}))
    world.second.add(Fault(Kind.STATUS, status=401, headers={
        "WWW-Authenticate": f'Bearer realm="http://{world.second.host}/token"'}))
    world.read(options=world.options(username="kim", password="hunter2"))
    for proxy in (world.first, world.second):
        assert proxy.requests
        assert all("authorization" not in seen.headers for seen in proxy.requests)


def test_headers_stay_with_their_mirror(world: World) -> None:
    world.write(f'[host."http://{world.first.host}"]\n[host."http://{world.first.host}".header]\n'
                'X-Registry = "https://up.example"\nAuthorization = "Bearer hunter2"\n')
    world.first.add(Fault(Kind.REDIRECT, path="/blobs/", location=f"http://{world.second.host}"))
    world.read()
    assert [(seen.headers["x-registry"], seen.headers["authorization"]) for seen in world.first.requests] == [
        ("https://up.example", "Bearer hunter2")]
    (redirected,) = world.second.requests
    assert not {"x-registry", "authorization"} & set(redirected.headers)


def test_a_change_of_the_file_needs_no_restart(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_LOOK_EVERY_S", 0.0)
    source = open_source(world.text, world.options())

    def read() -> None:
        with source.read_range(world.image.digest, 10, 100, time.monotonic() + READ_S) as stream:
            assert read_exactly(stream, 100) == LAYER[10:110]

    read()
    world.write(f'[host."http://{world.second.host}"]\n')
    read()
    world.write("capabilities = 1")
    read()
    source.close()
    assert (world.blobs(world.first), world.blobs(world.second)) == (1, 2), "what is wrong changes nothing"
    with pytest.raises(UsageError, match="line 1"):
        open_source(world.text, world.options())


def test_the_server_may_be_a_mirror_and_then_nobody_else_is_asked(world: World) -> None:
    world.write(f'server = "http://{world.second.host}"\n[host."http://{world.first.host}"]\n')
    world.first.down()
    world.read()
    assert world.blobs(world.second) == 1
    world.second.add(Fault(Kind.STATUS, status=404))
    with pytest.raises(NotFoundError):
        world.read()
    assert not world.upstream.requests


def test_many_threads_learn_it_once(world: World) -> None:
    world.first.add(Fault(Kind.STATUS, status=500))
    world.read()
    asked = len(world.first.requests)
    threads = [threading.Thread(target=world.read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(world.first.requests) == asked, "every client of the process knows"


# --- TLS --------------------------------------------------------------------------------------------------------------


class Authority:
    """A CA, a server's context that demands client certificates, and a client's files."""

    def __init__(self, directory: Path) -> None:
        self.ca = trustme.CA()
        self.file = directory / "ca.pem"
        self.ca.cert_pem.write_to_path(self.file)
        leaf = self.ca.issue_cert("kim@client.test")
        self.cert, self.key, self.both = (directory / name for name in ("client.cert", "client.key", "both.pem"))
        leaf.cert_chain_pems[0].write_to_path(self.cert)
        leaf.private_key_pem.write_to_path(self.key)
        leaf.private_key_and_cert_chain_pem.write_to_path(self.both)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.ca.issue_cert("127.0.0.1").configure_cert(self.context)
        self.ca.configure_trust(self.context)
        self.context.verify_mode = ssl.CERT_REQUIRED


def read_over_tls(text: str, image: SmallImage, options: RegistryOptions) -> None:
    source = open_source(text, options)
    try:
        with source.read_range(image.digest, 10, 100, time.monotonic() + READ_S) as stream:
            assert read_exactly(stream, 100) == LAYER[10:110]
    finally:
        source.close()


def test_client_certificates(servers: tuple[Registry, SmallImage], tmp_path: Path) -> None:
    registry, image = servers
    authority = Authority(tmp_path)
    with FaultProxy(registry.host, ssl_context=authority.context) as proxy:
        text = f"{proxy.host}/team/app:1"
        for key, cert in ((authority.key, authority.cert), (None, authority.both)):
            options = RegistryOptions(ca_file=authority.file, client_cert=cert, client_key=key, **LIMITS)  # type: ignore[arg-type]
            read_over_tls(text, image, options)
        with pytest.raises(SourceError):
            read_over_tls(text, image, RegistryOptions(ca_file=authority.file, **LIMITS))  # type: ignore[arg-type]
        place = tmp_path / "certs.d" / proxy.host
        place.mkdir(parents=True)
        by_directory = RegistryOptions(hosts_dir=tmp_path / "certs.d", **LIMITS)  # type: ignore[arg-type]
        for name, file in (("ca.crt", authority.file), ("client.cert", authority.cert), ("client.key", authority.key)):
            (place / name).write_bytes(file.read_bytes())
        read_over_tls(text, image, by_directory)
        (place / "hosts.toml").write_text(f'ca = "ca.crt"\nclient = "{authority.both}"\n')
        read_over_tls(text, image, by_directory)
        (place / "hosts.toml").write_text('client = [["client.cert", "client.key"]]\nskip_verify = true\n')
        read_over_tls(text, image, by_directory)


def test_a_key_that_does_not_fit_is_said_so(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), trustme.CA().issue_cert("other.test")
    other.private_key_pem.write_to_path(tmp_path / "other.key")
    options = RegistryOptions(client_cert=authority.cert, client_key=tmp_path / "other.key")
    with pytest.raises(UsageError, match="client certificate"):
        open_source("127.0.0.1:1/a:1", options)
    with pytest.raises(UsageError, match="no certificate"):
        RegistryOptions(client_key=authority.key)


def test_a_mirror_behind_tls_and_an_upstream_with_a_password(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    kim = {"username": "kim", "password": "hunter2", **LIMITS}
    with running_registry(tmp_path, username="kim", password="hunter2") as registry:
        destination = open_destination(f"{registry.host}/team/app:1", RegistryOptions(**kim))  # type: ignore[arg-type]
        image = write_image(destination, [LAYER])
        destination.close()
        with running_registry(tmp_path, storage=registry.storage) as open_registry, \
                FaultProxy(open_registry.host, ssl_context=authority.context) as mirror:
            place = tmp_path / "certs.d" / "_default"
            place.mkdir(parents=True)
            (place / "hosts.toml").write_text(
                f'[host."https://{mirror.host}"]\nca = "{authority.file}"\nclient = "{authority.both}"\n')
            text = f"{registry.host}/team/app:1"
            read_over_tls(text, image, RegistryOptions(hosts_dir=tmp_path / "certs.d", **LIMITS))  # type: ignore[arg-type]
            assert mirror.requests
            mirror.down()
            with pytest.raises(AuthError):
                read_over_tls(text, image, RegistryOptions(hosts_dir=tmp_path / "certs.d", **LIMITS))  # type: ignore[arg-type]
            read_over_tls(text, image, RegistryOptions(hosts_dir=tmp_path / "certs.d", **kim))  # type: ignore[arg-type]


def test_a_digest_in_the_name_is_checked_whoever_gave_it(world: World) -> None:
    """A mirror that resolves is trusted with tags, as containerd trusts it; with nothing else."""
    wrong = Digest.of(b"another document")
    source = open_source(f"{world.upstream.host}/team/app@{wrong}", world.options())
    with pytest.raises(NotFoundError):
        source.root()
    source.close()


def test_tls_contexts_are_shared_until_a_file_changes(tmp_path: Path) -> None:
    first, second = trustme.CA(), trustme.CA()
    path = tmp_path / "ca.pem"
    first.cert_pem.write_to_path(path)
    trust = Trust(ca_files=(path,))
    context = tls_context(trust)
    assert tls_context(Trust(ca_files=(path,))) is context
    assert tls_context(Trust()) is not context
    second.cert_pem.write_to_path(tmp_path / "new.pem")
    (tmp_path / "new.pem").rename(path)
    changed = tls_context(trust)
    assert changed is not context
    assert changed.get_ca_certs() != context.get_ca_certs()


def test_the_command_line_has_it_all(servers: tuple[Registry, SmallImage], tmp_path: Path) -> None:
    registry, _ = servers
    authority = Authority(tmp_path)
    place = tmp_path / "certs.d" / "registry.invalid"
    place.mkdir(parents=True)
    with FaultProxy(registry.host, ssl_context=authority.context) as proxy:
        (place / "hosts.toml").write_text(
            f'[host."https://{proxy.host}"]\nca = "{authority.file}"\nclient = "{authority.both}"\n')

        def inspect(*words: str | Path) -> int:
            return subprocess.run([sys.executable, "-m", "lazyfs", "inspect", "--json", *map(str, words)],
                                  capture_output=True, timeout=60, check=False).returncode

        trust = ["--ca-file", authority.file]
        assert inspect(f"{proxy.host}/team/app:1", *trust, "--client-cert", authority.cert, "--client-key",
                       authority.key) == 0
        assert inspect(f"{proxy.host}/team/app:1", *trust, "--client-key", authority.key) == UsageError.exit_code
        assert inspect(f"{proxy.host}/team/app:1", *trust) == SourceError.exit_code
        assert inspect("registry.invalid/team/app:1", "--hosts-dir", tmp_path / "certs.d") == 0
