"""Bearer tokens: a real registry that verifies what our token server signs, and token servers that misbehave."""

from __future__ import annotations

import base64
import json
import threading
import time
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import AuthError, LazyfsError, SourceError
from lazyfs.image.digest import Digest
from lazyfs.registry import RegistryOptions, open_destination, open_source
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.registrykit import running_registry
from tests.smallimage import SmallImage, write_image
from tests.tokenserver import TokenServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LAYER = bytes(range(256)) * 500
REFRESH = "refresh-hunter3"


def kim(**more: object) -> RegistryOptions:
    settings: dict[str, object] = {"username": "kim", "password": "hunter2", "request_deadline_s": 4.0,
                                   "io_timeout_s": 1.0, "retry_count": 1, **more}
    return RegistryOptions(**settings)  # type: ignore[arg-type]


class World:
    """A registry behind `proxy`, its token server `tokens`, an image app:1."""

    def __init__(self, tokens: TokenServer, proxy: FaultProxy, image: SmallImage) -> None:
        self.tokens, self.proxy, self.image = tokens, proxy, image

    @property
    def text(self) -> str:
        return f"{self.proxy.host}/app:1"

    def read(self, options: RegistryOptions | None = None, times: int = 1) -> None:
        source = open_source(self.text, options or kim())
        try:
            for _ in range(times):
                with source.read_range(self.image.digest, 10, 100, time.monotonic() + 10) as stream:
                    assert stream.read(100) == LAYER[10:110]
        finally:
            source.close()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TokenServer, str, SmallImage]]:
    path = tmp_path_factory.mktemp("registry")
    tokens = TokenServer(path, users={"kim": "hunter2"})
    with tokens, running_registry(path, **tokens.registry_arguments()) as registry:
        destination = open_destination(f"{registry.host}/app:1", kim())
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
    tokens.reset(users={"kim": "hunter2"}, refresh_tokens={REFRESH})
    with FaultProxy(host) as proxy:
        yield World(tokens, proxy, image)


def test_password_for_token(world: World) -> None:
    world.read(times=5)
    (asked,) = world.tokens.requests
    assert asked.authorization == "Basic " + base64.b64encode(b"kim:hunter2").decode()
    assert asked.scopes == ["repository:app:pull"]
    sent = [seen.headers.get("authorization", "") for seen in world.proxy.requests]
    assert all(value == "" or value.startswith("Bearer ") for value in sent), "the password stays with the token server"
    assert sum(value == "" for value in sent) == 2, "GET /v2/ and the first request"


def test_anonymous_and_refused(world: World) -> None:
    nobody = RegistryOptions(request_deadline_s=4.0)
    with pytest.raises(AuthError) as caught:
        world.read(nobody)
    assert "docker login" in caught.value.hint
    world.tokens.anonymous_pull = True
    world.read(nobody)
    destination = open_destination(world.text, nobody)
    with pytest.raises(AuthError):
        destination.put_bytes(b"x", Digest.of(b"x"))
    destination.close()
    with pytest.raises(AuthError) as caught:
        world.read(kim(password="wr0ng"))
    assert "wr0ng" not in f"{caught.value} {caught.value!r}"


def test_no_right_to_push(world: World) -> None:
    world.tokens.allows_push = False
    destination = open_destination(world.text, kim())
    started = len(world.tokens.requests)
    with pytest.raises(AuthError):
        destination.put_bytes(b"new bytes", Digest.of(b"new bytes"))
    assert len(world.tokens.requests) - started <= 3
    destination.close()


