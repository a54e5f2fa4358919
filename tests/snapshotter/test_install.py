"""`lazyfs snapshotter install`: what is written for which containerd; that it believes it; that all can be undone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tomlkit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyfs.errors import ConfigError, LazyfsError, UnsupportedError
from snapshotter.install import apply, edit, units
from snapshotter.install.settings import CRI_2, CRI_3, TRANSFER, Setting, choose_file_version, settings_for
from snapshotter.install.version import Version, parse_version
from tests.containerdkit import VERSIONS, require_containerd
from tests.mountkit import LAZYFS

if TYPE_CHECKING:
    from tests.containerdkit import Programs

ROOT = Path(__file__).resolve().parents[2]
DEBIAN = """\
version = 2

[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    # comment: networks
    [plugins."io.containerd.grpc.v1.cri".cni]
      bin_dir = "/usr/lib/cni"   # Debian's place
      conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.internal.v1.opt"]
    path = "/var/lib/containerd"
"""
VERSION_3 = """\
version = 3
# ours
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"   # as before
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = 'registry.example/pause:3.10'
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux/amd64"
  snapshotter = "native"
"""


@pytest.mark.parametrize(("text", "version"), [
    ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3", (1, 6, 20)),
    ("containerd containerd.io v1.7.27 05044ec0a9a75232cad458027ca83437aae3f4da", (1, 7, 27)),
    ("containerd github.com/containerd/containerd/v2 2.2.6+unknown", (2, 2, 6)),
    ("containerd github.com/containerd/containerd/v2 v2.1.0-rc.1 abc", (2, 1, 0)),
    ("v2.0.5", (2, 0, 5)),
])
def test_versions_are_read(text: str, version: tuple[int, int, int]) -> None:
    assert parse_version(text) == version


@pytest.mark.parametrize("text", ["", "containerd", "docker 1.5.2", "containerd 1.5.9", "x" * 5000])
def test_what_is_no_version_or_too_old_is_refused(text: str) -> None:
    with pytest.raises(UnsupportedError):
        parse_version(text)


@pytest.mark.parametrize(("version", "document", "chosen"), [
    ((1, 6, 20), {}, 2), ((2, 0, 0), {}, 3), ((2, 2, 6), {"version": 2}, 2), ((2, 2, 6), {"version": 3}, 3),
    ((1, 7, 0), {"version": 2}, 2), ((1, 7, 0), {"version": 3}, None), ((2, 0, 0), {"root": "/x"}, None),
    ((1, 6, 0), {"version": 1}, None), ((1, 6, 0), {"version": True}, None), ((2, 0, 0), {"version": 4}, None),
])
def test_the_files_version_is_kept_or_refused(
    version: tuple[int, int, int], document: dict[str, Any], chosen: int | None
) -> None:
    if chosen is None:
        with pytest.raises(UnsupportedError):
            choose_file_version(Version(*version), document)
    else:
        assert choose_file_version(Version(*version), document) == chosen


def wanted(version: tuple[int, int, int], file_version: int, *, cri: bool = True) -> list[Setting]:
    return settings_for(Version(*version), file_version, address="/run/l.sock", root="/var/lib/l", cri=cri)


def test_each_version_gets_what_it_knows() -> None:
    def written(version: tuple[int, int, int], file_version: int) -> dict[str, Any]:
        return tomllib.loads(edit.as_fragment(file_version, wanted(version, file_version)))

    old = written((1, 6, 20), 2)
    assert old["proxy_plugins"]["lazyfs"] == {"type": "snapshot", "address": "/run/l.sock"}
    assert old["plugins"][CRI_2]["containerd"] == {"snapshotter": "lazyfs", "disable_snapshot_annotations": False}
    assert written((1, 6, 32), 2)["proxy_plugins"]["lazyfs"]["exports"] == {"root": "/var/lib/l"}
    middle = written((2, 0, 4), 3)
    assert middle["plugins"][CRI_3] == {"snapshotter": "lazyfs", "disable_snapshot_annotations": False}
    assert TRANSFER not in middle["plugins"]
    migrated = written((2, 2, 6), 2)["plugins"]
    assert migrated[CRI_2]["containerd"]["snapshotter"] == migrated[CRI_3]["snapshotter"] == "lazyfs"
    new = written((2, 2, 6), 3)
    assert new["plugins"][CRI_3] == {"snapshotter": "lazyfs"}
    assert [one["snapshotter"] for one in new["plugins"][TRANSFER]["unpack_config"]] == ["lazyfs", "overlayfs"]
    assert new["proxy_plugins"]["lazyfs"]["exports"]["enable_remote_snapshot_annotations"] == "true"


def test_comments_order_and_other_keys_stay() -> None:
    text, changes = edit.set_values(DEBIAN, 2, wanted((1, 6, 20), 2), "x")
    assert {line for line in DEBIAN.splitlines() if line.strip()} <= set(text.splitlines())
    assert edit.set_values(text, 2, wanted((1, 6, 20), 2), "x") == (text, [])
    back, left = edit.take_back(text, changes, "x")
    assert tomllib.loads(back) == tomllib.loads(DEBIAN)
    assert "# Debian's place" in back
    assert not left


def test_a_list_that_somebody_chose_is_added_to() -> None:
    text, changes = edit.set_values(VERSION_3, 3, wanted((2, 2, 6), 3), "x")
    found = tomllib.loads(text)
    assert [one["snapshotter"] for one in found["plugins"][TRANSFER]["unpack_config"]] == ["native", "lazyfs"]
    assert found["plugins"][CRI_3]["snapshotter"] == "lazyfs"
    assert "pause:3.10" in text
    assert tomllib.loads(edit.take_back(text, changes, "x")[0]) == tomllib.loads(VERSION_3)


def test_what_somebody_else_changed_since_stays() -> None:
    text, changes = edit.set_values(DEBIAN, 2, wanted((1, 6, 20), 2), "x")
    text = text.replace('snapshotter = "lazyfs"', 'snapshotter = "native"') + "\n[debug]\nlevel = 'debug'\n"
    back, left = edit.take_back(text, changes, "x")
    assert left == [f"plugins.{CRI_2}.containerd.snapshotter"]
    found = tomllib.loads(back)
    assert found["plugins"][CRI_2]["containerd"] == {"snapshotter": "native"}
    assert found["debug"] == {"level": "debug"}
    assert "proxy_plugins" not in found


@pytest.mark.parametrize("text", [
    "version = 2\nplugins = 3\n", "version = 2\n[plugins]\n'io.containerd.grpc.v1.cri' = 1",
    "version = 2\nproxy_plugins = []\n", "version = \n", "[a", "a = 1\na = 2",
])
def test_what_cannot_be_changed_is_refused(text: str) -> None:
    with pytest.raises((ConfigError, UnsupportedError)):
        edit.set_values(text, 2, wanted((1, 6, 20), 2), "config.toml")


NAMES = st.sampled_from(["plugins", "proxy_plugins", "lazyfs", CRI_2, "containerd", "snapshotter", "root", "x y"])
SCALARS = st.one_of(st.integers(0, 99), st.booleans(), st.sampled_from(["", "a", "lazyfs", 'q"\\']), st.just([1, 2]))
TREES = st.recursive(SCALARS, lambda inner: st.dictionaries(NAMES, inner, max_size=4), max_leaves=20)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(NAMES, TREES, max_size=5), st.booleans())
def test_any_file_is_changed_as_meant_and_back_or_refused(tree: dict[str, Any], inline: bool) -> None:
    document = {"version": 2, **tree}
    text = tomlkit.dumps(document) if not inline else "".join(
        f"{json.dumps(key)} = {tomlkit.item(value, _sort_keys=True).as_string()}\n"
        for key, value in document.items() if not isinstance(value, dict)) + tomlkit.dumps(
        {key: value for key, value in document.items() if isinstance(value, dict)})
    before = tomllib.loads(text)
    try:
        changed, changes = edit.set_values(text, 2, wanted((1, 7, 27), 2), "x")
    except LazyfsError:
        return
    found = tomllib.loads(changed)
    assert found["proxy_plugins"]["lazyfs"]["address"] == "/run/l.sock"
    assert found["plugins"][CRI_2]["containerd"]["snapshotter"] == "lazyfs"
    back, left = edit.take_back(changed, changes, "x")
    assert not left
    assert without_empty(tomllib.loads(back)) == without_empty(before)


def without_empty(value: Any) -> Any:
    """A table that nothing is in means nothing."""
    if not isinstance(value, dict):
        return value
    found = {key: without_empty(inner) for key, inner in value.items()}
    return {key: inner for key, inner in found.items() if inner != {}}


# --- the command, with real containerds ------------------------------------------------------------------------------


class Installed:
    """A machine's /etc in a directory of the test's own."""

    def __init__(self, directory: Path, programs: Programs) -> None:
        self.file = directory / "etc" / "config.toml"
        self.file.parent.mkdir()
        self.systemd = directory / "systemd"
        self.programs = programs
        self.words = ["--state", str(directory / "state" / "install.json")]

    def run(self, command: str, *words: str, code: int = 0) -> str:
        own = ["--config", str(self.file), "--containerd", str(self.programs.containerd), "--systemd-dir",
               str(self.systemd)] if command == "install" else []
        done = subprocess.run([*LAZYFS, "snapshotter", command, *own, *self.words, *words], capture_output=True,
                              text=True, check=False, timeout=60)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def dump(self) -> dict[str, Any]:
        """What containerd itself understands."""
        done = subprocess.run([self.programs.containerd, "--config", self.file, "config", "dump"], capture_output=True,
                              text=True, check=True, timeout=60)
        return tomllib.loads(done.stdout)


@pytest.fixture(params=VERSIONS)
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Installed:
    return Installed(tmp_path, require_containerd(request.param))


@pytest.mark.parametrize("text", [None, DEBIAN, VERSION_3])
def test_containerd_believes_it_and_all_can_be_undone(machine: Installed, text: str | None) -> None:
    if text is not None:
        machine.file.write_text(text)
        machine.file.chmod(0o640)
    if text == VERSION_3 and not machine.programs.is_2:
        assert "expected 2 for containerd 1.6" in machine.run("install", code=11)
        assert machine.file.read_text() == text
        return
    said = machine.run("install")
    assert "new values" in said
    found = machine.dump()
    assert found["proxy_plugins"]["lazyfs"]["address"] == "/run/lazyfs/snapshotter.sock"
    if machine.programs.is_2:
        images = found["plugins"][CRI_3]
        unpacked = [one["snapshotter"] for one in found["plugins"][TRANSFER]["unpack_config"]]
        assert "lazyfs" in unpacked
        assert found["proxy_plugins"]["lazyfs"]["exports"]["root"] == "/var/lib/lazyfs/snapshotter"
    else:
        images = found["plugins"][CRI_2]["containerd"]
        assert images["disable_snapshot_annotations"] is False
    assert images["snapshotter"] == "lazyfs"
    once = machine.file.read_bytes()
    assert "has all it needs" in machine.run("install")
    assert machine.file.read_bytes() == once
    backups = list(machine.file.parent.glob("*.bak"))
    if text is not None:
        assert machine.file.stat().st_mode & 0o777 == 0o640
        assert [one.read_text() for one in backups] == [text]
        assert re.fullmatch(r"config\.toml\.lazyfs-\d{8}T\d{6}Z\.bak", backups[0].name)
    assert "as it was" in machine.run("uninstall")
    assert (machine.file.read_text() if machine.file.exists() else None) == text
    assert not list(machine.systemd.rglob("*.*ce"))
    assert "nothing is installed" in machine.run("uninstall")


def test_undoing_an_edited_file_leaves_the_edits(machine: Installed) -> None:
    machine.file.write_text(DEBIAN)
    machine.run("install")
    machine.file.write_text(machine.file.read_text() + "\n[debug]\n  level = 'warn'   # mine\n")
    machine.run("uninstall")
    text = machine.file.read_text()
    assert "lazyfs" not in text
    assert "# mine" in text
    assert tomllib.loads(text) == {**tomllib.loads(DEBIAN), "debug": {"level": "warn"}}


def test_restart_is_asked_for(machine: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A systemctl that writes down what it is told: no systemd runs here."""
    said = tmp_path / "said"
    program = tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >>{said}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    machine.run("install")
    assert not said.exists()
    machine.run("install", "--restart")
    machine.run("uninstall", "--restart")
    units_words = "lazyfs.service lazyfs-snapshotter.service"
    assert said.read_text().splitlines() == [
        "daemon-reload", f"enable --now {units_words}", "restart containerd.service",
        "disable --now lazyfs-snapshotter.service lazyfs.service", "daemon-reload", "restart containerd.service"]
    program.write_text("#!/bin/sh\necho no such unit >&2; exit 5\n")
    said_then = machine.run("install", "--restart", code=40)
    assert "systemctl daemon-reload failed: no such unit" in said_then
    assert "hint: " in said_then


def test_a_unit_of_others_stops_it_before_anything_is_written(machine: Installed) -> None:
    machine.systemd.mkdir()
    (machine.systemd / "lazyfs.service").write_text("[Unit]\n")
    assert "not written by lazyfs" in machine.run("install", code=41)
    assert not machine.file.exists()
    assert "nothing is installed" in machine.run("uninstall")


def test_what_is_left_to_do_names_no_units_where_there_are_none(machine: Installed) -> None:
    assert "next: start lazyfs daemon" in machine.run("install", "--no-units")
    assert "next: restart containerd" in machine.run("uninstall")


def test_what_containerd_refuses_is_not_put_in_place(machine: Installed) -> None:
    text = "version = 2\nroot = 5\n"
    machine.file.write_text(text)
    assert "refuses the new configuration" in machine.run("install", code=3)
    assert machine.file.read_text() == text
    assert "nothing is installed" in machine.run("uninstall")


def test_print_and_no_cri_write_nothing_more_than_asked(machine: Installed) -> None:
    found = tomllib.loads(machine.run("install", "--print", "--no-cri"))
    assert "lazyfs" in found["proxy_plugins"]
    assert not any("cri" in name for name in found.get("plugins", {}))
    assert not machine.file.exists()
    assert not machine.systemd.exists()


def test_a_kill_between_record_and_file_can_be_undone(tmp_path: Path) -> None:
    file, state = tmp_path / "config.toml", tmp_path / "install.json"
    file.write_text(DEBIAN)
    text, changes = edit.set_values(DEBIAN, 2, wanted((1, 6, 20), 2), "x")
    record = apply.put_in_place(file, text, changes, state, None)
    file.write_text(DEBIAN)   # as if the record had been written, and the file not
    assert apply.restore(record, state) == []
    assert tomllib.loads(file.read_text()) == tomllib.loads(DEBIAN)


# --- systemd ----------------------------------------------------------------------------------------------------------


def test_packagers_get_the_same_units() -> None:
    for name, text in units.texts().items():
        assert (ROOT / "packaging/systemd" / name).read_text() == text, f"packaging/systemd/{name} is not current"


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    program = Path("/usr/bin/systemd-analyze")
    if not program.exists():
        pytest.skip("systemd-analyze is not installed (package systemd)")
    executable = tmp_path / "lazyfs"
    executable.write_text("#!/bin/sh\n")
    executable.chmod(0o755)
    written = [path for path in units.write_units(tmp_path, str(executable)) if path.endswith(".service")]
    done = subprocess.run([program, "verify", "--man=no", *written], capture_output=True, text=True, check=False,
                          timeout=60, env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"})
    ours = [line for line in done.stderr.splitlines() if "lazyfs" in line]
    assert not ours, ours
    assert done.returncode == 0, done.stderr


def test_units_let_containers_live() -> None:
    for name in ("lazyfs.service", "lazyfs-snapshotter.service"):
        lines = units.texts()[name].splitlines()
        wanted = {"KillMode=process", "Delegate=yes", "Type=notify", "NotifyAccess=main", "PrivateMounts=no"}
        assert wanted <= set(lines)
        assert not any(line.startswith(("ProtectHome=", "ReadOnlyPaths=", "RuntimeDirectory=")) for line in lines)
    assert "FileDescriptorStoreMax=16" in units.texts()["lazyfs.service"]


def test_units_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "lazyfs.service").write_text("[Unit]\n")
    with pytest.raises(LazyfsError, match="not written by lazyfs"):
        units.write_units(tmp_path, "/usr/bin/lazyfs")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["lazyfs.service"]
    (tmp_path / "lazyfs.service").unlink()
    paths = units.write_units(tmp_path, "/usr/bin/lazyfs")
    (tmp_path / "lazyfs-snapshotter.service").write_text("[Unit]\n")
    (tmp_path / "multi-user.target.wants").mkdir()
    (tmp_path / "multi-user.target.wants" / "lazyfs.service").symlink_to(tmp_path / "lazyfs.service")
    units.remove_units(paths)
    (tmp_path / "multi-user.target.wants").rmdir()   # nothing in it
    assert [path.name for path in tmp_path.rglob("*")] == ["lazyfs-snapshotter.service"]
