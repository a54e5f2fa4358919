"""Containerd's hosts.toml: what is read, what is refused and where, which directory counts."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lazyfs.errors import UsageError
from lazyfs.registry.addresses import Origin
from lazyfs.registry.hosts import OWN_MIRROR, PLAIN, find_hosts, stamp
from lazyfs.registry.hoststoml import HOST_COUNT_MAX, HostEntry, HostsFile, duration_s, parse_hosts_toml

FULL = """
server = "https://registry.example"
ca = "own.crt"

[host."http://10.0.0.1:5000"]
  capabilities = ["pull", "resolve"]
  dial_timeout = "200ms"
  [host."http://10.0.0.1:5000".header]
    X-Registry = ["a", "b"]
    Authorization = "Bearer hunter2"

[host."mirror.example/proxy"]
  ca = ["/etc/a.pem", "b.pem"]
  client = [["c.cert", "c.key"], ["d.pem", ""], "e.pem"]
  skip_verify = true

[host."https://third.example/api/images"]
  override_path = true
  client = "both.pem"
"""


def parse(text: str, directory: str = "/certs") -> HostsFile:
    return parse_hosts_toml(text, Path(directory) / "hosts.toml")


def test_all_keys() -> None:
    found = parse(FULL)
    assert found.unknown == ()
    assert found.server.origin == Origin("https", "registry.example", 443)
    assert found.server.ca_files == (Path("/certs/own.crt"),)
    first, second, third = found.mirrors
    assert first.origin == Origin("http", "10.0.0.1", 5000)
    assert first.prefix == "/v2"
    assert first.capabilities == {"pull", "resolve"}
    assert first.dial_timeout_s == pytest.approx(0.2)
    assert {name: value.reveal() for name, value in first.headers} == {
        "X-Registry": "a, b", "Authorization": "Bearer hunter2"}
    assert second.origin == Origin("https", "mirror.example", 443)
    assert second.prefix == "/proxy/v2"
    assert second.ca_files == (Path("/etc/a.pem"), Path("/certs/b.pem"))
    assert second.client_pairs == (
        (Path("/certs/c.cert"), Path("/certs/c.key")), (Path("/certs/d.pem"), None), (Path("/certs/e.pem"), None))
    assert second.skip_verify
    assert "push" in second.capabilities
    assert third.prefix == "/api/images"
    assert third.client_pairs == ((Path("/certs/both.pem"), None),)
    assert "hunter2" not in repr(found)


@pytest.mark.parametrize("text", ["", "capabilities = ['pull']", "[host]"])
def test_without_a_server_the_registry_itself_is_last(text: str) -> None:
    found = parse(text)
    assert found.mirrors == ()
    assert found.server.origin is None
    assert found.server.prefix == "/v2"


@pytest.mark.parametrize(("url", "prefix"), [
    ("https://a", "/v2"), ("https://a/", "/v2"), ("https://a/v2", "/v2"), ("https://a/v2/", "/v2"),
    ("https://a/x//y/", "/x/y/v2"), ("a:5000", "/v2"),
])
def test_paths_end_in_v2(url: str, prefix: str) -> None:
    assert parse(f'[host."{url}"]').mirrors[0].prefix == prefix
    assert parse(f'server = "{url}"').server.prefix == prefix


@pytest.mark.parametrize(("line", "text"), [
    (2, 'server = "https://a"\nserver = "https://b"\n'),
    (1, "server = 7"),
    (1, 'server = "ftp://a"'),
    (1, 'server = "https://kim:hunter2@a"'),
    (1, 'server = "https://a?token=hunter2"'),
    (2, '\nserver = "https://a/../b"'),
    (2, '\nserver = "https://a/%0d%0aHost: b"'),
    (1, "host = 5"),
    (2, '\n[host."https:// a"]'),
    (2, '\n[host."https://kim:hunter2@a"]'),
    (3, '\n[host."https://a"]\ncapabilities = ["fly"]'),
    (3, '\n[host."https://a"]\ncapabilities = 3'),
    (3, '\n[host."https://a"]\nskip_verify = "yes"'),
    (4, '\n[host."https://a"]\nca = "x"\nclient = [["a", "b", "c"]]'),
    (3, '\n[host."https://a"]\nca = [1]'),
    (3, '\n[host."https://a"]\nca = ""'),
    (3, '\n[host."https://a"]\ndial_timeout = "fast"'),
    (3, '\n[host."https://a"]\ndial_timeout = "11m"'),
    (3, '\n[host."https://a"]\ndial_timeout = 5'),
    (4, '\n[host."https://b"]\n[host."https://a".header]\nHost = "b"'),
    (3, '\n[host."https://a".header]\nX-A = "a\\r\\nHost: b"'),
    (3, '\n[host."https://a".header]\n"X A" = "a"'),
    (33, "\n".join(f'[host."https://h{number}"]' for number in range(HOST_COUNT_MAX + 1))),
])
def test_what_is_wrong_is_refused_with_its_line(line: int, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    message = str(caught.value)
    assert "/certs/hosts.toml" in message
    assert f"line {line}" in message, message
    assert "hunter2" not in message


def test_unknown_keys_are_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "reg.example").mkdir()
    (tmp_path / "reg.example" / "hosts.toml").write_text('[host."https://a"]\nnew_key = 1\n')
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert len(find_hosts(tmp_path, "reg.example").mirrors) == 1
    (record,) = caplog.records
    assert "line 2: 'new_key'" in record.getMessage()


def test_which_directory_counts(tmp_path: Path) -> None:
    def server_of(host: str) -> str:
        origin = find_hosts(tmp_path, host).server.origin
        return "" if origin is None else origin.host

    def write(name: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "hosts.toml").write_text(f'server = "https://{name.strip("_").split(":")[0]}.test"')

    assert find_hosts(tmp_path, "a:5000") is PLAIN
    assert find_hosts(None, "a:5000") is PLAIN
    write("_default")
    assert server_of("a:5000") == "default.test"
    write("a:5000")
    assert server_of("a:5000") == "a.test"
    assert server_of("a") == "default.test"
    write("a_5000_")
    assert server_of("a:5000") == "a_5000.test"
    assert find_hosts(tmp_path / "a:5000", "..") is PLAIN, "a name is no way out of the directory"


def test_dockers_layout(tmp_path: Path) -> None:
    place = tmp_path / "reg.example:5000"
    place.mkdir()
    for name in ("ca.crt", "client.cert", "client.key", "notes.txt"):
        (place / name).write_text("x")
    found = find_hosts(tmp_path, "reg.example:5000")
    assert found == HostsFile((), HostEntry(ca_files=(place / "ca.crt",),
                                            client_pairs=((place / "client.cert", place / "client.key"),)))
    (place / "client.key").unlink()
    with pytest.raises(UsageError, match=r"client\.key is missing"):
        find_hosts(tmp_path, "reg.example:5000")


def test_a_change_is_seen(tmp_path: Path) -> None:
    before = stamp(tmp_path, "a")
    place = tmp_path / "a"
    place.mkdir()
    seen = {before, stamp(tmp_path, "a")}
    (place / "hosts.toml").write_text("")
    seen.add(stamp(tmp_path, "a"))
    (place / "new").write_text("")
    (place / "new").rename(place / "hosts.toml")
    seen.add(stamp(tmp_path, "a"))
    assert len(seen) == 4
    assert stamp(tmp_path, "a") in seen


def test_a_file_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "hosts.toml"
    for content in (b"\xff\xfe", b"#" * 300_000, b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"hosts\.toml"):
            find_hosts(tmp_path, "a")


@pytest.mark.parametrize(("text", "seconds"), [
    ("200ms", 0.2), ("1m30s", 90), ("12h0m0s", 43200), ("0", 0), ("1.5s", 1.5), ("3us", 3e-6),
    ("", None), ("5", None), ("-1s", None), ("1s ", None), ("x", None), ("1e3s", None),
])
def test_durations_are_those_of_go(text: str, seconds: float | None) -> None:
    assert duration_s(text) == (None if seconds is None else pytest.approx(seconds))


def test_our_own_mirror_is_for_others(tmp_path: Path) -> None:
    """What asks through it is the mirror itself, and the worker, which has the peers without it."""
    (tmp_path / "_default").mkdir()
    (tmp_path / "_default" / "hosts.toml").write_text(
        '[host."http://127.0.0.1:5055"]\n[host."http://127.0.0.1:5055".header]\n'
        f'{OWN_MIRROR} = "{OWN_MIRROR}"\n[host."http://10.0.0.1"]\n')
    found = find_hosts(tmp_path, "registry.example")
    assert [one.origin and one.origin.host for one in found.mirrors] == ["10.0.0.1"]
