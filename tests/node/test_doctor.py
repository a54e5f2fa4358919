"""`lazyfs doctor`: a whole node is well; what is not is named, with what to do about it; it never hangs."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from dataclasses import replace
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

import pytest

from lazyfs import config
from lazyfs.config import Amount
from lazyfs.doctor import Result, Status, Subject, containerd, examine, kernel, node, registry
from lazyfs.fs import mountapi
from lazyfs.registry import RegistryOptions
from tests.containerdkit import VERSIONS
from tests.convertkit import Layout, run_convert
from tests.lazyrig import running_node
from tests.mountkit import LAZYFS, require_mounting
from tests.registrykit import running_registry
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def subject(tmp_path: Path, image: str = "", **sections: Any) -> Subject:
    """Of a machine whose directories are all below tmp_path."""
    found = config.Config()
    daemon = replace(found.daemon, run_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"),
                     **sections.get("daemon", {}))
    snapshotter = replace(found.snapshotter, root=str(tmp_path / "snapshots"), address=str(tmp_path / "s.sock"),
                          containerd_address=str(tmp_path / "c.sock"))
    cache = replace(found.cache, **sections.get("cache", {}))
    own = replace(found.registry, hosts_dir="", **sections.get("registry", {}))
    whole = replace(found, daemon=daemon, cache=cache, snapshotter=snapshotter, registry=own)
    return Subject(whole, image, str(tmp_path / "containerd.toml"))


def statuses(results: Iterator[Result]) -> dict[str, str]:
    return {one.name: one.status.value for one in results}


@pytest.mark.mount
@pytest.mark.parametrize("version", VERSIONS)
def test_all_is_well_on_a_whole_node(tmp_path: Path, version: str) -> None:
    with running_node(tmp_path, version) as running:
        image = running.push("app", {"f": b"x" * 100_000})
        file = tmp_path / "lazyfs.toml"
        file.write_text(f"""
            [daemon]
            run_dir = "{running.machine.run_dir}"
            cache_dir = "{running.machine.cache}"
            [snapshotter]
            root = "{running.snapshotter.root}"
            address = "{running.snapshotter.address}"
            containerd_address = "{running.containerd.address}"
        """)
        words = [*LAZYFS, "doctor", "--json", "--config", str(file), "--containerd-config",
                 str(running.containerd.directory / "config.toml"), image]
        environment = {**running.machine.environment, "PATH": "/usr/bin:/bin"}   # the one that runs counts
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=120)
        found = {one["name"]: one for one in json.loads(done.stdout)}
        for name in ("configuration", "kernel", "/dev/fuse", "overlayfs", "daemon", "sockets", "snapshotter",
                     "containerd", "snapshotter in containerd", "registry", "clock", "credentials", "image"):
            assert found[name]["status"] == "ok", (name, found[name])
        assert "plugins" in found["containerd's configuration"]["text"]   # of its version: CRI alone is not set up here
        running.daemon.stop()
        done = subprocess.run(words[:-1], env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 40
        found = {one["name"]: one for one in json.loads(done.stdout)}
        assert found["daemon"]["status"] == "failed"
        assert "lazyfs daemon" in found["daemon"]["hint"]
        running.restart_daemon()


def test_nothing_runs(tmp_path: Path) -> None:
    found = {one.name: one for one in examine(subject(tmp_path))}
    for name in ("daemon", "snapshotter", "containerd"):
        assert found[name].status is Status.FAILED
        assert found[name].hint
    assert "No such file" in found["containerd"].text
    assert not {"registry", "credentials"} & set(found)
    for one in found.values():
        assert bool(one.hint) == (one.status is not Status.OK), one
        assert "\n" not in str(one)


def test_a_dead_socket_and_one_that_everybody_may_use(tmp_path: Path) -> None:
    looked = subject(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(looked.config.snapshotter.address)
        (tmp_path / "s.sock").chmod(0o666)
        tmp_path.chmod(0o755)
        (found,) = node.check_sockets(looked)
        assert found.status is Status.FAILED
        assert "others than root" in found.text
        tmp_path.chmod(0o700)
        assert statuses(node.check_sockets(looked)) == {"sockets": "ok"}
    assert {one.name: one.text for one in examine(looked)}["snapshotter"].endswith("Connection refused")


def test_a_process_that_does_not_answer_does_not_hang_it(tmp_path: Path) -> None:
    (tmp_path / "run" / "daemon").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "run" / "daemon" / "control.sock"))
        server.listen()
        found = list(examine(subject(tmp_path), (node.check_daemon,)))
    assert found[0].status is Status.FAILED
    assert "did not answer within 5 s" in found[0].text


def test_a_snapshotter_that_does_not_answer_is_no_good(tmp_path: Path) -> None:
    """containerd was asked for a snapshot that is none, and said so without asking its snapshotter."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.sock"))
        server.listen()
        (found,) = examine(subject(tmp_path), (containerd.check_snapshotter,))
    assert found.status is Status.FAILED
    assert "takes connections, but does not answer" in found.text


