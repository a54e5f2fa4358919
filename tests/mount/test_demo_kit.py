"""The kit of the demo and the benchmarks: layers out of overlays, the shaped link, and that nothing stays behind."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from benchmarks import figures
from benchmarks.imagekit import apt
from benchmarks.imagekit.layer import write_layer
from benchmarks.imagekit.layout import LayoutWriter, recompress
from benchmarks.kit import workspace as workspace_module
from benchmarks.kit.link import make_link
from benchmarks.kit.proc import Daemon, ToolError, attempt, run
from benchmarks.kit.registry import start_registry
from benchmarks.kit.workspace import BASE, Workspace, sweep, workspace

ROOT = Path(__file__).resolve().parents[2]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes mounts and network namespaces: needs root")


def _tool_missing(*names: str) -> str:
    return ", ".join(name for name in names if shutil.which(name) is None)


# --- layers ---------------------------------------------------------------------------------------------------------


def _snapshot(top: Path) -> dict[bytes, tuple]:
    """Everything that a layer is to carry, by name."""
    found, groups = {}, {}
    base = os.fsencode(top)
    for folder, folders, files in os.walk(base):
        for name in folders + files:
            path = folder + b"/" + name
            relative, status = os.path.relpath(path, base), os.lstat(path)
            content: object = None
            if stat.S_ISREG(status.st_mode):
                content = Path(os.fsdecode(path)).read_bytes()
                groups.setdefault((status.st_dev, status.st_ino), []).append(relative)
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)   # noqa: PTH115 - bytes
            elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
                content = status.st_rdev
            xattrs = {
                key: os.getxattr(path, key, follow_symlinks=False)
                for key in os.listxattr(path, follow_symlinks=False)
                if not key.startswith("trusted.overlay.") and key != "user.rootlesscontainers"
            }
            found[relative] = (status.st_mode, status.st_uid, status.st_gid, int(status.st_mtime), content, xattrs)
    links = sorted(sorted(group) for group in groups.values() if len(group) > 1)
    found[b"/links"] = (links,)
    return found


def _fill_lower(lower: Path) -> None:
    for name in ("gone/deep/file", "emptied/old", "kept/file", "replaced/inner"):
        path = lower / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (lower / "file-to-dir").write_text("x")
    (lower / "removed").write_text("x")
    os.link(lower / "kept/file", lower / "kept/link")
    os.mknod(lower / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.mkfifo(lower / "fifo")


def _change(merged: Path) -> None:
    shutil.rmtree(merged / "gone")
    (merged / "removed").unlink()
    shutil.rmtree(merged / "emptied")
    (merged / "emptied").mkdir()
    (merged / "emptied" / "new").write_text("new")
    shutil.rmtree(merged / "replaced")
    (merged / "replaced").symlink_to("kept/file")
    (merged / "file-to-dir").unlink()
    (merged / "file-to-dir").mkdir(mode=0o2755)
    Path(os.fsdecode(os.fsencode(merged) + b"/odd-\xff\xfe")).write_text("odd")
    (merged / ("n" * 200)).write_text("long")
    (merged / "with-xattr").write_text("x")
    os.setxattr(merged / "with-xattr", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    os.setxattr(merged / "with-xattr", "user.name", b"\xff\x00value")
    os.chown(merged / "with-xattr", 70000, 80000)
    (merged / "with-xattr").chmod(0o4755)
    os.link(merged / "with-xattr", merged / "with-xattr-link")
    os.utime(merged / "with-xattr", (1, 1_000_000_007))


@pytest.mark.mount
@needs_root
@pytest.mark.skipif(bool(_tool_missing("umoci")), reason="umoci is the second opinion")
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_layers_of_an_overlay_unpack_to_the_same_tree(compression):
    with workspace() as place:
        top = place.folder("overlay")
        lower, upper, work, merged = (top / name for name in ("lower", "upper", "work", "merged"))
        for path in (lower, upper, work, merged):
            path.mkdir()
        _fill_lower(lower)
        options = f"lowerdir={lower},upperdir={upper},workdir={work},redirect_dir=off,metacopy=off"
        run(["mount", "-t", "overlay", "overlay", "-o", options, merged], timeout_s=20)
        _change(merged)
        expected = _snapshot(merged)

        layout = place.top / "layout"
        writer = LayoutWriter(layout)
        layers = [
            writer.add_layer("base", lambda sink: write_layer(lower, sink)),
            writer.add_layer("change", lambda sink: write_layer(upper, sink)),
        ]
        writer.finish(layers, tag="latest", command=["true"], env=[])
        if compression == "zstd":
            target = place.top / "zstd"
            recompress(layout, target, "zstd", "latest")
            blobs = [path.read_bytes()[:4] for path in (target / "blobs/sha256").iterdir()]
            assert blobs.count(b"\x28\xb5\x2f\xfd") == 2
            back = place.top / "layout-again"
            recompress_back(target, back)
            assert {path.name for path in back.iterdir()} == {"0", "1"}
            assert [_gunzip(layout, layer.digest) for layer in layers] == [(back / n).read_bytes() for n in "01"]
            return
        run(["umoci", "unpack", "--image", f"{layout}:latest", place.top / "bundle"], timeout_s=60)
        assert _snapshot(place.top / "bundle" / "rootfs") == expected
        assert layers[1].entry_count == len(list(_names(upper))) + 2   # two directories are opaque


def recompress_back(layout: Path, target: Path) -> None:
    target.mkdir()
    index = json.loads((layout / "index.json").read_bytes())
    manifest = json.loads((layout / "blobs" / index["manifests"][0]["digest"].replace(":", "/")).read_bytes())
    for number, layer in enumerate(manifest["layers"]):
        assert layer["mediaType"].endswith("+zstd")
        blob = layout / "blobs" / layer["digest"].replace(":", "/")
        plain = subprocess.run(["zstd", "-dcq", blob], check=True, capture_output=True).stdout
        (target / str(number)).write_bytes(plain)


def _gunzip(layout: Path, digest: str) -> bytes:
    blob = layout / "blobs" / digest.replace(":", "/")
    return subprocess.run(["gzip", "-dc", blob], check=True, capture_output=True).stdout


def _names(top: Path):
    for _, folders, files in os.walk(top):
        yield from folders + files


# --- the link, and what stays ---------------------------------------------------------------------------------------


def _left(place: Workspace) -> list[str]:
    """Whatever of a run can still be found."""
    found = [str(place.top)] if place.top.exists() else []
    found += [path.name for path in Path("/sys/class/net").glob(f"{place.net_name}*")]
    found += [str(path) for path in Path("/run/netns").glob(f"{place.net_name}*")]
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f"{place.top}" in line]
    found += [str(pid) for pid in workspace_module._pids()
              if workspace_module._is_ours(pid, place.top, place.net_name)]
    return found


@pytest.mark.mount
@needs_root
@pytest.mark.skipif(bool(_tool_missing("docker-registry", "tc", "ip")), reason="needs docker-registry and iproute2")
def test_link_counts_what_crosses_it_and_leaves_nothing():
    size = 8_000_000
    with workspace() as place:
        link = make_link(place)
        registry = start_registry(place, link=link)
        before = link.bytes_total()
        host, _, port = registry.host.partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        connection.request("POST", "/v2/x/blobs/uploads/")
        answer = connection.getresponse()
        location = answer.getheader("Location")
        answer.read()
        headers = {"Content-Type": "application/octet-stream"}
        connection.request("PATCH", location, body=os.urandom(size), headers=headers)
        assert connection.getresponse().status == 202
        connection.close()
        crossed = link.bytes_total() - before
        assert size <= crossed <= size * 1.06 + 20_000
        with pytest.raises(ConnectionError):    # the far end is not on this machine's loopback
            http.client.HTTPConnection("127.0.0.1", 5000, timeout=2).connect()
    assert _left(place) == []


_KILLED = """
    import subprocess, sys, time
    from benchmarks.kit.link import make_link
    from benchmarks.kit.registry import start_registry
    from benchmarks.kit.workspace import Interrupted, exit_by_signal, workspace
    try:
        with workspace() as place:
            make_link(place)
            start_registry(place)
            subprocess.run(["mount", "-t", "tmpfs", "none", place.folder("mounted")], check=True)
            subprocess.Popen(["sleep", "1000"], env={"SOMETHING": f"{place.top}/x"}, start_new_session=True)
            print("ready", flush=True)
            time.sleep(60)
    except Interrupted as error:
        exit_by_signal(error)
