"""What is evicted, and when: decisions only, no disk."""

from __future__ import annotations

import os

import pytest

from lazyfs.cache.inventory import FoundDevice, FoundImage, ImageRecord, Inventory, Use
from lazyfs.cache.plan import Device, Image, Plan, choose, choose_all, choose_image, wanted_bytes
from lazyfs.cache.space import Disk, Limits, Space
from lazyfs.config.kinds import Amount
from lazyfs.errors import BusyError, NotFoundError, UsageError
from lazyfs.node.housekeeping import Request, decide

GIB = 1 << 30


def device(name: str, size: int = 10, last_use: int = 0, *, in_use: bool = False) -> Device:
    return Device(name, size, last_use, in_use)


def image(name: str, *devices: str, size: int = 1, in_use: bool = False) -> Image:
    return Image(name, size, frozenset(devices), in_use)


# --- how much ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("used", "free", "limits", "expected"), [
    (100, 900, Limits(), 0),
    (100, 0, Limits(), 0),                                       # no limits: a full disk is nobody's business
    (1000, 9000, Limits(quota_bytes=1000), 0),
    (1001, 9000, Limits(quota_bytes=1000), 51),                  # 5 % below the quota
    (5000, 500, Limits(floor=Amount(percent=5.0)), 0),
    (5000, 499, Limits(floor=Amount(percent=5.0)), 26),          # 5 % above the floor
    (5000, 0, Limits(floor=Amount(bytes=1000)), 1050),
    (100, 0, Limits(floor=Amount(bytes=1000)), 100),             # never more than there is
    (2000, 900, Limits(1000, Amount(bytes=1000)), 1050),         # the greater of both: 1050 over the quota, 150
])
def test_how_much_should_go(used: int, free: int, limits: Limits, expected: int) -> None:
    assert wanted_bytes(used, Disk(10_000, free), limits) == expected


def test_room_is_made_when_somebody_found_none() -> None:
    assert wanted_bytes(5000, Disk(10_000, 0), Limits(), room_bytes=64) == 64
    assert wanted_bytes(5000, Disk(10_000, 100), Limits(), room_bytes=64) == 0
    assert wanted_bytes(5000, Disk(10_000, 100), Limits(floor=Amount(bytes=90)), room_bytes=64) == 54
    assert wanted_bytes(980, Disk(10_000, 5000), Limits(1000), room_bytes=64) == 44
    assert wanted_bytes(980, Disk(10_000, 5000), Limits(1000), room_bytes=5000) == 80, "a tenth of the quota"


# --- what -------------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_go_first_and_no_more_than_needed() -> None:
    devices = [device("b", last_use=2), device("c", last_use=3), device("a", last_use=1)]
    assert choose(devices, [], 0) == Plan((), (), 0, 0)
    assert choose(devices, [], 1).devices == ("a",)
    assert choose(devices, [], 10).devices == ("a",)
    assert choose(devices, [], 11).devices == ("a", "b")
    assert choose(devices, [], 99).devices == ("a", "b", "c")


def test_what_is_in_use_stays_and_so_does_what_belongs_to_a_mounted_image() -> None:
    devices = [device("a", in_use=True), device("b", last_use=1), device("c", last_use=2)]
    images = [image("i", "b", in_use=True), image("j", "c")]
    assert choose(devices, images, 99) == Plan(("c",), ("j",), 11, 99)


def test_an_images_own_files_go_with_its_last_device() -> None:
    devices = [device("a", last_use=1), device("b", last_use=2), device("c", last_use=3)]
    images = [image("i", "a", "b", size=5), image("j", "b", "c", size=5), image("k", "c", "d")]
    assert choose(devices, images, 10).images == ()
    assert choose(devices, images, 20) == Plan(("a", "b"), ("i",), 25, 20)
    assert set(choose(devices, images, 30).images) == {"i", "j", "k"}


def test_images_without_devices_go_whether_room_is_wanted_or_not() -> None:
    images = [image("i", "gone", size=7), image("none", size=7), image("used", "gone", in_use=True)]
    assert choose([device("a")], images, 0) == Plan((), ("i", "none"), 14, 0)