def test_many_who_do_not_answer_are_waited_for_at_once(tmp_path: Path) -> None:
    """A containerd that is stopped took 41 s: three checks ask it, one after the other, and asked it twice."""
    looked = subject(tmp_path)
    (tmp_path / "run" / "daemon").mkdir(parents=True)
    own = looked.config.snapshotter
    with contextlib.ExitStack() as stack:
        for path in (own.address, own.containerd_address, str(tmp_path / "run" / "daemon" / "control.sock")):
            server = stack.enter_context(socket.socket(socket.AF_UNIX))
            server.bind(path)
            server.listen()
        # three that wait for each other: no clock says as surely that they run at once
        meet = threading.Barrier(3)

        def check_meeting(_: Subject) -> Iterator[Result]:
            meet.wait(20)
            yield Result("met", Status.OK, "met")

        found = list(examine(looked, (check_meeting,) * 3 + (containerd.check_snapshotter, containerd.check_containerd,
                                                             node.check_daemon)))
    assert [one.status for one in found] == [Status.OK] * 3 + [Status.FAILED] * 3
    assert all("not answer" in one.text for one in found[3:]), found


def test_a_check_that_hangs_or_breaks_is_one_line(tmp_path: Path) -> None:
    end = threading.Event()

    def check_hanging(_: Subject) -> Iterator[Result]:
        end.wait(60)
        yield from ()

    def check_broken(_: Subject) -> Iterator[Result]:
        raise ZeroDivisionError("division by zero")

    begin = time.monotonic()
    found = list(examine(subject(tmp_path), (check_hanging, check_broken, kernel.check_file_systems), 0.2))
    end.set()
    assert time.monotonic() - begin < 30
    assert found[0].text == "no answer within 0.2 s"
    assert found[1].text == "unexpected ZeroDivisionError: division by zero"
    assert found[2].name == "overlayfs"


def test_a_log_file_that_cannot_be_written(tmp_path: Path) -> None:
    """Everything goes to standard error then, and nobody said so."""
    looked = subject(tmp_path)

    def found(file: str) -> dict[str, str]:
        log = replace(looked.config.log, file=file)
        return statuses(node.check_log(replace(looked, config=replace(looked.config, log=log))))

    assert found("") == {}
    assert found(str(tmp_path / "gone" / "log")) == found(str(tmp_path)) == {"log": "failed"}
    assert found(str(tmp_path / "log")) == {"log": "ok"}


def test_the_floor_of_the_disk(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    for floor, wanted in ((0, "ok"), (int(free * 0.75), "warning"), (free * 2, "failed")):
        looked = subject(tmp_path, cache={"free_floor_bytes": Amount(bytes=floor)})
        assert statuses(node.check_cache(looked))["disk space"] == wanted


@pytest.mark.mount
def test_file_systems_that_will_not_do(tmp_path: Path) -> None:
    require_mounting()
    for name in ("cache", "snapshots"):
        (tmp_path / name).mkdir()
    mountapi.mount("none", str(tmp_path / "cache"), "tmpfs", 0)
    lower, upper = tmp_path / "lower", tmp_path / "cache" / "upper"
    for path in (lower, upper, tmp_path / "cache" / "work"):
        path.mkdir()
    mountapi.mount("overlay", str(tmp_path / "snapshots"), "overlay", 0,
                   f"lowerdir={lower},upperdir={upper},workdir={tmp_path / 'cache' / 'work'}")
    try:
        looked = subject(tmp_path)
        assert statuses(node.check_cache(looked))["cache"] == "warning"
        (found,) = node.check_snapshotter_root(looked)
        assert "cannot be the upper layer" in found.text
    finally:
        mountapi.unmount(str(tmp_path / "snapshots"))
        mountapi.unmount(str(tmp_path / "cache"))


@pytest.mark.parametrize(("apart_s", "wanted"), [(0, "ok"), (-60, "warning"), (60, "warning"), (4000, "failed")])
def test_the_clock(apart_s: float, wanted: str) -> None:
    now = 1_800_000_000.0
    (found,) = registry.judge_clock(formatdate(now + apart_s, usegmt=True), now)
    assert found.status.value == wanted


@pytest.mark.parametrize("date", ["", "yesterday", "Mon, 99 Foo 2026 00:00:00 GMT", "x" * 10_000])
def test_a_clock_that_is_none(date: str) -> None:
    (found,) = registry.judge_clock(date, 0.0)
    assert found.status is Status.WARNING


def test_credentials_and_images(tmp_path: Path) -> None:
    with running_registry(tmp_path, username="kim", password="hunter2-secret") as running:
        source = Layout(tmp_path / "in")
        source.add_image("app", [TarBuilder().file("f", b"x" * 100_000).build()])
        options = RegistryOptions(insecure=True, username="kim", password="hunter2-secret")
        run_convert(source.reference("app"), f"docker://{running.host}/app:lazy", registry=options)
        secret = tmp_path / "password"
        hosts = {running.host: config.RegistryHost(username="kim", password_file=str(secret), insecure=True)}
        looked = subject(tmp_path, f"{running.host}/app:lazy", registry={"host": hosts})
        checks = (registry.check_registry, registry.check_image)
        secret.write_text("wrong\n")
        secret.chmod(0o600)
        found = {one.name: one for one in examine(looked, checks)}
        assert found["registry"].status is Status.OK
        assert found["clock"].status is Status.OK
        assert found["credentials"].status is Status.FAILED
        secret.write_text("hunter2-secret\n")
        results = list(examine(looked, checks))
        assert statuses(iter(results)) == {"registry": "ok", "clock": "ok", "credentials": "ok", "image": "ok"}
        assert "hunter2" not in str(results)
        missing = replace(looked, image=f"{running.host}/app:other")
        assert statuses(examine(missing, checks))["image"] == "failed"
        host = running.host
    gone = replace(looked, image=f"{host}/app:lazy")
    assert statuses(examine(gone, (registry.check_registry,))) == {"registry": "failed"}
    (found_reference,) = examine(replace(looked, image="not a reference"), (registry.check_registry,))
    assert found_reference.status is Status.FAILED
