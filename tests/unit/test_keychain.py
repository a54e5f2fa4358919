"""Where credentials come from, in which order; kubelet's plugins; those that were handed over."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from lazyfs.errors import AuthError, LazyfsError, UsageError
from lazyfs.registry import RegistryOptions, kubelet, program, pushed
from lazyfs.registry.credentials import Credentials
from lazyfs.registry.fields import from_fields, to_fields
from lazyfs.registry.keychain import Keychain
from lazyfs.registry.options import HostSettings, Secret
from lazyfs.registry.pushed import PUSHED, PushedCredentials

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HOST, REPOSITORY = "reg.example:5000", "team/app"
IMAGE = f"{HOST}/{REPOSITORY}"
GROUP = "credentialprovider.kubelet.k8s.io/v1"


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DOCKER_CONFIG", "REGISTRY_AUTH_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(kubelet, "_answers", kubelet._Answers())
    yield
    PUSHED.__init__()  # type: ignore[misc]


def name_of(found: Credentials | None) -> str | None:
    return None if found is None else f"{found.username}:{found.password.reveal()}"


class Plugins:
    """A directory of plugins and their configuration; each counts how often it ran."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "plugins"
        self.directory.mkdir()
        self.config = directory / "providers.yaml"
        self.providers: list[dict[str, Any]] = []

    def add(self, name: str, answer: object, *, match: tuple[str, ...] = ("reg.example:5000",), script: str = "",
            **more: Any) -> None:
        path = self.directory / name
        text = answer if isinstance(answer, str) else json.dumps(answer)
        path.write_text(f"#!/bin/sh\ncat > {path}.asked\necho >> {path}.runs\n"
                        f'echo "$* $NAME" > {path}.args\n{script}\n' + f"cat <<'END'\n{text}\nEND\n")
        path.chmod(0o755)
        self.providers.append({"name": name, "apiVersion": GROUP, "matchImages": list(match),
                               "defaultCacheDuration": "0s", **more})
        self.write()

    def write(self) -> None:
        self.config.write_text(json.dumps({"apiVersion": "kubelet.config.k8s.io/v1", "kind": "CredentialProviderConfig",
                                           "providers": self.providers}))

    def runs(self, name: str) -> int:
        path = self.directory / f"{name}.runs"
        return len(path.read_text()) if path.exists() else 0

    def options(self, **more: Any) -> RegistryOptions:
        return RegistryOptions(provider_config=self.config, provider_bin_dir=self.directory, **more)


@pytest.fixture
def plugins(tmp_path: Path) -> Plugins:
    return Plugins(tmp_path)


def answer(username: str, *, key: str = "Image", lifetime: str | None = None, host: str = HOST) -> dict[str, Any]:
    return {"apiVersion": GROUP, "kind": "CredentialProviderResponse", "cacheKeyType": key, "cacheDuration": lifetime,
            "auth": {host: {"username": username, "password": "hunter2"}}}


def push(username: str, repository: str = REPOSITORY, **more: Any) -> None:
    PUSHED.put([{"host": HOST, "repository": repository, "username": username, "password": "hunter2", **more}])


def test_the_order_of_the_sources(tmp_path: Path, plugins: Plugins) -> None:
    docker = tmp_path / "config.json"
    docker.write_text(json.dumps({"auths": {HOST: {"username": "docker", "password": "hunter2"}}}))
    plugins.add("cloud", answer("plugin"))
    (tmp_path / "password").write_text("hunter2\nmore")
    own = HostSettings(username="settings", password_file=tmp_path / "password")
    push("kubelet")
    chain = Keychain(plugins.options(auth_file=docker, hosts={HOST: own}))
    refused: list[Credentials] = []
    while (found := chain.find(HOST, REPOSITORY, refused)) is not None:
        assert len(refused) < 10
        assert found.password.reveal() == "hunter2"
        refused.append(found)
    assert [one.username for one in refused] == ["kubelet", "docker", "plugin", "settings"]
    assert "hunter2" not in repr(refused)
    explicit = Keychain(plugins.options(auth_file=docker, hosts={HOST: own}, username="kim", password="pw"))
    assert name_of(explicit.find(HOST, REPOSITORY)) == "kim:pw"
    assert explicit.find(HOST, REPOSITORY, [Credentials("kim", Secret("pw"))]) is None, "nothing behind one's back"


