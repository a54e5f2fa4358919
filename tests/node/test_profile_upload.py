"""Profiles from production: daemons that send what starts read, a daemon that collects it, and the list of all."""

from __future__ import annotations

import http.client
import json
import socket
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trustme

from lazyfs import config
from lazyfs.image.digest import Digest
from lazyfs.image.prefetch import parse_prefetch
from lazyfs.image.table import ChunkTable
from lazyfs.node import uploads, web
from lazyfs.node.collector import Collector
from lazyfs.node.contributions import Contributions
from lazyfs.node.recorder import Recorder
from lazyfs.node.uploads import Uploads
from lazyfs.profile.recording import to_json
from tests.daemonkit import WAIT_S, running_daemon
from tests.mountkit import Machine, require_mounting
from tests.ports import free_port
from tests.profilekit import recording
from tests.runnerkit import profiled_image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOKEN = "a-token-for-tests-of-32-characters"


def write_token(directory: Path, text: str = TOKEN) -> Path:
    path = directory / "token"
    path.write_text(text + "\n")
    path.chmod(0o600)
    return path


# --- two daemons -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    require_mounting()
    return profiled_image(tmp_path_factory.mktemp("uploaded"))


class Site:
    """A collecting daemon, and machines that send to it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.collected = directory / "collected"
        self.token = write_token(directory)
        self.machine = self.new_machine("collector", f"collect = '127.0.0.1:{self.port}'\n"
                                                     f"collect_dir = '{self.collected}'\n")

    def new_machine(self, name: str, profile: str) -> Machine:
        machine = Machine(self.directory / name)
        machine.directory.mkdir()
        text = f"[profile]\ntoken_file = '{self.token}'\n{profile}" if profile else ""
        (machine.directory / "config.toml").write_text(text)
        return machine

    def sender(self, name: str) -> Machine:
        return self.new_machine(name, f"upload = 'http://127.0.0.1:{self.port}'\nupload_after_s = 1\n")

    def wait_count(self, count: int) -> Contributions:
        deadline = time.monotonic() + WAIT_S
        while True:
            found = Contributions(self.collected)
            if sum(map(len, found.images.values())) >= count:
                return found
            assert time.monotonic() < deadline, "nothing came"
            time.sleep(0.05)

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, {"Authorization": f"Bearer {TOKEN}", **headers})
            return connection.getresponse().status
        finally:
            connection.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    with running_daemon(made.machine, "--config", str(made.machine.directory / "config.toml")):
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                made.ask("GET", "/")
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield made


def start_on(machine: Machine, image: str, *files: str) -> None:
    """A daemon, an image, a program's reads, the end of it."""
    with running_daemon(machine, "--config", str(machine.directory / "config.toml")):
        target = machine.target()
        machine.mount(image, target)
        for name in files:
            (target / name).read_bytes()
        machine.umount(target)
        machine.lazyfs("daemon", "status")


@pytest.mark.mount
def test_what_two_nodes_read_becomes_one_list(site: Site, image: str) -> None:
    for number, files in enumerate((("data/f1", "data/f2"), ("data/f1", "data/f3")), 1):
        sender = site.sender(f"node{number}")
        with running_daemon(sender, "--config", str(sender.directory / "config.toml")):
            target = sender.target()
            sender.mount(image, target)
            for name in files:
                (target / name).read_bytes()
            if number == 1:
                sender.umount(target)     # at its end
            site.wait_count(number)       # or after upload_after_s
            if number == 2:
                sender.umount(target)
    (key,) = Contributions(site.collected).images
    for path in (site.collected / key).iterdir():
        kept = path.read_text()
        for word in (image.rpartition(":")[0], "node", socket.gethostname(), str(site.directory), "data/f"):
            assert word not in kept, "a contribution tells whose it is"
    path = site.directory / "list"
    site.machine.lazyfs("profile", "collected", image, "--dir", site.collected, "-o", path)
    found = parse_prefetch(path.read_text())
    shares = {entry.pattern.decode(): entry.share for entry in found.entries}
    assert (found.header.runs, shares) == (2, {"data/f1": 1.0, "data/f2": 0.5, "data/f3": 0.5})
    site.machine.lazyfs("profile", "collected", image, "--dir", site.collected, "--min-share", "0.6", "-o", path)
    assert {entry.pattern for entry in parse_prefetch(path.read_text()).entries} == {b"data/f1"}


