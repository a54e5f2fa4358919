"""Tokens and passwords that end in the middle of reads: renewed once, for all who wait, whoever has a new one."""

from __future__ import annotations

import base64
import json
import threading
import time
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import AuthError, LazyfsError
from lazyfs.registry import RegistryOptions, Secret, open_destination, open_source
from lazyfs.registry.options import HostSettings
from lazyfs.registry.pushed import PUSHED
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.registrykit import bcrypt_line, running_registry
from tests.smallimage import SmallImage, write_image
from tests.tokenserver import TokenServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lazyfs.registry.place import ImageSource

LAYER = bytes(range(256)) * 500
THREADS = 24
LIMITS = {"request_deadline_s": 10.0, "io_timeout_s": 5.0, "retry_count": 0}


class World:
    """A registry behind `proxy`, its token server `tokens`, an image app:1; credentials are where a test puts them."""

    def __init__(self, tokens: TokenServer, proxy: FaultProxy, image: SmallImage, directory: Path) -> None:
        self.tokens, self.proxy, self.image, self.directory = tokens, proxy, image, directory

    def push(self, password: str) -> None:
        PUSHED.put([{"host": self.proxy.host, "repository": "app", "username": "kim", "password": password}])

    def write_docker(self, password: str) -> None:
        pair = base64.b64encode(f"kim:{password}".encode()).decode()
        (self.directory / ".docker").mkdir(exist_ok=True)
        content = {"auths": {self.proxy.host: {"auth": pair}}}
        (self.directory / ".docker" / "config.json").write_text(json.dumps(content))

    def settings(self, password: str) -> RegistryOptions:
        (self.directory / "password").write_text(password)
        own = HostSettings(username="kim", password_file=self.directory / "password")
        return RegistryOptions(hosts={self.proxy.host: own}, **LIMITS)  # type: ignore[arg-type]

    def open(self, options: RegistryOptions | None = None) -> ImageSource:
        return open_source(f"{self.proxy.host}/app:1", options or RegistryOptions(**LIMITS))  # type: ignore[arg-type]


def read(source: ImageSource, image: SmallImage) -> None:
    with source.read_range(image.digest, 10, 100, time.monotonic() + 10) as stream:
        data = b""
        while len(data) < 100:
            data += stream.read(100)
        assert data == LAYER[10:110]


def read_in_threads(source: ImageSource, image: SmallImage, count: int = THREADS) -> list[LazyfsError]:
    """All at once; the errors."""
    errors: list[LazyfsError] = []
    together = threading.Barrier(count)

    def one() -> None:
        together.wait(10)
        try:
            read(source, image)
        except LazyfsError as error:
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return errors


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TokenServer, str, SmallImage]]:
    path = tmp_path_factory.mktemp("registry")
    tokens = TokenServer(path, users={"kim": "hunter2"})
    with tokens, running_registry(path, **tokens.registry_arguments()) as registry:
        destination = open_destination(f"{registry.host}/app:1", RegistryOptions(username="kim", password="hunter2"))
        image = write_image(destination, [LAYER])
        destination.close()
        yield tokens, registry.host, image