def test_identity_tokens_of_docker_login(world: World, tmp_path: Path) -> None:
    path = tmp_path / "auth.json"
    auth = base64.b64encode(b"00000000-0000-0000-0000-000000000000:").decode()
    path.write_text(json.dumps({"auths": {world.proxy.host: {"auth": auth, "identitytoken": REFRESH}}}))
    world.read(RegistryOptions(auth_file=path))
    (asked,) = world.tokens.requests
    assert asked.method == "POST"
    assert asked.form["refresh_token"] == [REFRESH]
    assert asked.form["service"] == ["test-service"]
    assert REFRESH not in asked.path
    world.tokens.refresh_tokens.clear()
    with pytest.raises(AuthError) as caught:
        world.read(RegistryOptions(auth_file=path))
    assert "hunter3" not in f"{caught.value} {caught.value!r} {caught.value.hint}"


def test_mounts_ask_for_both_repositories(world: World) -> None:
    destination = open_destination(f"{world.proxy.host}/sister:1", kim())
    assert destination.mount_blob(world.image.digest, len(LAYER), f"docker://{world.proxy.host}/app")
    assert sorted(world.tokens.requests[-1].scopes) == ["repository:app:pull", "repository:sister:pull,push"]
    destination.close()


def test_a_token_is_renewed_before_it_expires(world: World) -> None:
    world.tokens.lifetime_s = 1.5
    source = open_source(world.text, kim())
    until = time.monotonic() + 3.5
    while time.monotonic() < until:
        with source.read_range(world.image.digest, 0, 10, time.monotonic() + 10) as stream:
            assert stream.read(10) == LAYER[:10]
        time.sleep(0.05)
    source.close()
    assert 2 <= len(world.tokens.requests) <= 5
    unauthorized = [s for s in world.proxy.seen("GET", "/blobs/") if "authorization" not in s.headers]
    assert len(unauthorized) == 1, "only the first request went without"