@pytest.mark.mount
def test_nothing_is_sent_unless_it_is_asked_for(site: Site, image: str) -> None:
    start_on(site.new_machine("silent", ""), image, "data/f1")
    start_on(site.sender("speaking"), image, "data/f2")
    found = site.wait_count(1)
    assert [len(one) for one in found.images.values()] == [1]


@pytest.mark.mount
def test_hostile_senders_are_refused_and_the_daemon_goes_on(site: Site, image: str) -> None:
    good = to_json(recording([(0, 0, 4096, 1.0)], image="", containers=("",)))
    path = "/v1/profiles/" + "0" * 32
    assert site.ask("POST", path, good, Authorization="Bearer " + "x" * 34) == 401
    assert site.ask("POST", path, good, Authorization="") == 401
    assert site.ask("POST", "/v1/profiles/..%2f..%2fetc", good) == 404
    assert site.ask("PUT", path, good) == 405
    assert site.ask("POST", path, b"[" * 1_000_000) == 400
    assert site.ask("POST", path, good.replace(b"4096", b"99999999999999999999")) == 400
    assert site.ask("POST", path, good.replace(b'""', b'"web"', 1)) == 400
    assert site.ask("POST", path, b"") == 400
    with socket.create_connection(("127.0.0.1", site.port), 10) as raw:
        raw.sendall(b"POST " + path.encode() + b" HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + TOKEN.encode()
                    + b"\r\nContent-Length: 99999999\r\n\r\n")
        assert b" 413 " in raw.recv(100)
    with socket.create_connection(("127.0.0.1", site.port), 10) as raw:      # chunks without an end
        raw.sendall(b"POST " + path.encode() + b" HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + TOKEN.encode()
                    + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent = 0
        try:
            while sent < 64 << 20:
                raw.sendall(b"100000\r\n" + b"x" * 0x100000 + b"\r\n")
                sent += 1 << 20
        except OSError:
            pass
        assert sent < 32 << 20
    assert not Contributions(site.collected).images
    assert site.ask("POST", path, good) == 200
    assert [len(one) for one in Contributions(site.collected).images.values()] == [1]
    text = site.machine.lazyfs("profile", "collected", image, "--dir", site.collected, code=21)
    assert "no node has contributed" in text
    assert (site.machine.directory / "daemon.log").read_text().count(TOKEN) == 0


# --- the sender alone, against a collector in this process ---------------------------------------------------------


def mounted_image(*, whole: bool = True, record: bool = False, index: int = 3, layer: int = 0) -> Any:
    """What Uploads looks at of a mount: with a real recorder that has seen a read."""
    size = 1 << 20
    recorder = Recorder([size])
    recorder.note(0, 0, 4096, 0)
    recorder.whole = whole
    table = SimpleNamespace(device_size=size, spec=ChunkTable)
    devices = ((Digest.of(b"layer %d" % layer), table),)
    return SimpleNamespace(recorder=recorder, order=SimpleNamespace(record=record), device_indexes=[index],
                           opened=SimpleNamespace(devices=devices))


class Answers:
    """A collector of which it is said what it answers."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.paths: list[bytes] = []

    def admit(self, request: web.Request) -> web.Answer | None:
        return None

    async def respond(self, request: web.Request, body: bytes) -> web.Answer:
        assert json.loads(body)["image"] == ""
        self.paths.append(request.target)
        status = self.statuses.pop(0) if self.statuses else 200
        return status, {"retry_after_s": 1}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "LOOK_S", 0.02)
    monkeypatch.setattr(uploads, "RETRY_FIRST_S", 0.01)


async def wait_for(condition: Any) -> None:
    with trio.fail_after(WAIT_S):
        while not condition():   # noqa: ASYNC110 - a thread tells nobody
            await trio.sleep(0.01)


async def begin(nursery: trio.Nursery, directory: Path, mounts: list[Any], answers: Answers, **more: Any) -> Uploads:
    port = free_port()
    nursery.start_soon(web.serve, f"127.0.0.1:{port}", web.Site(
        "profile.collect", answers.admit, answers.respond, 1 << 20, 4, 5.0, 0.05))
    settings = config.Profile(upload=f"http://127.0.0.1:{port}/below", upload_after_s=0.05,
                              token_file=str(write_token(directory)))
    made = Uploads(settings, directory / "contributor", lambda: mounts, **more)
    nursery.start_soon(made.run)
    return made


@pytest.mark.trio
async def test_a_collector_in_trouble_is_asked_again_and_each_image_has_its_own_name(
    nursery: trio.Nursery, tmp_path: Path, quick: None
) -> None:
    answers, mounts = Answers(503, 429), [mounted_image(), mounted_image(layer=1)]
    await begin(nursery, tmp_path, mounts, answers)
    await wait_for(lambda: len(answers.paths) == 4)
    names = [path.rpartition(b"/")[2] for path in answers.paths]
    assert answers.paths[0].startswith(b"/below/v1/profiles/")
    assert names[0] == names[1] == names[2] != names[3]
    nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_what_is_refused_is_dropped_and_nothing_is_sent_twice(
    nursery: trio.Nursery, tmp_path: Path, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    answers, mounts = Answers(400), [mounted_image()]
    made = await begin(nursery, tmp_path, mounts, answers)
    await wait_for(lambda: "is dropped" in caplog.text)
    made.leaving(mounts[0])                 # known
    made.leaving(mounted_image())           # the same image, within the hour
    made.leaving(mounted_image(layer=2))
    await wait_for(lambda: len(answers.paths) == 2)
    assert TOKEN not in caplog.text
    nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_after_an_hour_the_image_may_speak_again(nursery: trio.Nursery, tmp_path: Path, quick: None) -> None:
    now = [0.0]
    answers = Answers()
    made = await begin(nursery, tmp_path, [], answers, clock=lambda: now[0])
    for expected in (1, 2):
        made.leaving(mounted_image())
        await wait_for(lambda expected=expected: len(answers.paths) == expected)
        now[0] += uploads.IMAGE_PAUSE_S
    nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_what_is_no_whole_start_is_not_sent(nursery: trio.Nursery, tmp_path: Path, quick: None) -> None:
    answers = Answers()
    made = await begin(nursery, tmp_path, [], answers)
    for mounted in (mounted_image(whole=False), mounted_image(record=True), mounted_image(index=-1)):
        made.leaving(mounted)
    unread = mounted_image()
    unread.recorder = Recorder([1 << 20])
    made.leaving(unread)
    made.leaving(mounted_image(layer=7))    # which is
    await wait_for(lambda: answers.paths)
    assert len(answers.paths) == 1
    nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_over_tls_only_to_whom_is_trusted(
    nursery: trio.Nursery, tmp_path: Path, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    port = free_port()
    settings = config.Profile(
        upload=f"https://127.0.0.1:{port}", token_file=str(write_token(tmp_path)), collect=f"127.0.0.1:{port}",
        collect_dir=str(tmp_path / "collected"), cert_file=str(tmp_path / "cert.pem"),
        key_file=str(tmp_path / "key.pem"), upload_after_s=0.05)
    nursery.start_soon(Collector(settings).run)
    await wait_for((tmp_path / "collected/secret").exists)
    mounts = [mounted_image()]
    doubting = Uploads(settings, tmp_path / "one", lambda: mounts)
    nursery.start_soon(doubting.run)
    await wait_for(lambda: "is dropped" in caplog.text)
    assert "not trusted" in caplog.text
    assert not Contributions(tmp_path / "collected").images
    trusting = config.Profile(**{**vars(settings), "ca_file": str(tmp_path / "ca.pem")})
    nursery.start_soon(Uploads(trusting, tmp_path / "two", lambda: mounts).run)
    await wait_for(lambda: Contributions(tmp_path / "collected").images)
    nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_a_collector_without_token_or_certificate_says_so_and_serves_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with trio.fail_after(WAIT_S):
        await Collector(config.Profile(collect="127.0.0.1:1", token_file=str(tmp_path / "none"))).run()
        await Collector(config.Profile(collect="127.0.0.1:1", cert_file="/none", key_file="/none")).run()
    assert caplog.text.count("no profiles are collected") == 2