@pytest.fixture
def world(
    servers: tuple[TokenServer, str, SmallImage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DOCKER_CONFIG", "REGISTRY_AUTH_FILE"):
        monkeypatch.delenv(name, raising=False)
    tokens, host, image = servers
    tokens.reset(users={"kim": "hunter2"}, refresh_tokens=set())
    with FaultProxy(host) as proxy:
        yield World(tokens, proxy, image, tmp_path)
    PUSHED.__init__()  # type: ignore[misc]


def test_a_token_that_expires_is_renewed_once_for_all(world: World) -> None:
    world.push("hunter2")
    world.tokens.lifetime_s = 1.0
    source = world.open()
    read(source, world.image)
    assert len(world.tokens.requests) == 1
    world.tokens.lifetime_s = 60.0
    world.tokens.delay_s = 0.3          # all others arrive meanwhile
    expires_at = time.monotonic() + 1.0
    while time.monotonic() < expires_at:
        time.sleep(0.05)
    assert read_in_threads(source, world.image) == []
    assert len(world.tokens.requests) == 2
    source.close()


def test_a_token_that_the_registry_refuses_is_renewed_once_for_all(world: World) -> None:
    """The clock says that it is good, the registry does not (revoked, or the registry has another key now)."""
    world.push("hunter2")
    source = world.open()
    read(source, world.image)
    world.tokens.delay_s = 0.3
    challenge = {"WWW-Authenticate": f'Bearer realm="{world.tokens.realm}",service="test-service"'}
    world.proxy.add(Fault(Kind.STATUS, path="/blobs/", status=401, headers=challenge, times=THREADS))
    assert read_in_threads(source, world.image) == []
    assert len(world.tokens.requests) == 2
    source.close()


def test_the_first_token_is_asked_for_once(world: World) -> None:
    world.push("hunter2")
    world.tokens.delay_s = 0.3
    source = world.open()
    assert read_in_threads(source, world.image) == []
    assert len(world.tokens.requests) == 1
    source.close()


def test_a_refusal_is_one_for_all_who_wait(world: World) -> None:
    world.push("wr0ng")
    world.tokens.delay_s = 0.3
    source = world.open()
    errors = read_in_threads(source, world.image)
    assert len(errors) == THREADS
    assert all(isinstance(error, AuthError) for error in errors)
    assert not any("wr0ng" in f"{error} {error!r} {error.hint}" for error in errors)
    assert len(world.tokens.requests) == 1
    world.push("hunter2")
    world.tokens.delay_s = 0.0
    read(source, world.image)
    source.close()


def test_a_password_that_was_changed_is_taken_from_where_it_is(world: World) -> None:
    """Kubelet's is out of date: docker's is tried, then the one that kubelet pulls with next."""
    world.push("hunter2")
    source = world.open()
    read(source, world.image)
    challenge = {"WWW-Authenticate": f'Bearer realm="{world.tokens.realm}",service="test-service"'}

    def expire(password: str) -> None:
        world.tokens.users = {"kim": password}
        world.proxy.add(Fault(Kind.STATUS, path="/blobs/", status=401, headers=challenge, times=1))

    expire("second")
    world.write_docker("second")
    read(source, world.image)
    expire("third")
    world.push("third")
    read(source, world.image)
    expire("fourth")
    with pytest.raises(AuthError):
        read(source, world.image)
    world.write_docker("fourth")
    read(source, world.image)
    source.close()


def test_the_registrys_own_settings_come_last(world: World) -> None:
    world.push("old")
    world.write_docker("older")
    source = world.open(world.settings("hunter2\n"))
    read(source, world.image)
    assert len(world.tokens.requests) == 3
    source.close()


def test_credentials_that_come_after_an_anonymous_try_are_used(world: World) -> None:
    """A token server that gives anybody a token, and a registry that then wants another."""
    world.tokens.anonymous_pull = True
    challenge = {"WWW-Authenticate": f'Bearer realm="{world.tokens.realm}",service="test-service"'}
    refuse = Fault(Kind.STATUS, path="/blobs/", status=401, headers=challenge)
    world.proxy.add(refuse)
    source = world.open()
    with pytest.raises(AuthError, match="refuses its own token"):
        read(source, world.image)
    world.proxy.clear()
    world.proxy.add(Fault(Kind.STATUS, path="/blobs/", status=401, headers=challenge, times=1))
    world.push("hunter2")
    read(source, world.image)
    assert world.tokens.requests[-1].authorization.startswith("Basic ")
    source.close()


def test_a_403_is_answered_with_other_credentials_if_there_are(world: World) -> None:
    world.push("hunter2")
    source = world.open()
    read(source, world.image)
    world.proxy.add(Fault(Kind.STATUS, path="/blobs/", status=403, times=1))
    with pytest.raises(AuthError):
        read(source, world.image)
    assert len(world.tokens.requests) == 1, "a new token of the same right would not help"
    world.tokens.users = {"kim": "other"}
    world.write_docker("other")
    world.proxy.clear()
    world.proxy.add(Fault(Kind.STATUS, path="/blobs/", status=403, times=1))
    read(source, world.image)
    source.close()


def test_a_password_in_the_middle_of_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Basic, a registry of its own: htpasswd is changed while it is read from."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with running_registry(tmp_path, username="kim", password="one") as registry:
        kim = RegistryOptions(username="kim", password=Secret("one"))
        destination = open_destination(f"{registry.host}/app:1", kim)
        image = write_image(destination, [LAYER])
        destination.close()
        (tmp_path / "password").write_text("one")
        own = HostSettings(username="kim", password_file=tmp_path / "password")
        source = open_source(f"{registry.host}/app:1", RegistryOptions(hosts={registry.host: own}, **LIMITS))  # type: ignore[arg-type]
        read(source, image)
        (registry.directory / "htpasswd").write_text(bcrypt_line("kim", "two"))
        registry.restart()
        with pytest.raises(LazyfsError):
            read(source, image)
        (tmp_path / "password").write_text("two")
        assert read_in_threads(source, image, 8) == []
        source.close()