def test_a_source_that_fails_is_passed_over(tmp_path: Path, plugins: Plugins) -> None:
    docker = tmp_path / "config.json"
    docker.write_text("{")
    chain = Keychain(plugins.options(auth_file=docker))
    plugins.add("cloud", answer("plugin"))
    assert name_of(chain.find(HOST, REPOSITORY)) == "plugin:hunter2"
    plugins.add("cloud", "", script="exit 3")
    with pytest.raises(UsageError, match=r"config\.json"):
        chain.find(HOST, REPOSITORY)
    docker.write_text("{}")
    with pytest.raises(AuthError, match="exit code 3"):
        chain.find(HOST, REPOSITORY)


def test_password_files(tmp_path: Path) -> None:
    path = tmp_path / "password"
    chain = Keychain(RegistryOptions(hosts={HOST: HostSettings(username="kim", password_file=path)}))
    assert chain.find("other.example", REPOSITORY) is None
    with pytest.raises(UsageError, match="cannot read"):
        chain.find(HOST, REPOSITORY)
    path.write_bytes(b"one\r\n")
    assert name_of(chain.find(HOST, REPOSITORY)) == "kim:one"
    path.write_bytes(b"two")
    assert name_of(chain.find(HOST, REPOSITORY)) == "kim:two", "it may be replaced"
    for content in (b"", b"\n", b"\xff\xfe", b"x" * 100_000):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="password"):
            chain.find(HOST, REPOSITORY)


# --- kubelet's plugins ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "image", "is_match"), [
    ("reg.example", "reg.example/a", True), ("reg.example", "reg.example:5000/a", False),
    ("reg.example:5000", "reg.example:5000/a", True), ("*.example", "reg.example/a", True),
    ("*.example", "a.reg.example/a", False), ("*.*.example", "a.reg.example/a", True),
    ("r*.example", "reg.example/a", True), ("reg.example/team", "reg.example/team/a", True),
    ("reg.example/team", "reg.example/other", False), ("https://reg.example", "reg.example/a", True),
    ("*", "reg.example/a", False), ("REG.example", "reg.EXAMPLE/a", True),
    ("1.dkr.ecr.*.clouds.example", "1.dkr.ecr.eu-1.clouds.example/a", True),
])
def test_which_images_a_pattern_means(pattern: str, image: str, is_match: bool) -> None:
    assert kubelet.matches(pattern, image) is is_match


def test_what_a_plugin_is_told(plugins: Plugins) -> None:
    plugins.add("cloud", answer("x"), args=["get", "--now"], env=[{"name": "NAME", "value": "value"}])
    assert name_of(Keychain(plugins.options()).find(HOST, REPOSITORY)) == "x:hunter2"
    asked = json.loads((plugins.directory / "cloud.asked").read_text())
    assert asked == {"apiVersion": GROUP, "kind": "CredentialProviderRequest", "image": IMAGE}
    assert (plugins.directory / "cloud.args").read_text() == "get --now value\n"


def test_the_configuration_may_be_yaml(plugins: Plugins) -> None:
    plugins.add("cloud", answer("x"))
    plugins.config.write_text(
        "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n"
        f"- name: cloud\n  apiVersion: {GROUP}\n  matchImages: ['*.example:5000']\n  defaultCacheDuration: 12h0m0s\n")
    assert name_of(Keychain(plugins.options()).find(HOST, REPOSITORY)) == "x:hunter2"


@pytest.mark.parametrize(("key", "runs"), [("Image", 3), ("Registry", 2), ("Global", 1)])
def test_an_answer_is_kept_as_it_says(plugins: Plugins, key: str, runs: int) -> None:
    found = answer("x", key=key, lifetime="1h")
    found["auth"]["two.example"] = {"username": "x", "password": "hunter2"}
    plugins.add("cloud", found, match=(HOST, "two.example"))
    chain = Keychain(plugins.options())
    for _ in range(2):
        for host, repository in ((HOST, REPOSITORY), (HOST, "team/other"), ("two.example", REPOSITORY)):
            assert name_of(chain.find(host, repository)) == "x:hunter2"
    assert plugins.runs("cloud") == runs


