"""Whatever the cache holds: eviction takes nothing that is in use, the oldest first, and no more than it must."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lazyfs.cache.plan import Device, Image, choose, choose_all, choose_image, wanted_bytes
from lazyfs.cache.space import Disk, Limits
from lazyfs.config.kinds import Amount

NAMES = [f"{number:02}" for number in range(12)]


@st.composite
def caches(draw: st.DrawFn) -> tuple[list[Device], list[Image]]:
    devices = [Device(name, draw(st.integers(0, 100)), draw(st.integers(0, 5)), draw(st.booleans()))
               for name in draw(st.sets(st.sampled_from(NAMES)))]
    images = [Image(f"i{number}", draw(st.integers(0, 9)), draw(st.frozensets(st.sampled_from(NAMES), max_size=4)),
                    draw(st.booleans())) for number in range(draw(st.integers(0, 5)))]
    return devices, images


@given(caches(), st.integers(0, 700))
def test_a_plan_is_right(cache: tuple[list[Device], list[Image]], wanted: int) -> None:
    devices, images = cache
    plan = choose(devices, images, wanted)
    by_name, by_image = {one.name: one for one in devices}, {one.name: one for one in images}
    assert len(set(plan.devices)) == len(plan.devices)
    assert len(set(plan.images)) == len(plan.images)
    protected = {name for one in images if one.in_use for name in one.devices}
    free = [one for one in devices if not one.in_use and one.name not in protected]
    # nothing in use, the oldest first, and whoever stays was used no earlier
    assert set(plan.devices) <= {one.name for one in free}
    ages = [by_name[name].last_use_ns for name in plan.devices]
    assert ages == sorted(ages)
    staying = [one.last_use_ns for one in free if one.name not in plan.devices]
    assert not ages or not staying or max(ages) <= min(staying)
    # exactly the images of which nothing is left, and that are not mounted
    left = by_name.keys() - set(plan.devices)
    assert set(plan.images) == {one.name for one in images if not one.in_use and not one.devices & left}
    # enough, unless there is no more; and not one more than needed
    freed = sum(by_name[name].size_bytes for name in plan.devices) + sum(by_image[n].size_bytes for n in plan.images)
    assert freed == plan.freed_bytes
    assert freed >= wanted or len(plan.devices) == len(free)
    if plan.devices:
        fewer = set(plan.devices[:-1])
        kept = by_name.keys() - fewer
        before = sum(by_name[name].size_bytes for name in fewer) + sum(
            one.size_bytes for one in images if not one.in_use and not one.devices & kept)
        assert before < wanted


@given(caches())
def test_all_is_all_and_one_is_one(cache: tuple[list[Device], list[Image]]) -> None:
    devices, images = cache
    protected = {name for one in images if one.in_use for name in one.devices}
    everything = choose_all(devices, images)
    assert set(everything.devices) == {one.name for one in devices if not one.in_use} - protected
    assert sorted(everything.images) == [one.name for one in images if not one.in_use]
    for image in images:
        plan = choose_image(devices, images, image.name)
        others = {name for one in images if one is not image for name in one.devices}
        assert set(plan.devices) <= image.devices - others
        assert not {one.name for one in devices if one.in_use} & set(plan.devices)
        assert plan.images == (() if image.in_use else (image.name,))


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6),
       st.integers(0, 10**4))
def test_after_what_is_wanted_has_gone_the_limits_are_kept(
    used: int, free: int, quota: int, floor: int, room: int
) -> None:
    limits, disk = Limits(quota, Amount(bytes=floor)), Disk(2 * 10**6, free)
    wanted = wanted_bytes(used, disk, limits, room_bytes=room)
    assert 0 <= wanted <= used
    if wanted < used:
        assert not quota or used - wanted <= quota
        assert free + wanted >= floor + room if room else free + wanted >= floor
    assert wanted_bytes(used - wanted, Disk(disk.size_bytes, free + wanted), limits) in {0, used - wanted}