"""


@pytest.mark.mount
@needs_root
@pytest.mark.skipif(bool(_tool_missing("docker-registry", "tc", "ip")), reason="needs docker-registry and iproute2")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_however_a_run_is_ended(signum):
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(_KILLED)], cwd=ROOT, stdout=subprocess.PIPE)
    place = Workspace(child.pid)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        assert place.top.exists()
        child.send_signal(signum)
        if signum != signal.SIGKILL:
            time.sleep(0.01)
            child.send_signal(signum)    # impatient: the second one must not cut the clean-up short
        assert child.wait(30) == -signum
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    if signum == signal.SIGKILL:
        assert _left(place) != []
        sweep()
    assert _left(place) == []


def test_tool_errors_say_what_happened(tmp_path):
    with pytest.raises(ToolError, match="exit code 3\nbroken"):
        run(["sh", "-c", "echo broken; exit 3"], timeout_s=10)
    with pytest.raises(ToolError, match="not finished after 0 s"):
        run(["sleep", "100"], timeout_s=0.1)
    assert not attempt(["/nonexistent"])
    with Daemon(["sh", "-c", "echo last words; exit 1"], log=tmp_path / "log") as daemon:
        time.sleep(0.5)
        with pytest.raises(ToolError, match="last words"):
            daemon.check()
    assert BASE.is_dir()


# --- this machine's apt ---------------------------------------------------------------------------------------------


def test_sources_of_both_syntaxes_are_found(tmp_path):
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(
        "# a comment\n"
        "deb [arch=amd64 signed-by=/k.gpg] http://mirror.invalid/debian bookworm main contrib # the mirror\n"
        "deb-src http://mirror.invalid/debian bookworm main\n"
        "deb http://other.invalid/apt stable main\n"
    )
    (tmp_path / "sources.list.d" / "debian.sources").write_text(
        "# a comment\nTypes: deb deb-src\nURIs: http://mirror.invalid/security\nSuites: bookworm-security\n"
        "Components: main\nSigned-By:\n line one\n line two\n\n"
        "Types: deb\nURIs: http://other.invalid/x\nSuites: bookworm-pgdg\nComponents: main\n\n"
        "Enabled: no\nTypes: deb\nURIs: http://off.invalid/x\nSuites: bookworm\nComponents: main\n"
    )
    (tmp_path / "sources.list.d" / "notes.txt").write_text("deb http://ignored.invalid/ bookworm main\n")
    text = apt.sources("bookworm", tmp_path)
    assert text == (
        "Types: deb\nURIs: http://mirror.invalid/debian\nSuites: bookworm\nComponents: main contrib\n"
        "Architectures: amd64\nSigned-By: /k.gpg\n\n"
        "Types: deb deb-src\nURIs: http://mirror.invalid/security\nSuites: bookworm-security\nComponents: main\n"
        "Signed-By: \n line one\n line two\n"
    )
    with pytest.raises(ToolError, match="no apt source for trixie"):
        apt.sources("trixie", tmp_path)


# --- figures --------------------------------------------------------------------------------------------------------


def test_figures_are_kept_with_their_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    first = figures.ratio("1a", "title", 0.5, [1.0, 3.0, 2.0], [4.0, 4.0, 8.0], link_mb=[1.0, 1.0, 1.0])
    assert (first.value, first.spread, first.met) == (0.5, (0.25, 0.75), True)
    extra = figures.plain("10-cold", "title", None, "s", [3.0, 1.0, 2.0])
    assert (extra.value, extra.met) == (2.0, None)
    figures.save([first], "image", {"cpu": "x"}, "abc")
    missed = figures.plain("10", "title", 0.5, "s", [0.7, 0.6, 0.8])
    path = figures.save([missed, extra], "image", {"cpu": "x"}, "def+")
    assert "MISSED" in figures.show(missed)
    day = json.loads(path.read_text())
    assert set(day["figures"]) == {"1a", "10", "10-cold"}
    assert day["figures"]["1a"]["samples"]["theirs"] == [4.0, 4.0, 8.0]
    newest = json.loads((tmp_path / "figures.json").read_text())
    assert set(newest) == {"image.1a", "image.10"}
    assert newest["image.10"] == {
        "value": 0.7, "target": 0.5, "better": "lower", "unit": "s", "runs": 3, "spread": [0.6, 0.8],
        "commit": "def+", "date": day["date"],
    }
