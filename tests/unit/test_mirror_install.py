"""What runtimes are told about the mirror: exact files, and everything back to the byte."""

from __future__ import annotations

import json
import tomllib
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import ConfigError, FormatError, HostError, TargetError
from lazyfs.mirror import runtimes
from lazyfs.mirror.installing import Installation, check_answers, for_docker, for_hosts_dir, for_podman
from lazyfs.registry.hosts import find_hosts
from tests.ports import free_port

if TYPE_CHECKING:
    from pathlib import Path

ADDRESS = "127.0.0.1:9453"
OLD = """# ours, by hand
server = "https://registry.example"

[host."https://corporate.example"]   # first
  capabilities = ["pull"]
"""


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below it; directories as empty."""
    return {str(one.relative_to(directory)): one.read_bytes() if one.is_file() else b""
            for one in directory.rglob("*")}


def test_hosts_toml_has_the_mirror_first_and_keeps_the_rest() -> None:
    text = runtimes.in_hosts_toml(OLD, ADDRESS, "x")
    assert text is not None
    found = tomllib.loads(text)
    assert list(found["host"]) == ["http://127.0.0.1:9453", "https://corporate.example"]
    assert found["host"]["http://127.0.0.1:9453"]["dial_timeout"] == "200ms"
    assert found["server"] == "https://registry.example"
    assert all(line in text for line in OLD.splitlines())
    assert runtimes.in_hosts_toml(text, ADDRESS, "x") is None


def test_hosts_toml_of_nothing() -> None:
    text = runtimes.in_hosts_toml("", ADDRESS, "x")
    assert text is not None
    assert list(tomllib.loads(text)["host"]) == ["http://127.0.0.1:9453"]
    assert tomllib.loads(runtimes.in_hosts_toml('server = "https://a"', ADDRESS, "x") or "")["server"] == "https://a"


@pytest.mark.parametrize("text", ["[host", 'host = {"https://a" = {}}', "host = 5"])
def test_hosts_toml_that_cannot_be_added_to(text: str) -> None:
    with pytest.raises(ConfigError):
        runtimes.in_hosts_toml(text, ADDRESS, "x")


def test_the_directory_is_that_of_containerd() -> None:
    assert runtimes.hosts_directory("a.example:5000") == "a.example_5000_"
    assert runtimes.hosts_directory("a.example") == "a.example"
    assert runtimes.hosts_directory("") == "_default"


def test_everything_and_back(tmp_path: Path) -> None:
    certs, docker, containers = tmp_path / "certs.d", tmp_path / "docker", tmp_path / "containers"
    (certs / "registry.example").mkdir(parents=True)
    (certs / "registry.example" / "hosts.toml").write_text(OLD)
    (certs / "private.example").mkdir()
    (certs / "private.example" / "ca.crt").write_text("x")
    docker.mkdir()
    (docker / "daemon.json").write_text('{"debug": true,\n\n "registry-mirrors": ["https://m"]}')
    before = tree(tmp_path)
    record = Installation(tmp_path / "record" / "install.json")
    passed = for_hosts_dir(record, certs, [], ADDRESS)
    assert passed == [f"{certs / 'private.example'}: has certificates, but no hosts.toml"]
    for_docker(record, docker / "daemon.json", docker / "certs.d", ["a.example:5000"], ADDRESS)
    for_podman(record, containers, ["a.example:5000"], ADDRESS)
    assert json.loads((docker / "daemon.json").read_text()) == {
        "debug": True, "registry-mirrors": [f"http://{ADDRESS}", "https://m"]}
    drop_in = tomllib.loads((containers / "registries.conf.d/50-lazyfs-mirror.conf").read_text())
    assert drop_in["registry"] == [{"prefix": "a.example:5000", "location": "a.example:5000", "mirror": [
        {"location": f"{ADDRESS}/a.example__5000", "insecure": True}]}]
    assert (docker / "certs.d/a.example_5000_/hosts.toml").exists()
    assert find_hosts(certs, "registry.example").mirrors[0].origin is not None   # the corporate one; never our own
    assert len(find_hosts(certs, "registry.example").mirrors) == 1
    assert find_hosts(certs, "other.example").mirrors == ()
    installed = tree(tmp_path)
    again = Installation(tmp_path / "record" / "install.json")
    for_hosts_dir(again, certs, [], ADDRESS)
    for_podman(again, containers, ["a.example:5000"], ADDRESS)
    assert tree(tmp_path) == installed
    assert again.take_back() == []
    left = tree(tmp_path)
    left.pop("record")
    assert left == before


def test_what_somebody_changed_since_stays(tmp_path: Path) -> None:
    record = Installation(tmp_path / "install.json")
    for_hosts_dir(record, tmp_path / "certs.d", [], ADDRESS)
    file = tmp_path / "certs.d/_default/hosts.toml"
    file.write_text(file.read_text() + "# mine\n")
    assert Installation(tmp_path / "install.json").take_back() == [str(file)]
    assert "# mine" in file.read_text()


def test_podman_where_another_file_speaks_of_the_registry(tmp_path: Path) -> None:
    (tmp_path / "registries.conf").write_text('[[registry]]\nlocation = "docker.io"\n')
    record = Installation(tmp_path / "install.json")
    with pytest.raises(TargetError, match=r"registries\.conf has a \[\[registry\]\] for docker\.io"):
        for_podman(record, tmp_path, [], ADDRESS)
    assert record.files == []


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "daemon.json").write_text("[")
    record = Installation(tmp_path / "install.json")
    with pytest.raises(ConfigError, match="JSON"):
        for_docker(record, tmp_path / "daemon.json", tmp_path / "certs.d", [], ADDRESS)
    assert record.files == []
    (tmp_path / "damaged.json").write_text('{"files": 5}')
    with pytest.raises(FormatError, match="malformed record"):
        Installation(tmp_path / "damaged.json")


def test_nothing_is_installed_for_a_mirror_that_does_not_answer() -> None:
    with pytest.raises(HostError, match="no mirror answers"):
        check_answers(f"127.0.0.1:{free_port()}")
