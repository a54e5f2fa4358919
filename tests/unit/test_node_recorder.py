"""What a mount is asked for: by page and by chunk, in order, bounded; against a model."""

from __future__ import annotations

import os
from array import array

from hypothesis import given
from hypothesis import strategies as st

from lazyfs.node import recorder
from lazyfs.node.recorder import Recorder, container_of

PAGE = 4096


class Clock:
    now = 10.0

    def __call__(self) -> float:
        return self.now


def recording(sizes=(100 * PAGE, 10 * PAGE + 5), count_max=100):
    clock = Clock()
    return Recorder(sizes, count_max, clock, lambda pid: f"box{pid}"), clock


def test_each_page_is_noted_once_with_time_and_caller():
    one, clock = recording()
    one.note(0, PAGE + 1, 1, 7)
    clock.now += 0.5
    one.note(0, 0, 3 * PAGE, 8)        # around what is known
    one.note(0, 0, 3 * PAGE, 9)        # nothing new: who reads is not even asked
    clock.now += 0.25
    one.note(1, 9 * PAGE, PAGE + 5, 0)
    page = one.page(0)
    assert page["touches"] == [[0, PAGE, 2 * PAGE, 0, 0], [0, 0, PAGE, 500_000, 1], [0, 2 * PAGE, 3 * PAGE, 500_000, 1],
                               [1, 9 * PAGE, 10 * PAGE + 5, 750_000, 2]]
    assert page["callers"] == ["box7", "box8", ""]
    assert (page["next"], page["truncated"]) == (None, False)


def test_of_a_very_large_device_more_is_noted_as_one(monkeypatch):
    monkeypatch.setattr(recorder, "_UNIT_COUNT_MAX", 50)
    one, _ = recording(sizes=(100 * PAGE, 49 * PAGE))
    one.note(0, 9 * PAGE, 10, 1)
    one.note(0, 99 * PAGE, 10, 1)
    one.note(1, 10 * PAGE, 1, 1)
    assert [touch[:3] for touch in one.page(0)["touches"]] == [
        [0, 8 * PAGE, 12 * PAGE], [0, 96 * PAGE, 100 * PAGE], [1, 10 * PAGE, 11 * PAGE]]


def test_reads_in_a_row_are_one_touch_while_they_follow_at_once():
    one, clock = recording()
    for number in range(3):
        one.note(0, number * PAGE, PAGE, 1)
        clock.now += 0.0005
    clock.now += 1
    one.note(0, 3 * PAGE, PAGE, 1)
    one.note(0, 4 * PAGE, PAGE, 2)
    assert [touch[1:3] for touch in one.page(0)["touches"]] == [
        [0, 3 * PAGE], [3 * PAGE, 4 * PAGE], [4 * PAGE, 5 * PAGE]]


def test_there_is_an_end_to_what_is_remembered(monkeypatch):
    monkeypatch.setattr(recorder, "PAGE_COUNT_MAX", 2)
    one, _ = recording(count_max=3)
    for number in range(5):
        one.note(0, 2 * number * PAGE, 1, 1)
    first = one.page(0)
    assert (len(first["touches"]), first["next"], first["truncated"]) == (2, 2, True)
    last = one.page(2)
    assert (len(last["touches"]), last["next"]) == (1, None)
    assert one.page(7)["touches"] == []


def test_as_many_callers_as_there_may_be(monkeypatch):
    monkeypatch.setattr(recorder, "_CALLER_COUNT_MAX", 2)
    monkeypatch.setattr(recorder, "_PID_COUNT_MAX", 2)
    one, _ = recording()
    for pid in range(1, 6):
        one.note(0, 2 * pid * PAGE, 1, pid)
    assert one.page(0)["callers"] == ["box1", "box2"]


reads = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 10 * PAGE), st.integers(1, 3 * PAGE)), max_size=30)


@given(reads)
def test_the_pages_of_the_touches_are_those_of_the_reads(asked):
    one, _ = recording()
    expected: list[set[int]] = [set(), set()]
    for device, offset, wanted in asked:
        size = min(wanted, one._sizes[device] - offset)
        if size > 0:
            one.note(device, offset, size, 0)
            expected[device] |= set(range(offset // PAGE, -(-(offset + size) // PAGE)))
    found: list[array[int]] = [array("I"), array("I")]
    for device, start, end, _, _ in one.page(0)["touches"]:
        assert end <= one._sizes[device]
        found[device].extend(range(start // PAGE, -(-end // PAGE)))
    assert [sorted(pages) for pages in found] == [sorted(pages) for pages in expected]


def test_each_recorder_has_a_name_of_its_own_and_an_age():
    (one, clock), (other, _) = recording(), recording()
    clock.now += 1.5
    assert one.page(0)["token"] == one.token != other.token
    assert one.page(0)["age_us"] == 1_500_000
    assert one.page(0)["count"] == 0


def test_a_container_is_called_by_its_id_whoever_runs_it(monkeypatch):
    groups = {
        "0::/default/web": "web",
        "0::/kubepods.slice/pod1.slice/cri-containerd-0123abcd.scope": "0123abcd",
        "0::/k8s.io/kubepods-besteffort-pod9.slice:cri-containerd:0123abcd": "0123abcd",
        "0::/system.slice/docker-9f.scope": "9f",
        "0::/machine.slice/libpod-77.scope": "77",
        "0::/user.slice/shell.scope": "shell",
        "5:cpu:/a/web\n0::/": "web",
    }
    for text, expected in groups.items():
        monkeypatch.setattr(recorder.Path, "read_text", lambda *_, text=text, **__: text + "\n")
        assert container_of(1) == expected


def test_a_process_of_no_container_and_one_that_is_gone():
    assert isinstance(container_of(os.getpid()), str)
    assert container_of(1 << 30) == ""