@pytest.mark.parametrize("says_lifetime", [True, False])
def test_one_renewal_for_all_threads(world: World, says_lifetime: bool) -> None:
    world.tokens.delay_s = 0.3
    world.tokens.says_lifetime = says_lifetime
    source = open_source(world.text, kim(request_deadline_s=10.0))
    errors: list[BaseException] = []

    def one() -> None:
        try:
            with source.read_range(world.image.digest, 0, 10, time.monotonic() + 10) as stream:
                assert stream.read(10) == LAYER[:10]
        except BaseException as error:  # noqa: BLE001 - handed to the test
            errors.append(error)

    for expected in (1, 2):
        threads = [threading.Thread(target=one) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert len(world.tokens.requests) == expected
        # A registry that has forgotten its tokens: everybody gets a 401 at once.
        world.proxy.add(Fault(Kind.STATUS, path="/blobs/", status=401, times=16, headers=bearer(world.tokens.realm)))
    source.close()


def bearer(realm: str) -> dict[str, str]:
    return {"WWW-Authenticate": f'Bearer realm="{realm}",service="test-service",scope="repository:app:pull"'}


def test_a_401_in_the_middle_is_answered_once(world: World) -> None:
    source = open_source(world.text, kim())
    world.proxy.add(Fault(Kind.STATUS, path="/blobs/", status=401, skip=3, times=1, headers=bearer(world.tokens.realm)))
    for _ in range(6):
        with source.read_range(world.image.digest, 0, 10, time.monotonic() + 10) as stream:
            assert stream.read(10) == LAYER[:10]
    assert len(world.tokens.requests) == 2
    world.proxy.add(Fault(Kind.CUT, path="/blobs/", at=1000, times=1))
    world.proxy.add(Fault(Kind.STATUS, path="/blobs/", status=401, times=1, headers=bearer(world.tokens.realm)))
    with source.open_blob(world.image.digest, len(LAYER)) as stream:
        assert b"".join(iter(lambda: stream.read(999), b"")) == LAYER
    source.close()


def test_a_401_for_ever_ends(world: World) -> None:
    world.proxy.add(Fault(Kind.STATUS, path="/blobs/", status=401, headers=bearer(world.tokens.realm)))
    with pytest.raises(AuthError):
        world.read()
    assert len(world.tokens.requests) == 1
    assert len(world.proxy.seen("GET", "/blobs/")) == 2


@pytest.mark.parametrize("realm", ["http://token.invalid/token", "file:///etc/passwd", "", "http://kim@127.0.0.1/t",
                                   "//x", "http://169.254.169.254/latest", "http://[bad"])
def test_realms_that_get_nothing(world: World, realm: str) -> None:
    world.proxy.add(Fault(Kind.STATUS, path="/blobs/", status=401, headers=bearer(realm)))
    with pytest.raises(AuthError) as caught:
        world.read()
    assert "hunter2" not in f"{caught.value} {caught.value!r}"
    assert not world.tokens.requests


def test_other_challenges(world: World) -> None:
    for value in ("Negotiate", "", "Digest realm=x", "\x01\x02"):
        world.proxy.clear()
        world.proxy.add(Fault(Kind.STATUS, path="/blobs/", status=401, headers={"WWW-Authenticate": value}))
        with pytest.raises(AuthError):
            world.read()


def test_redirects_of_a_token_server_are_not_followed(world: World) -> None:
    world.tokens.status, world.tokens.location = 307, f"http://{world.proxy.host}/stolen?x=1"
    with pytest.raises(SourceError):
        world.read()
    assert not world.proxy.seen(path="stolen")


@pytest.mark.parametrize(("status", "answer", "error", "transient"), [
    (500, b"", SourceError, True), (503, b"", SourceError, True), (429, b"", SourceError, True),
    (404, b"", SourceError, False), (401, b"", AuthError, False), (403, b"", AuthError, False),
    (0, b"<html>", AuthError, False), (0, b"{}", AuthError, False), (0, b'{"token": 5}', AuthError, False),
    (0, b'{"token": "a b"}', AuthError, False), (0, b'{"token": "a\\r\\nX-Evil: 1"}', AuthError, False),
    (0, b"[" * 60_000, AuthError, False),
])
def test_token_servers_that_misbehave(
    world: World, status: int, answer: bytes, error: type[SourceError], transient: bool
) -> None:
    world.tokens.status, world.tokens.answer = status, answer
    with pytest.raises(error) as caught:
        world.read()
    assert caught.value.transient == transient
    assert "hunter2" not in f"{caught.value} {caught.value!r} {caught.value.hint}"


def test_a_token_without_end_or_in_no_time(world: World) -> None:
    world.tokens.answer = b'{"token": "' + b"x" * 100_000 + b'"}'
    with pytest.raises(LazyfsError):
        world.read()
    world.tokens.answer, world.tokens.delay_s = b"", 3.0
    started = time.monotonic()
    with pytest.raises(SourceError):
        world.read(kim(request_deadline_s=1.0))
    assert time.monotonic() - started < 4.0


def test_a_token_of_no_lifetime_still_serves(world: World) -> None:
    world.tokens.answer = json.dumps({"access_token": world.tokens.make_token(["repository:app:pull"], "kim"),
                                      "expires_in": 0}).encode()
    world.read(times=3)
    assert len(world.tokens.requests) >= 3


def test_a_helper_with_a_new_password(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a cloud's helper gives is good for hours only: it is asked again when it is refused."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/docker-credential-rotating"
    script = 'printf \'{"Username": "kim", "Secret": "%s"}\' "$(cat '
    program.write_text(f'#!/bin/sh\n{script}{tmp_path}/pw)"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    (tmp_path / "pw").write_text("hunter2")
    path = tmp_path / "auth.json"
    path.write_text(json.dumps({"credHelpers": {world.proxy.host: "rotating"}}))
    source = open_source(world.text, RegistryOptions(auth_file=path))
    assert source.root() == world.image.document
    (tmp_path / "pw").write_text("rotated")
    world.tokens.users["kim"] = "rotated"
    world.proxy.add(Fault(Kind.STATUS, path="/manifests/", status=401, times=1, headers=bearer(world.tokens.realm)))
    assert source.root() == world.image.document
    source.close()
