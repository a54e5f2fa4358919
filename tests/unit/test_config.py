"""The configuration: what is accepted, what is refused in which words, what overrides what."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lazyfs import config
from lazyfs.config import Amount, document, loading
from lazyfs.config.kinds import (
    AbsolutePath,
    Address,
    Choice,
    Flag,
    Kind,
    List,
    Name,
    Number,
    Place,
    Size,
    Url,
)
from lazyfs.errors import ConfigError


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return str(path)


def problems(tmp_path: Path, text: str, environ: dict[str, str] | None = None) -> list[str]:
    _, found = config.check(write(tmp_path, text), environ or {})
    return [f"{one} [{one.hint}]" for one in found]


def test_nothing_configured_means_the_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "DEFAULT_FILE", str(tmp_path / "missing.toml"))
    found = config.load(None, {})
    assert found == config.Config()
    assert found.daemon.cache_dir == "/var/lib/lazyfs/cache"
    assert found.cache.free_floor_bytes.of(1000) == 50
    assert not found.origins
    assert found.file == ""


def test_every_default_is_of_its_own_kind() -> None:
    for key in config.all_keys():
        given = str(key.default) if isinstance(key.default, Amount) else key.default
        assert key.kind.accept(given) == key.default, key.path


def test_file_then_environment(tmp_path: Path) -> None:
    path = write(tmp_path, """
        [daemon]
        cache_dir = "/srv/cache"
        hang_s = 30
        [cache]
        quota_bytes = "20GiB"
        free_floor_bytes = "2.5 %"
        [registry.host."registry.example:5000"]
        username = "u"
        password_file = "/etc/lazyfs/password"
    """)
    found = config.load(path, {"LAZYFS_DAEMON_HANG_S": "40", "LAZYFS_DAEMON_PREFETCH": "off",
                               "LAZYFS_CACHE_FREE_FLOOR_BYTES": "1GB", "LAZYFS_PASSWORD": "not ours",
                               "LAZYFS_RUN_DIR": "/run/other"})
    assert (found.daemon.cache_dir, found.daemon.hang_s, found.daemon.prefetch) == ("/srv/cache", 40.0, False)
    assert found.daemon.run_dir == "/run/other"
    assert found.cache.quota_bytes == 20 * 2**30
    assert found.cache.free_floor_bytes == Amount(bytes=10**9)
    assert found.registry.host["registry.example:5000"].username == "u"
    assert found.origins["daemon.cache_dir"] == path
    assert found.origins["daemon.hang_s"] == "LAZYFS_DAEMON_HANG_S"
    assert found.origins["daemon.run_dir"] == "LAZYFS_RUN_DIR"
    assert "daemon.driver" not in found.origins


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    path = write(tmp_path, '[log]\nlevel = "debug"\n')
    assert config.load(None, {"LAZYFS_CONFIG": path}).log.level == "debug"
    with pytest.raises(ConfigError, match="no such file"):
        config.load(None, {"LAZYFS_CONFIG": path + ".gone"})


@pytest.mark.parametrize(("text", "message"), [
    ('[daemon]\ncache_dri = "/x"', r"config.toml: unknown key 'daemon.cache_dri' \[did you mean daemon.cache_dir\?\]"),
    ("[registry]\ninsecure = true", r"unknown key 'registry.insecure' \[insecure is of one registry: \[registry.host"),
    ("[demon]\n", r"unknown section 'demon' \[did you mean daemon\?\]"),
    ("daemon = 3", r"daemon: expected a table, found 3"),
    ("[daemon]\ncache_dir = 3", r"daemon.cache_dir: expected an absolute path, found 3"),
    ('[daemon]\ncache_dir = "relative"', r"expected an absolute path, found 'relative'"),
    ('[daemon]\ndriver = "loop"', r"daemon.driver: expected one of auto, erofs, fuse, found 'loop'"),
    ("[daemon]\nprefetch = 1", r"daemon.prefetch: expected true or false, found 1"),
    ("[daemon]\nhang_s = true", r"daemon.hang_s: expected a number from 2 to 3600, found True"),
    ("[daemon]\nhang_s = nan", r"found nan"),
    ("[daemon]\nabort_s = 40", r"daemon.abort_s: expected more than .* together \(40\), found 40"),
    ("[daemon]\nread_policy = 'never'", r"daemon.read_policy: expected one of error, wait"),
    ("[daemon]\nheartbeat_s = 15", r"daemon.hang_s: expected at least twice daemon.heartbeat_s \(15\), found 10"),
    ('[daemon]\nhealth_address = "x:99999"', r"health_address: expected \"host:port\""),
    ('[cache]\nquota_bytes = "5%"', r"cache.quota_bytes: expected bytes, or a size like \"20GiB\", found '5%'"),
    ("[cache]\nquota_bytes = -1", r"found -1"),
    ("[snapshotter]\nthreads = 2.5", r"threads: expected a whole number from 1 to \d+, found 2.5"),
    ('[snapshotter]\nroot = "/var/lib/lazyfs/cache/s"', r"two directories beside each other"),
    ('[registry.host."a b"]', r"expected host or host:port"),
    ('[registry.host."h"]\nusername = "u"', r"username: expected password_file beside it, found none"),
    ('[registry.host."h"]\npassword = "hunter2"', r"unknown key .*password_file"),
    ("[registry]\nhost = 3", r"registry.host: expected tables by host name, found 3"),
    ("[daemon", r"is not TOML: .*declaration"),
])
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (found,) = problems(tmp_path, text)
    assert re.search(message, found), found
    assert "\n" not in found
    assert "hunter2" not in found


def test_all_problems_are_found_at_once_and_counted(tmp_path: Path) -> None:
    text = '[daemon]\na = 1\nhang_s = "x"\n[log]\nlevel = "loud"\n'
    assert len(problems(tmp_path, text, {"LAZYFS_LOG_FORMATS": "x", "LAZYFS_SNAPSHOTTER_THREADS": "many"})) == 5
    with pytest.raises(ConfigError, match=r"\(and 2 more: lazyfs config check\)"):
        config.load(write(tmp_path, text), {})


def test_a_variable_that_is_unknown_is_refused_with_the_nearest() -> None:
    _, (found,) = config.check(None, {"LAZYFS_DAEMON_HANGS": "3", "LAZYFS_CONFIG": ""})
    assert "LAZYFS_DAEMON_HANGS" in str(found)
    assert "LAZYFS_DAEMON_HANG_S" in found.hint


def test_variables_that_kubelet_makes_for_services_are_none_of_ours() -> None:
    names = ["LAZYFS_DAEMON_SERVICE_HOST", "LAZYFS_DAEMON_SERVICE_PORT", "LAZYFS_DAEMON_SERVICE_PORT_HTTP",
             "LAZYFS_CACHE_PORT", "LAZYFS_CACHE_PORT_9440_TCP", "LAZYFS_CACHE_PORT_9440_TCP_ADDR",
             "LAZYFS_REGISTRY_PORT_5000_UDP_PROTO"]
    assert config.check(None, dict.fromkeys(names, "10.0.0.1"))[1] == []


def test_an_oversized_or_binary_file_is_refused(tmp_path: Path) -> None:
    assert "at most" in problems(tmp_path, "#" * (1 << 20) + "\n")[0]
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe")
    _, (found,) = config.check(str(tmp_path / "config.toml"), {})
    assert "is not TOML" in str(found)


KINDS = [Kind(), AbsolutePath(), AbsolutePath(optional=True), Choice(("a", "b")), Flag(), Number(0, 9),
         Number(1, 9, whole=True), Size(), Size(share=True), Address(), Url(), Url(required=True), Place(),
         Place(optional=True), Name(), List(Place(), "places", 3)]
VALUES = st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.lists(st.integers()),
                   st.dictionaries(st.text(), st.integers()), st.from_regex(r"[0-9.]{1,9} ?[kKMGT%]?i?B?"),
                   st.from_regex(r"[\[\]:0-9a-f]{0,12}:[0-9]{0,6}"))


@example(Size(), "0IB")      # once a KeyError
@given(st.sampled_from(KINDS), VALUES)
def test_kinds_raise_value_error_and_nothing_else(kind: Kind, value: object) -> None:
    for attempt in (kind.accept, kind.from_text):
        if attempt == kind.from_text and not isinstance(value, str):
            continue
        try:
            accepted = attempt(value)  # type: ignore[operator]
        except ValueError:
            continue
        again = kind.accept(str(accepted) if isinstance(accepted, Amount) else accepted)
        assert str(again) == str(accepted)


def test_the_module_is_light() -> None:
    script = ("import sys; from lazyfs import config; config.load(None, {}); "
              "bad = {'numpy', 'msgspec', 'tomllib', 'difflib', 'ipaddress', 'trio', 'urllib3'} & set(sys.modules); "
              "assert not bad, bad")
    if Path(config.DEFAULT_FILE).exists():
        pytest.skip("this machine has a configuration file: tomllib is needed")
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_document_lists_every_key() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/configuration.md").read_text()
    assert document.renew(text) == text, "run: python -m lazyfs.config.document docs/configuration.md"
    for key in config.all_keys():
        assert f"| `{key.name}` |" in text


def test_what_is_shown_can_be_read_again(tmp_path: Path) -> None:
    path = write(tmp_path, """
        [cache]
        free_floor_bytes = "7%"
        quota_bytes = "1GiB"
        [daemon]
        hang_s = 4.5
        [registry.host."[::1]:5000"]
        insecure = true
    """)
    first = config.load(path, {})
    again = config.load(write(tmp_path, document.effective(first)), {})
    assert again.registry == first.registry
    assert all(again.value(key) == first.value(key) for key in config.all_keys())


def test_the_sample_is_the_defaults_with_or_without_its_comment_signs(tmp_path: Path) -> None:
    sample = document.sample()
    assert config.load(write(tmp_path, sample), {}).registry == config.Registry()
    uncommented = re.sub(r"^# (\w+ = )", r"\1", sample, flags=re.MULTILINE)
    found = config.load(write(tmp_path, uncommented.partition("# [registry.host")[0]), {})
    assert len(found.origins) == len(config.all_keys())
    assert all(found.value(key) == key.default for key in config.all_keys())


def run(*words: str, code: int, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LAZYFS_")}
    done = subprocess.run([sys.executable, "-m", "lazyfs", "config", *words], env={**clean, **environ},
                          capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


def test_the_command_checks_and_shows(tmp_path: Path) -> None:
    bad = write(tmp_path, "[daemon]\nhang = 3\nprefetch = 7\n")
    lines = run("check", bad, code=3).stderr.splitlines()
    assert len(lines) == 2
    assert "did you mean daemon.hang_s?" in lines[0]
    assert "(and 1 more" in run("show", bad, code=3).stderr
    good = write(tmp_path, "[daemon]\nhang_s = 33\n")
    assert "no problem, 1 keys" in run("check", good, code=0).stdout
    assert f"hang_s = 33   # {good}" in run("show", good, code=0).stdout
    shown = json.loads(run("show", good, "--json", code=0, LAZYFS_LOG_LEVEL="error").stdout)
    assert shown["keys"]["daemon.hang_s"] == {"value": 33.0, "default": 10.0, "origin": good, "unit": "s"}
    assert shown["keys"]["log.level"]["origin"] == "LAZYFS_LOG_LEVEL"
    assert "[snapshotter]" in run("show", "--defaults", code=0).stdout


def test_it_travels_to_other_processes_and_versions(tmp_path: Path) -> None:
    first = config.load(write(tmp_path, """
        [cache]
        free_floor_bytes = 12345
        [daemon]
        hang_s = 4.5
        [registry.host."h:1"]
        insecure = true
    """), {})
    plain = json.loads(json.dumps(config.to_plain(first)))
    assert config.from_plain(plain) == dataclasses.replace(first, file="", origins={})
    plain["daemon"] |= {"of_a_later_version": 1, "hang_s": "of another type"}
    plain["later"] = {"a": 1}
    assert config.from_plain(plain).daemon == config.Daemon()
    assert config.from_plain({"daemon": 3}) == config.Config()
