"""Where credentials come from, and what a challenge asks for."""

from __future__ import annotations

import base64
import json
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.errors import AuthError, UsageError
from lazyfs.registry import program
from lazyfs.registry.challenge import merge_scopes, parse_challenges
from lazyfs.registry.credentials import Credentials, ask_helper, find_credentials
from lazyfs.registry.options import RegistryOptions, Secret

if TYPE_CHECKING:
    from pathlib import Path

KIM = base64.b64encode(b"kim:hunter2").decode()
LEE = base64.b64encode(b"lee:swordfish").decode()


@pytest.fixture(autouse=True)
def _no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("REGISTRY_AUTH_FILE", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def config(tmp_path: Path, content: object) -> RegistryOptions:
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return RegistryOptions(auth_file=path)


def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, name: str = "test") -> None:
    """A real docker-credential program in PATH."""
    directory = tmp_path / "bin"
    directory.mkdir(exist_ok=True)
    program = directory / f"docker-credential-{name}"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


def shown(found: Credentials | None) -> tuple[str, str, str] | None:
    return (found.username, found.password.reveal(), found.identity_token.reveal()) if found else None


@pytest.mark.parametrize("key", ["host:5000", "https://host:5000", "http://host:5000/v2/", "host:5000/v1/"])
def test_auths_under_every_spelling_of_a_host(tmp_path: Path, key: str) -> None:
    options = config(tmp_path, {"auths": {key: {"auth": KIM}, "other:5000": {"auth": LEE}}})
    assert shown(find_credentials(options, "host:5000", "a/b")) == ("kim", "hunter2", "")
    assert find_credentials(options, "host", "a/b") is None


def test_docker_hubs_legacy_key(tmp_path: Path) -> None:
    options = config(tmp_path, {"auths": {"https://index.docker.io/v1/": {"auth": KIM}}})
    assert shown(find_credentials(options, "docker.io", "library/nginx")) == ("kim", "hunter2", "")


def test_the_most_specific_key_wins(tmp_path: Path) -> None:
    options = config(tmp_path, {"auths": {"host": {"auth": KIM}, "host/team": {"auth": LEE}}})
    assert shown(find_credentials(options, "host", "team/app")) == ("lee", "swordfish", "")
    assert shown(find_credentials(options, "host", "other/app")) == ("kim", "hunter2", "")


