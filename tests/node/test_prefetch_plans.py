"""Where a plan comes from: the hot part, or a list beside the image; what a second use costs; and when it stops."""

from __future__ import annotations

import json
import random
import time
from typing import TYPE_CHECKING, Any

import pytest

from lazyfs import config
from lazyfs.errors import FormatError, LazyfsError, TargetError
from lazyfs.fetch.engine import FetchLimits
from lazyfs.image.prefetch import parse_prefetch
from lazyfs.node import listed, protocol
from lazyfs.node.opening import open_image
from lazyfs.node.order import MountOrder
from lazyfs.node.prefetching import bounds_of
from lazyfs.registry import RegistryOptions
from tests.convertkit import Layout, run_convert
from tests.daemonkit import Daemon, running_daemon
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.mountkit import Machine, require_mounting
from tests.registrykit import running_registry
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lazyfs.node.opening import OpenedImage

pytestmark = pytest.mark.mount
WAIT_S = 20.0
RNG = random.Random(41)
FILES = {f"f{number}": RNG.randbytes(1_500_000) for number in range(6)}
LISTED = "# lazyfs-prefetch 1\nf4\nf1 0-99999\n"
OPTIONS = RegistryOptions(insecure=True)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry with app:lazy and a list beside it, app:hot with a hot part, and app:bare with neither."""
    require_mounting()
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        for name, prefetch in {"lazy": None, "bare": None, "hot": parse_prefetch(LISTED.encode())}.items():
            source = Layout(tmp_path_factory.mktemp("source") / name)
            tar = TarBuilder()
            for path, data in {**FILES, "name": name.encode()}.items():
                tar.file(path, data)
            source.add_image("app", [tar.build()])
            run_convert(source.reference("app"), f"docker://{running.host}/app:{name}", registry=OPTIONS,
                        prefetch=prefetch)
        folder = tmp_path_factory.mktemp("list")
        (folder / "list").write_text(LISTED)
        Machine(folder).lazyfs("profile", "push", folder / "list", f"{running.host}/app:lazy", "--insecure")
        yield running.host


@pytest.fixture
def proxy(host: str) -> Iterator[FaultProxy]:
    with FaultProxy(host) as made:
        yield made


def mounted(machine: Machine) -> dict[str, Any]:
    found: dict[str, Any] = machine.statistics()["mounts"][0]
    return found


def wait_plan(machine: Machine, plan: str, chunks: int = 0) -> None:
    """Until it is known where the plan comes from, and so much of it is there."""
    deadline = time.monotonic() + WAIT_S
    while (found := mounted(machine))["prefetch_plan"] != plan or found["prefetched_chunks"] < chunks:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


def test_a_list_beside_the_image_is_found_and_kept(machine: Machine, proxy: FaultProxy) -> None:
    target, image = machine.target(), f"{proxy.host}/app:lazy"
    machine.mount(image, target, "--insecure")
    wait_plan(machine, "list", 1)
    deadline = time.monotonic() + WAIT_S
    while machine.statistics()["fetch"]["fetched_stored_bytes"] < 1_600_000:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (target / "f4").read_bytes() == FILES["f4"]
    before = machine.statistics()["fetch"]
    assert before["chunks_fetched"] == before["chunks_prefetched"]
    assert before["fetched_stored_bytes"] < 4_000_000
    machine.umount(target)
    machine.assert_clean()
    proxy.forget()
    machine.mount(image, target, "--insecure")
    wait_plan(machine, "list")
    assert not proxy.seen(path="referrers"), "it is asked for once a day"
    assert not [one for one in proxy.seen(path="manifests") if "sha256-" in one.path]
    assert (target / "f4").read_bytes() == FILES["f4"]
    assert machine.statistics()["fetch"]["requests"] == 0, "what is there is not fetched again"
    machine.umount(target)
    machine.assert_clean()


def test_where_there_is_no_list_that_is_kept_too(machine: Machine, proxy: FaultProxy) -> None:
    target, image = machine.target(), f"{proxy.host}/app:bare"
    machine.mount(image, target, "--insecure")
    wait_plan(machine, "none")
    assert machine.statistics()["fetch"]["requests"] == 0
    (plan,) = (machine.cache / "images").glob("*.plan")
    assert json.loads(plan.read_text())["chunks"] == []
    machine.umount(target)
    machine.assert_clean()


def test_an_image_with_a_hot_part_asks_nobody(machine: Machine, proxy: FaultProxy) -> None:
    target, image = machine.target(), f"{proxy.host}/app:hot"
    machine.mount(image, target, "--insecure")
    wait_plan(machine, "hot", 1)
    assert not proxy.seen(path="referrers|sha256-")
    assert not list((machine.cache / "images").glob("*.plan"))
    machine.umount(target)
    machine.assert_clean()


def test_lists_are_not_looked_for_where_that_is_configured(
    machine: Machine, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZYFS_DAEMON_PREFETCH_LISTS", "false")
    target = machine.target()
    machine.mount(f"{proxy.host}/app:lazy", target, "--insecure")
    assert (target / "f0").read_bytes() == FILES["f0"]
    assert mounted(machine)["prefetch_plan"] == ""
    assert not proxy.seen(path="referrers|sha256-")
    machine.umount(target)
    machine.assert_clean()


@pytest.mark.parametrize("fault", [
    Fault(Kind.RESET, path="/referrers/", at=-1), Fault(Kind.BLACK_HOLE, path="/referrers/"),
    Fault(Kind.GARBAGE, path="sha256-"),
], ids=lambda fault: f"{fault.kind.name}{fault.path}")
def test_a_registry_in_trouble_is_not_noticed(machine: Machine, proxy: FaultProxy, fault: Fault) -> None:
    proxy.add(fault)
    target = machine.target()
    machine.mount(f"{proxy.host}/app:lazy", target, "--insecure")
    for name, data in FILES.items():
        assert (target / name).read_bytes() == data
    machine.umount(target)
    machine.assert_clean()


def test_rest_stops_it_and_another_container_goes_on(machine: Machine, proxy: FaultProxy) -> None:
    stall = proxy.add(Fault(Kind.STALL, path="/blobs/", at=100_000, times=1, skip=1))
    with running_daemon(machine) as daemon:
        target, image = machine.target(), f"{proxy.host}/app:hot"
        machine.lazyfs("mount", image, target, "--insecure")
        deadline = time.monotonic() + WAIT_S
        while not stall.applied:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert ask(daemon, protocol.REST, target=str(target)) == {"stopped": True}
        assert ask(daemon, protocol.REST, target=str(target)) == {"stopped": False}
        with pytest.raises(TargetError):
            ask(daemon, protocol.REST, target="/nowhere")
        proxy.disconnect()
        (record,) = (daemon.directory.root / "mounts").glob("*.json")
        order = json.loads(record.read_text())["order"]
        ask(daemon, protocol.MOUNT, order=order, ensure=True)
        wait_plan(machine, "hot", 1)
        assert (target / "f4").read_bytes() == FILES["f4"]
        proxy.forget()
        for _ in range(3):     # further containers of it cost nothing
            ask(daemon, protocol.MOUNT, order=order, ensure=True)
        machine.umount(target)
        assert not proxy.seen()


def ask(daemon: Daemon, operation: str, **arguments: Any) -> Any:
    with protocol.ControlClient.connect(daemon.directory.socket) as client:
        return client.request(operation, WAIT_S, **arguments)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenedImage]:
    directory = tmp_path_factory.mktemp("opened")
    source = Layout(directory / "in")
    tar = TarBuilder()
    for path, data in FILES.items():
        tar.file(path, data)
    source.add_image("app", [tar.build()])
    image = f"oci:{directory / 'out'}:lazy"
    run_convert(source.reference("app"), image)
    (directory / "cache").mkdir()
    found = open_image(MountOrder(image, "/nowhere"), directory / "cache")
    yield found
    found.close()


def test_a_list_becomes_chunks_in_its_order(opened: OpenedImage) -> None:
    chunks = listed.resolve(LISTED.encode(), opened)
    table = opened.devices[0][1]
    wanted = []
    for path, size in ((b"f4", 1_500_000), (b"f1", 100_000)):
        ((_, start, _),) = opened.tree.extents(opened.tree.lookup(opened.tree.root_nid, path), 0, size)
        wanted += range(start // table.chunk_size, (start + size - 1) // table.chunk_size + 1)
    assert chunks == [(0, index) for index in dict.fromkeys(wanted)]
    assert listed.resolve(b"# lazyfs-prefetch 1\nnothing\n", opened) == []


@pytest.mark.parametrize("text", [b"\xff", b"# lazyfs-prefetch 9\nf1\n", b"# lazyfs-prefetch 1\nf1 9-1\n"])
def test_what_is_no_list_is_refused(opened: OpenedImage, text: bytes) -> None:
    with pytest.raises(FormatError):
        listed.resolve(text, opened)


@pytest.mark.parametrize("kept", [
    b"", b"{", b"[]", b'{"asked": "now", "chunks": []}', b'{"asked": 9e99, "chunks": [[0, 99999]]}',
    b'{"asked": 9e99, "chunks": [[-1, 0]]}', b'{"asked": 9e99, "chunks": [[0]]}', b'{"asked": 9e99, "chunks": 5}',
    b"[" * 100_000,
])
def test_a_damaged_plan_is_asked_for_anew(opened: OpenedImage, tmp_path: Path, kept: bytes) -> None:
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / f"{opened.layer.digest.hex}.plan"
    path.write_bytes(kept)
    assert listed.find_plan(MountOrder(opened.source.name, "/nowhere"), opened, tmp_path) == []
    assert json.loads(path.read_text())["chunks"] == []


def test_a_kept_plan_is_used_until_it_is_old_and_when_nobody_answers(opened: OpenedImage, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / f"{opened.layer.digest.hex}.plan"
    gone = MountOrder(f"oci:{tmp_path}/gone:lazy", "/nowhere")
    for asked in (time.time(), time.time() - 7 * 86_400):
        path.write_text(json.dumps({"asked": asked, "chunks": [[0, 1], [0, 0]]}))
        assert listed.find_plan(gone, opened, tmp_path) == [(0, 1), (0, 0)]
    path.unlink()
    with pytest.raises(LazyfsError):
        listed.find_plan(gone, opened, tmp_path)
    assert listed.find_plan(MountOrder(opened.source.name, "/nowhere"), opened, tmp_path) == []


def test_the_bounds_are_those_of_the_configuration() -> None:
    settings = config.Daemon(prefetch_streams=2, prefetch_rate=3_000_000, prefetch_max_bytes=5_000_000)
    bounds = bounds_of(settings)
    assert (bounds.prefetch_streams, bounds.prefetch_rate, bounds.prefetch_bytes_max) == (2, 3_000_000, 5_000_000)
    assert bounds_of(config.Daemon()) == FetchLimits()
