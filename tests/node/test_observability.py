"""What a node tells while a registry is slow, gone, and back: metrics, status, trace, dumps, ids in the log."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lazyfs.node import metrics
from tests.convertkit import registry_with, tar_of
from tests.daemonkit import WAIT_S, Daemon, running_daemon
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.mountkit import LAZYFS, Machine, require_mounting
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.registrykit import Registry

pytestmark = pytest.mark.mount
FILE_COUNT, FILE_BYTES = 4, 1_300_000


def content(number: int) -> bytes:
    return random.Random(number).randbytes(FILE_BYTES)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    require_mounting()
    layers = {"app": [tar_of({f"file{number}": content(number) for number in range(FILE_COUNT)})]}
    with registry_with(tmp_path_factory.mktemp("registry"), layers) as running:
        yield running


@pytest.fixture
def proxy(registry: Registry) -> Iterator[FaultProxy]:
    with FaultProxy(registry.host) as made:
        yield made


@pytest.fixture
def node(tmp_path: Path, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    machine = Machine(tmp_path / "machine")
    port = free_port()
    config = tmp_path / "config.toml"
    config.write_text(f"[daemon]\nhealth_address = '127.0.0.1:{port}'\nread_timeout_s = 4\nslow_read_s = 0.2\n"
                      "prefetch = false\nheartbeat_s = 0.5\n[cache]\nfull_copy = 'off'\n"
                      f"[registry.host.'{proxy.host}']\ninsecure = true\n")
    monkeypatch.setenv("LAZYFS_CONFIG", str(config))
    with running_daemon(machine) as daemon:
        made = Node(machine, daemon, port, proxy)
        machine.lazyfs("mount", f"{proxy.host}/app:lazy", machine.target())
        until(lambda: _page_or_none(made) is not None, "it listens soon after it is ready")
        yield made
        machine.umount(machine.target())


class Node:
    """A daemon with one image, whose registry is behind a proxy."""

    def __init__(self, machine: Machine, daemon: Daemon, port: int, proxy: FaultProxy) -> None:
        self.machine, self.daemon, self.port, self.proxy = machine, daemon, port, proxy

    def read(self, number: int) -> bytes:
        return (self.machine.target() / f"file{number}").read_bytes()

    def says(self, *words: str) -> str:
        """What a command prints."""
        with self.machine.start(*words) as process:
            output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        return output

    def status(self) -> dict[str, Any]:
        (found,) = json.loads(self.says("status", "--json"))["workers"]
        assert isinstance(found, dict)
        return found

    def page(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """/metrics: by name and label values."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=WAIT_S) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            return parse(answer.read().decode())

    def log(self) -> str:
        return (self.machine.directory / "daemon.log").read_text()