def test_identity_tokens_and_plain_fields(tmp_path: Path) -> None:
    options = config(tmp_path, {"auths": {"a": {"auth": KIM, "identitytoken": "refresh"},
                                          "b": {"username": "lee", "password": "pw"}, "c": {}}})
    assert shown(find_credentials(options, "a", "r")) == ("kim", "", "refresh")
    assert shown(find_credentials(options, "b", "r")) == ("lee", "pw", "")
    assert find_credentials(options, "c", "r") is None


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_credentials(RegistryOptions(), "host", "r") is None
    places = [tmp_path / "home/.docker/config.json", tmp_path / "docker/config.json", tmp_path / "auth.json"]
    for number, path in enumerate(places):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"auths": {"host": {"username": f"user{number}", "password": "x"}}}))
    for number, (name, value) in enumerate([("X", ""), ("DOCKER_CONFIG", str(tmp_path / "docker")),
                                            ("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))]):
        monkeypatch.setenv(name, value)
        found = find_credentials(RegistryOptions(), "host", "r")
        assert found is not None
        assert found.username == f"user{number}"
    found = find_credentials(RegistryOptions(username="kim", password="pw"), "host", "r")
    assert shown(found) == ("kim", "pw", "")


@pytest.mark.parametrize("content", ["{", "[]", '{"auths": 7}', '{"auths": {"host": {"auth": 5}}}', "\xff", "",
                                     '{"auths": {"host": {"auth": "hunter2 is no base64!"}}}', "[" * 100_000])
def test_broken_files_are_usage_errors_without_their_content(tmp_path: Path, content: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_credentials(config(tmp_path, content), "host", "r")
    assert "hunter2" not in str(caught.value)
    assert "config.json" in str(caught.value)


def test_a_named_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        find_credentials(RegistryOptions(auth_file=tmp_path / "none"), "host", "r")


def test_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(tmp_path, monkeypatch, 'read server; echo "{\\"Username\\": \\"for-$server\\", \\"Secret\\": \\"s\\"}"')
    options = config(tmp_path, {"credHelpers": {"host": "test"}, "auths": {"other": {"auth": KIM}}})
    assert shown(find_credentials(options, "host", "r")) == ("for-host", "s", "")
    assert shown(find_credentials(options, "other", "r")) == ("kim", "hunter2", "")
    store = config(tmp_path, {"credsStore": "test", "auths": {"https://index.docker.io/v1/": {}}})
    assert shown(find_credentials(store, "docker.io", "library/x")) == ("for-https://index.docker.io/v1/", "s", "")


def test_a_helper_with_a_token_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(tmp_path, monkeypatch, 'echo \'{"Username": "<token>", "Secret": "refresh"}\'')
    assert shown(ask_helper("test", "host")) == ("", "", "refresh")
    helper(tmp_path, monkeypatch, 'echo "credentials not found in native keychain"; exit 1')
    assert ask_helper("test", "host") is None
    store = config(tmp_path, {"credsStore": "test", "auths": {"host": {"auth": KIM}}})
    assert shown(find_credentials(store, "host", "r")) == ("kim", "hunter2", "")


@pytest.mark.parametrize("script", ["echo hunter2; exit 3", "echo hunter2", "yes hunter2", "sleep 60 & sleep 60",
                                    "exec >&-; sleep 60", "kill -9 $$",
                                    'echo \'{"Username": 5, "Secret": "hunter2"}\''])
def test_a_bad_helper_is_an_auth_error_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(program, "DEADLINE_S", 0.5)
    helper(tmp_path, monkeypatch, script)
    with pytest.raises(AuthError) as caught:
        ask_helper("test", "host")
    assert "hunter2" not in str(caught.value) + caught.value.hint


@pytest.mark.parametrize("name", ["absent-really", "../evil", "a/b", "", "-x"])
def test_helpers_names_are_names(name: str) -> None:
    with pytest.raises(AuthError):
        ask_helper(name, "host")


def test_credentials_hide_themselves() -> None:
    found = Credentials("kim", Secret("hunter2"), Secret("refresh"))
    text = f"{found!r} {found} {found.basic()!r}"
    assert "hunter2" not in text
    assert "refresh" not in text
    assert KIM not in text
    assert found.basic().reveal() == f"Basic {KIM}"


def test_challenges() -> None:
    found = parse_challenges([
        'Bearer realm="https://auth.example/token?a=1,2",service="reg\\"istry",scope="repository:a/b:pull,push"',
        "Basic realm=simple, Negotiate", "Digest",
    ])
    assert [c.scheme for c in found] == ["bearer", "basic", "negotiate", "digest"]
    assert found[0].parameters == {"realm": "https://auth.example/token?a=1,2", "service": 'reg"istry',
                                   "scope": "repository:a/b:pull,push"}
    assert found[1].parameters == {"realm": "simple"}


@given(st.lists(st.text('Bearer realm="x",\\= \t', max_size=80), max_size=3))
def test_any_challenge_gives_a_list(values: list[str]) -> None:
    for challenge in parse_challenges(values):
        assert challenge.scheme == challenge.scheme.lower()


def test_scopes_are_united() -> None:
    assert merge_scopes("repository:a:pull,push", "repository:a:pull repository:b:pull") == (
        "repository:a:pull,push repository:b:pull")
    assert merge_scopes("repository:host:5000/a:pull", "") == "repository:host:5000/a:pull"
    assert merge_scopes("", "") == ""