def test_all_means_also_what_takes_no_space() -> None:
    devices = [device("a", 0), device("b", 0, 9), device("c", 5, in_use=True)]
    assert choose_all(devices, [image("i", "a", size=0)]).devices == ("a", "b")


def test_one_image_leaves_the_layers_of_others() -> None:
    devices = [device("a"), device("b"), device("c", in_use=True)]
    images = [image("i", "a", "b", "c"), image("j", "b")]
    assert choose_image(devices, images, "i") == Plan(("a",), ("i",), 11, 11)
    assert choose_image(devices, [image("i", "a", in_use=True)], "i").devices == ()


# --- what is asked for ------------------------------------------------------------------------------------------------


def found(images: dict[str, tuple[str, list[str]]], *devices: str) -> Inventory:
    inventory = Inventory({name: FoundDevice(name, Use(10, 3), number) for number, name in enumerate(devices)})
    for name, (called, own) in images.items():
        inventory.images[name] = FoundImage(name, ImageRecord(called, tuple(own)), Use(1, 2))
    return inventory


def test_removal_by_name_by_digest_and_of_several_that_a_tag_has_named() -> None:
    cache = found({"i": ("app:1", ["a", "b"]), "j": ("app:1", ["b", "c"]), "k": ("other", ["c"])}, "a", "b", "c", "d")
    assert set(decide(Request(remove="app:1"), 0, cache, set(), {}).devices) == {"a", "b"}
    assert decide(Request(remove="sha256:i"), 0, cache, set(), {}).devices == ("a",)
    assert decide(Request(remove="sha256:d"), 0, cache, set(), {}) == Plan(("d",), (), 10, 10)
    with pytest.raises(NotFoundError, match="app:2 is not in the cache"):
        decide(Request(remove="app:2"), 0, cache, set(), {})


def test_removal_of_what_is_mounted_is_refused_by_name_of_the_mount() -> None:
    cache = found({"i": ("app:1", ["a"])}, "a", "b")
    for name in ("app:1", "sha256:i", "sha256:a"):
        with pytest.raises(BusyError, match="/mnt"):
            decide(Request(remove=name), 0, cache, {"a"}, {"i": ["/mnt"]})
    with pytest.raises(BusyError, match="being read"):
        decide(Request(remove="sha256:b"), 0, cache, {"b"}, {})


def test_a_request_travels() -> None:
    for request in (Request(), Request(everything=True, dry_run=True), Request(remove="x"),
                    Request(Limits(5, Amount(percent=7.5))), Request(Limits(0, Amount(bytes=9)))):
        assert Request.from_json(request.to_json()) == request
    for wrong in ({"limits": 1}, {"limits": {}}, {"limits": {"quota": "x", "floor": "1"}},
                  {"limits": {"quota": 1, "floor": "-"}}):
        with pytest.raises(UsageError):
            Request.from_json(wrong)


# --- at each write ----------------------------------------------------------------------------------------------------


def test_nothing_is_admitted_beyond_the_quota() -> None:
    space, asked = Space(), []
    space.on_short = lambda: asked.append(1)
    assert space.admit(0, 1 << 60), "no limits"
    space.correct(-(1 << 60))
    space.limits = Limits(100)
    assert space.admit(0, 60)
    assert space.admit(0, 40)
    assert not asked
    assert not space.admit(0, 1)
    assert asked
    space.give_back(40)
    assert space.admit(0, 40)
    space.correct(-50)
    assert space.used_bytes == 50


def test_nothing_is_admitted_below_the_floor(tmp_path) -> None:
    space = Space()
    with (tmp_path / "file").open("wb") as file:
        space.limits = Limits(floor=Amount(percent=100.0))
        assert not space.admit(file.fileno(), 1)
        free = Disk.of(tmp_path).free_bytes
        space.limits = Limits(floor=Amount(bytes=free // 2))
        assert space.admit(file.fileno(), 1)
        assert not space.admit(file.fileno(), free)


def test_a_disk_that_does_not_answer_takes_nothing() -> None:
    space, reader = Space(), os.open(os.devnull, os.O_RDONLY)
    os.close(reader)
    space.limits = Limits(floor=Amount(percent=5))
    assert not space.admit(reader, 1)
    assert space.used_bytes == 0