def parse(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    return {(sample.name, tuple(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples}


def until(condition: Callable[[], object], what: str = "") -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_metrics_say_what_was_read_from_whom_and_survive_a_worker(node: Node) -> None:
    assert node.read(0) == content(0)
    until(lambda: node.page()["lazyfs_reads_total", ("miss",)] > 0, "a page is made once a second at most")
    page = node.page()
    assert page["lazyfs_ready", ()] == 1
    assert page["lazyfs_mounts", ("attached",)] == 1
    assert page["lazyfs_takeovers_total", ()] == 0
    assert page["lazyfs_reads_total", ("miss",)] > 0
    assert page["lazyfs_fetched_bytes_total", (node.proxy.host,)] >= FILE_BYTES
    assert page["lazyfs_read_seconds_count", ()] >= page["lazyfs_reads_total", ("miss",)] > 0
    assert page["lazyfs_read_seconds_bucket", ("+Inf",)] == page["lazyfs_read_seconds_count", ()]
    assert page["lazyfs_cache_used_bytes", ()] >= FILE_BYTES
    assert page["lazyfs_cache_disk_size_bytes", ()] > page["lazyfs_cache_floor_bytes", ()] > 0
    assert ("lazyfs_source_state", (node.proxy.host, "ok")) in page
    known = {one.name.removesuffix("_total") for one in metrics.METRICS}
    assert {name for name, _ in page if not name.removesuffix("_total").startswith(tuple(known))} == set()
    worker = node.daemon.worker()
    os.kill(worker, signal.SIGKILL)
    node.daemon.wait_ready(not_worker=worker)
    until(lambda: _page_or_none(node) is not None)
    assert node.page()["lazyfs_takeovers_total", ()] == 1
    assert node.page()["lazyfs_worker_deaths_total", ()] == 1
    printed = parse(node.says("metrics"))
    assert printed["lazyfs_takeovers_total", ()] == 1
    assert {name for name, _ in printed} == {name for name, _ in node.page()}


def _page_or_none(node: Node) -> object:
    try:
        return node.page()
    except OSError:
        return None   # the port is another worker's still, or nobody's


def test_a_slow_read_is_traced_to_its_file_source_and_request(node: Node) -> None:
    node.proxy.add(Fault(Kind.DELAY, path=r"/blobs/", seconds=0.7))
    assert node.read(1) == content(1)
    found = [json.loads(line) for line in node.says("trace", "--json").splitlines()]
    assert found
    assert all(one["seconds"] >= 0.2 and one["over"] and not one["error"] for one in found)
    assert all(one["image"].endswith("app:lazy") and one["target"] == str(node.machine.target()) for one in found)
    assert {file["path"] for one in found for file in one["files"]} >= {"/file1"}
    chunks = [chunk for one in found for chunk in one["chunks"]]
    assert any(chunk["server"] == node.proxy.host and chunk["stages"].get("first_byte", 0) >= 0.5 for chunk in chunks)
    asked = {seen.headers.get("x-request-id") for seen in node.proxy.requests}
    assert {chunk["request"] for chunk in chunks} & asked, "the registry's log has the same ids"
    text = node.says("trace")
    assert "/file1" in text
    assert node.proxy.host in text
    assert node.says("trace", "--over", "3000") == ""
    assert node.status()["reads"]["slow"] >= len(found)


def test_an_outage_is_seen_while_it_lasts_and_counted_when_it_is_over(node: Node) -> None:
    node.proxy.add(Fault(Kind.BLACK_HOLE, path=r"/blobs/"))
    errors: list[OSError] = []
    reader = threading.Thread(target=_fail, args=(node, 2, errors))
    reader.start()
    try:
        until(lambda: node.page()["lazyfs_reads_waiting", ()] >= 1)
        dump = node.says("daemon", "dump")
        assert "read" in dump
        assert "_attempts" in dump, "the task that waits"
        assert "chunk" in dump
        os.kill(node.daemon.worker(), signal.SIGUSR1)
        os.kill(node.daemon.process.pid, signal.SIGUSR1)
        until(lambda: "lazyfs.dump" in node.log() and "lazyfs keeper: {" in node.log(), "both say what they do")
        until(lambda: "task" in node.log())
    finally:
        reader.join(60)
    assert errors, "the read ended at its deadline"
    until(lambda: node.page()["lazyfs_reads_waiting", ()] == 0)
    page = node.page()
    assert sum(count for (name, _), count in page.items() if name == "lazyfs_read_errors_total") >= 1
    (failed,) = {one["error"] for one in map(json.loads, node.says("trace", "--json").splitlines()) if one["error"]}
    assert page["lazyfs_read_errors_total", (failed,)] >= 1
    ids = {one["request"] for one in map(json.loads, node.says("trace", "--json").splitlines())}
    assert any(json.loads(line).get("request") in ids for line in node.log().splitlines() if line.startswith("{")), \
        "the line that says why names the read"
    screen = node.says("status")
    assert "errors" in screen
    assert str(node.machine.target()) in screen
    node.proxy.clear()
    until(lambda: _try(node, 2), "it works again")


def _fail(node: Node, number: int, errors: list[OSError]) -> None:
    try:
        node.read(number)
    except OSError as error:
        errors.append(error)


def _try(node: Node, number: int) -> bool:
    try:
        return node.read(number) == content(number)
    except OSError:
        return False


def test_status_is_shown_again_and_again_also_over_a_worker_s_death(node: Node) -> None:
    with subprocess.Popen([*LAZYFS, "status", "--watch", "--interval", "0.2", "--json"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, env=node.machine.environment) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())["workers"][0]
        assert first["pid"] == node.daemon.worker()
        os.kill(first["pid"], signal.SIGKILL)
        deadline = time.monotonic() + WAIT_S
        while json.loads(process.stdout.readline())["workers"][0].get("pid", first["pid"]) == first["pid"]:
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_without_a_daemon_the_worker_of_a_mount_is_asked(tmp_path: Path, proxy: FaultProxy) -> None:
    machine = Machine(tmp_path / "machine")
    machine.directory.mkdir()
    for words in (("status",), ("trace",), ("metrics",)):
        assert "no daemon runs" in machine.lazyfs(*words, code=41)
    try:
        machine.mount(f"{proxy.host}/app:lazy", machine.target(), "--insecure")
        with machine.start("status") as process:
            assert "without a daemon; ready" in process.communicate(timeout=60)[0]
        file = tmp_path / "lazyfs.prom"
        machine.lazyfs("metrics", "--output", file)
        page = parse(file.read_text())
        assert page["lazyfs_ready", ()] == 1
        assert ("lazyfs_takeovers_total", ()) not in page
        assert list(tmp_path.glob(".lazyfs*")) == []
        machine.umount(machine.target())
    finally:
        machine.close()