@pytest.mark.parametrize(("lifetime", "default", "runs"), [(None, "1h", 1), (None, "0s", 2), ("0s", "1h", 2)])
def test_how_long_an_answer_is_kept(plugins: Plugins, lifetime: str | None, default: str, runs: int) -> None:
    plugins.add("cloud", answer("x", lifetime=lifetime), defaultCacheDuration=default)
    for _ in range(2):
        assert name_of(Keychain(plugins.options()).find(HOST, REPOSITORY)) == "x:hunter2"
    assert plugins.runs("cloud") == runs


def test_what_the_registry_refuses_is_asked_for_again(plugins: Plugins) -> None:
    plugins.add("cloud", answer("old", lifetime="1h"))
    chain = Keychain(plugins.options())
    old = chain.find(HOST, REPOSITORY)
    assert old is not None
    plugins.add("cloud", answer("new", lifetime="1h"))
    assert name_of(chain.find(HOST, REPOSITORY)) == "old:hunter2"
    assert name_of(chain.find(HOST, REPOSITORY, [old])) == "new:hunter2"
    assert name_of(chain.find(HOST, REPOSITORY)) == "new:hunter2"


def test_many_threads_run_a_plugin_once(plugins: Plugins) -> None:
    plugins.add("cloud", answer("x", lifetime="1h"), script="sleep 0.3")
    chain = Keychain(plugins.options())
    found: list[str | None] = []
    threads = [threading.Thread(target=lambda: found.append(name_of(chain.find(HOST, REPOSITORY)))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == ["x:hunter2"] * 16
    assert plugins.runs("cloud") == 1


def test_the_most_specific_key_and_the_next_plugin(plugins: Plugins) -> None:
    plugins.add("none", {**answer("x"), "auth": {"other.example": {"username": "x", "password": "y"}}})
    plugins.add("token", answer("never"), tokenAttributes={"serviceAccountTokenAudience": "a"})
    plugins.add("cloud", {**answer("x"), "auth": {
        HOST: {"username": "host", "password": "a"}, f"{HOST}/team": {"username": "team", "password": "b"}}})
    assert name_of(Keychain(plugins.options()).find(HOST, REPOSITORY)) == "team:b"
    assert name_of(Keychain(plugins.options()).find(HOST, "other")) == "host:a"
    assert (plugins.runs("none"), plugins.runs("token")) == (2, 0)


@pytest.mark.parametrize(("text", "script"), [
    ("not JSON", ""), ("{}", ""), (json.dumps({**answer("hunter2"), "kind": "X"}), ""),
    (json.dumps({**answer("hunter2"), "apiVersion": GROUP + "beta1"}), ""),
    (json.dumps(answer("hunter2", key="Planet")), ""), ("", "exit 1"), ("", "head -c 100000 /dev/zero"),
    ("", "sleep 30"),
], ids=["text", "empty", "kind", "version", "key", "fails", "floods", "hangs"])
def test_plugins_that_misbehave(plugins: Plugins, monkeypatch: pytest.MonkeyPatch, text: str, script: str) -> None:
    monkeypatch.setattr(program, "DEADLINE_S", 0.5)
    plugins.add("cloud", text, script=script)
    with pytest.raises(AuthError) as caught:
        Keychain(plugins.options()).find(HOST, REPOSITORY)
    assert "cloud" in str(caught.value)
    assert "hunter2" not in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize("content", [
    "", "[", "a: b", "- 1", "{}", json.dumps({"apiVersion": "v1", "kind": "CredentialProviderConfig"}),
    json.dumps({"apiVersion": "kubelet.config.k8s.io/v1", "kind": "Other"}),
    *(json.dumps({"apiVersion": "kubelet.config.k8s.io/v1", "kind": "CredentialProviderConfig", "providers": [one]})
      for one in ({"name": "../sh", "apiVersion": GROUP, "matchImages": []}, {"name": "x"},
                  {"name": "x", "apiVersion": "v7", "matchImages": []}, {"name": "", "apiVersion": GROUP,
                                                                      "matchImages": []})),
])
def test_configurations_that_are_none(plugins: Plugins, content: str) -> None:
    plugins.config.write_text(content)
    with pytest.raises(UsageError, match=r"providers\.yaml"):
        Keychain(plugins.options()).find(HOST, REPOSITORY)


# --- handed over ------------------------------------------------------------------------------------------------------


def test_the_newest_counts_and_only_for_its_image() -> None:
    push("old")
    push("new")
    push("other", repository="team/other")
    chain = Keychain(RegistryOptions())
    assert name_of(chain.find(HOST, REPOSITORY)) == "new:hunter2"
    assert name_of(chain.find(HOST, "team/other")) == "other:hunter2"
    assert chain.find(HOST, "team/third") is None
    assert chain.find("reg.example", REPOSITORY) is None
    assert PUSHED.take_used() == [[HOST, REPOSITORY], [HOST, "team/other"]]
    assert PUSHED.take_used() == []


def test_the_unused_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(pushed.time, "monotonic", lambda: now[0])
    kept = PushedCredentials()
    kept.put([{"host": HOST, "repository": one, "username": "kim", "lifetime_s": 100} for one in ("a", "b")])
    now[0] += 90
    assert kept.find(HOST, "a") is not None
    now[0] += 90
    assert kept.find(HOST, "b") is None
    assert kept.find(HOST, "a") is not None
    now[0] += 101
    assert len(kept) == 0


def test_there_is_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushed, "COUNT_MAX", 10)
    kept = PushedCredentials()
    for number in range(30):
        kept.put([{"host": HOST, "repository": str(number), "identity_token": "t"}])
    assert len(kept) == 10
    assert kept.find(HOST, "0") is None
    assert kept.find(HOST, "29") == Credentials(identity_token=Secret("t"))


@pytest.mark.parametrize("entry", [
    None, "x", {}, {"host": HOST}, {"host": "", "username": "kim"}, {"host": HOST, "username": 7},
    {"host": HOST, "username": "kim", "lifetime_s": "x"}, {"host": HOST, "username": "kim", "lifetime_s": 0},
    {"host": HOST, "username": "kim", "lifetime_s": float("nan")}, {"host": HOST, "username": "hunter2" * 100_000},
])
def test_malformed_ones_change_nothing(entry: Any) -> None:
    kept = PushedCredentials()
    with pytest.raises(UsageError) as caught:
        kept.put([{"host": HOST, "username": "kim"}, entry])
    assert len(kept) == 0
    assert "hunter2" not in str(caught.value)


def test_who_expects_them_waits_for_them() -> None:
    kept = PushedCredentials()
    kept.expect(20.0)
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(name_of(kept.find(HOST, REPOSITORY))))
    thread.start()
    kept.put([{"host": HOST, "repository": "another", "username": "lee"}], more=True)
    thread.join(0.1)
    assert thread.is_alive()
    kept.put([{"host": HOST, "repository": REPOSITORY, "username": "kim", "password": "pw"}])
    thread.join(10)
    assert found == ["kim:pw"]
    started = time.monotonic()
    assert kept.find(HOST, "third") is None
    assert time.monotonic() - started < 10, "nothing more is expected"


# --- fields -----------------------------------------------------------------------------------------------------------


def test_options_survive_as_fields(tmp_path: Path) -> None:
    options = RegistryOptions(
        username="kim", password="hunter2", ca_file=tmp_path / "ca", client_cert=tmp_path / "c",
        client_key=tmp_path / "k", hosts_dir=tmp_path, provider_config=tmp_path / "p", provider_bin_dir=tmp_path,
        insecure=True, hosts={HOST: HostSettings("lee", tmp_path / "password", insecure=True, ca_file=tmp_path / "x")})
    written = json.loads(json.dumps(to_fields(options)))
    assert from_fields(written) == options
    assert to_fields(RegistryOptions()) == {}
    assert from_fields({}) == RegistryOptions()
    for wrong in ({"nothing": 1}, {"hosts": []}, {"hosts": {"a": {"x": 1}}}, {"ca_file": 7}):
        with pytest.raises(LazyfsError):
            from_fields(wrong)


def test_one_hosts_settings() -> None:
    options = RegistryOptions(hosts={HOST: HostSettings(insecure=True)})
    assert options.for_host(HOST).insecure
    assert not options.for_host("other").insecure
