"""Recordings become ranges of files, profiles become lists; lists are compared, and looked for in other images."""

from __future__ import annotations

import pytest

from lazyfs.errors import FormatError, UsageError
from lazyfs.image.prefetch import ENTRY_COUNT_MAX, PrefetchHeader, find, format_prefetch, parse_prefetch
from lazyfs.profile import merge as merge_module
from lazyfs.profile.coverage import Chunks, cover
from lazyfs.profile.diff import compare
from lazyfs.profile.files import profile_of_recording
from lazyfs.profile.merge import merge
from lazyfs.profile.parts import OPEN_END, Part, Profile, list_of, profile_of
from lazyfs.profile.spans import first_come
from tests.profilekit import CHUNK, STORED_BYTES, digest, files_of, image_files, recording

LOWER = [("bin/sh", 0, 100), ("lib/a.so", 4096, 3 * CHUNK), ("etc/x*", 4096 + 3 * CHUNK, 10), ("gone", 901120, 5000)]
UPPER = [("gone", 0, 4096), ("etc/y", 4096, 1)]


def lines(profile: Profile) -> list[str]:
    return [entry.line for entry in list_of(profile).entries]


def listed(*text: str) -> Profile:
    return profile_of(parse_prefetch("\n".join(text)))


# --- recording to list ----------------------------------------------------------------------------------------------


def test_touched_ranges_become_ranges_of_files() -> None:
    touches = [(1, 0, 4096, 1.0), (0, 0, 4096, 2.0), (0, 8192, 16384, 3.0), (0, 0, 1 << 20, 4.0), (1, 4096, 8192, 5.5)]
    profile = profile_of_recording(recording(touches, devices=2), image_files(LOWER, UPPER))
    assert profile.parts == (
        Part(b"gone", 0, 4096, first_ms=1.0), Part(b"bin/sh", 0, 100, first_ms=2.0),
        Part(b"lib/a.so", 4096, 12288, first_ms=3.0), Part(b"lib/a.so", 0, 4096, first_ms=4.0),
        Part(b"lib/a.so", 12288, 3 * CHUNK, first_ms=4.0), Part(b"etc/x[*]", 0, 10, first_ms=4.0),
        Part(b"etc/y", 0, 1, first_ms=5.5),
    )  # fmt: skip
    assert profile.header == PrefetchHeader("app@sha256:0", "lazyfs test")
    assert lines(profile) == [
        "gone 0-4095 ms=1", "bin/sh 0-99 ms=2", f"lib/a.so 4096-12287,0-4095,12288-{3 * CHUNK - 1} ms=3",
        '"etc/x\\*" 0-9 ms=4', "etc/y 0-0 ms=5.5",
    ]


def test_equal_files_and_hard_links_are_named_once() -> None:
    files = image_files([("b", 0, 5000), ("a", 0, 5000), ("c", 4096, 904)])
    profile = profile_of_recording(recording([(0, 0, 8192, 0.0)]), files)
    assert profile.parts == (Part(b"a", 0, 5000, first_ms=0.0),)


def test_two_devices_of_one_digest_are_one() -> None:
    both = image_files([("a", 0, 4096)], [("b", 8192, 4096)])
    files = files_of(both.tree, [1 << 20] * 2, [digest(0)] * 2)
    profile = profile_of_recording(recording([(0, 0, 1 << 20, 0.0)]), files)
    assert [part.pattern for part in profile.parts] == [b"a", b"b"]


def test_a_recording_of_another_image_is_refused() -> None:
    with pytest.raises(UsageError, match="another image"):
        profile_of_recording(recording([], devices=2), image_files(LOWER))


def test_ranges_of_a_file_stand_in_one_line_when_they_are_close() -> None:
    near = [Part(b"a", 0, 10), Part(b"b", 0, 10), Part(b"a", 10, 20), Part(b"a", 30, 40), Part(b"a", 50, 60, 0.5)]
    assert lines(Profile(tuple(near))) == ["a 0-19,30-39", "b 0-9", "a 50-59 share=0.5"]
    between = [Part(b"f%d" % number, 0, 1) for number in range(20)]
    assert lines(Profile((near[0], *between, near[2])))[-1] == "a 10-19"


def test_lists_and_profiles_lead_to_each_other() -> None:
    text = "# lazyfs-prefetch 1\n# image: i\n# runs: 4\nwhole\na 5-9,100- share=0.25 ms=3\n**/*.py\n"
    profile = profile_of(parse_prefetch(text))
    assert profile.parts == (
        Part(b"whole", 0, OPEN_END), Part(b"a", 5, 10, 0.25, 3.0), Part(b"a", 100, OPEN_END, 0.25, 3.0),
        Part(b"**/*.py", 0, OPEN_END))
    assert format_prefetch(list_of(profile)) == text


def test_what_a_list_names_twice_counts_once() -> None:
    profile = listed("a 0-9", "a 5-14 share=0.5", "/a 0-")
    assert profile.parts == (Part(b"a", 0, 10), Part(b"a", 10, 15, 0.5), Part(b"a", 15, OPEN_END))


def test_the_first_that_names_a_byte_has_it() -> None:
    assert first_come([(10, 20), (30, 40), (5, 50), (5, 50), (50, 50), (0, 60), (0, 10), (20, 30)]) == [
        [(10, 20)], [(30, 40)], [(5, 10), (20, 30), (40, 50)], [], [], [(0, 5), (50, 60)], [], []]
    assert first_come([]) == []


def test_many_ranges_backwards_end() -> None:
    text = ",".join(f"{start}-{start + 9}" for start in range(2_000_000, 0, -20))
    assert len(listed(f"a {text}").parts) == 100_000


# --- merging --------------------------------------------------------------------------------------------------------


def test_runs_are_merged_by_median_rank_and_share() -> None:
    runs = [listed("a 0-99 ms=1", "b 0-9 ms=2"), listed("b 0-9 ms=1", "a 0-49 ms=5", "c 0-0 ms=9"),
            listed("b 0-9 ms=3", "a 0-99 ms=4")]
    merged = merge(runs)
    assert lines(merged) == ["b 0-9 ms=2", "a 50-99 share=0.67 ms=2", "a 0-49 ms=4", "c 0-0 share=0.33 ms=9"]
    assert merged.header.runs == 3
    assert lines(merge(runs, 0.67)) == ["b 0-9 ms=2", "a 50-99 share=0.67 ms=2", "a 0-49 ms=4"]
    assert merge(runs[::-1]) == merge([runs[1], runs[2], runs[0]]) == merged


def test_a_merged_list_counts_as_often_as_it_has_runs() -> None:
    before = profile_of(parse_prefetch("# lazyfs-prefetch 1\n# image: i\n# runs: 3\na 0-9 share=0.67\nb 0-9"))
    merged = merge([before, profile_of(parse_prefetch("# lazyfs-prefetch 1\n# image: i\na 0-9"))])
    assert (merged.header.runs, merged.header.image) == (4, "i")
    assert lines(merged) == ["a 0-9 share=0.75", "b 0-9 share=0.75"]
    assert merge([before, listed("a")]).header.image == ""
    huge = profile_of(parse_prefetch("# lazyfs-prefetch 1\n# runs: 1000000\na"))
    with pytest.raises(UsageError, match="1000001 runs"):
        merge([huge, listed("a")])


def test_globs_and_open_ends_are_merged_as_they_stand() -> None:
    assert lines(merge([listed("**/*.py", "a"), listed("a 0-9")])) == [
        "**/*.py share=0.5", "a 0-9", "a 10- share=0.5"]


# --- diff -----------------------------------------------------------------------------------------------------------


def test_what_two_lists_have_in_common() -> None:
    difference = compare(listed("a 0-99", "b 0-9", "c 0-0"), listed("c 0-0", "a 50-149", "d 5-"))
    report = difference.as_json()
    assert (report["commonBytes"], report["onlyABytes"], report["onlyBBytes"]) == (51, 60, 50)
    assert report["agreement"] == round(51 / 161, 6)
    assert (report["coveredA"], report["coveredB"]) == (round(51 / 111, 6), round(51 / 101, 6))
    assert (report["order"], report["rangesWithoutSize"]) == (-1.0, 1)
    assert [one["path"] for one in report["files"]] == ["a", "b", "c", "d"]
    assert report["files"][0] == {"path": "a", "commonBytes": 50, "onlyABytes": 50, "onlyBBytes": 50}


def test_equal_lists_agree_wholly() -> None:
    one = listed("a 0-99", "b 0-9", "c 0-0")
    assert (compare(one, one).agreement, compare(one, one).order) == (1.0, 1.0)
    empty = compare(listed(), listed())
    assert (empty.agreement, empty.order, empty.files) == (1.0, None, ())
    assert compare(listed("a 0-9"), listed()).agreement == 0.0


# --- coverage -------------------------------------------------------------------------------------------------------


def test_coverage_in_a_rebuilt_image() -> None:
    rebuilt = image_files([("lib/a.so", 0, CHUNK), ("bin/sh", 2 * CHUNK, 200), ("lib/b.so", 3 * CHUNK, 10)])
    prefetch = parse_prefetch("bin/sh 0-99\nlib/a.so 0-0,60000-69999\netc/x 0-899\nvanished\nlib/*.so 0-9\n"
                              "lib/a.so 70000-")
    found = cover(prefetch, rebuilt)
    assert found.missing == ("etc/x 0-899", "vanished")
    assert found.cut == (("lib/a.so 0-0,60000-69999", 70000 - CHUNK), ("lib/a.so 70000-", 0))
    assert (found.stated_bytes, found.matched_bytes) == (100 + 10001 + 900 + 20, 100 + 1 + CHUNK - 60000 + 20)
    assert found.share == found.matched_bytes / found.stated_bytes
    assert found.chunks == Chunks(3, 3 * CHUNK, 3 * STORED_BYTES)
    assert found.profile.parts == (
        Part(b"bin/sh", 0, 100), Part(b"lib/a.so", 0, 1), Part(b"lib/a.so", 60000, CHUNK), Part(b"lib/a.so", 1, 10),
        Part(b"lib/b.so", 0, 10))
    assert found.as_json()["cut"][0] == {"line": "lib/a.so 0-0,60000-69999", "missingBytes": 70000 - CHUNK}


def test_coverage_of_whole_files_is_told_by_lines() -> None:
    files = image_files([("a", 0, 0)])
    assert cover(parse_prefetch("a\nb"), files).share == 0.5
    assert cover(parse_prefetch(""), files).share == 1.0
    assert cover(parse_prefetch("a"), files).cut == ()
    huge = cover(parse_prefetch("b 0-9223372036854775806\na 0-9"), files)
    assert (huge.stated_bytes, huge.matched_bytes) == (10, 0)


def test_covering_a_hostile_list_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "_STEPS_MAX", 1000)
    with pytest.raises(FormatError, match="too many"):
        cover(parse_prefetch("lib/a.so\n" * 1000), image_files(LOWER))
    beyond = ",".join(["1000000-1000001"] * 400)
    with pytest.raises(FormatError, match="too many"):
        cover(parse_prefetch(f"** {beyond}"), image_files(LOWER))


def test_covering_as_many_lines_as_a_list_may_have_ends_before_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """They took minutes. Here a thousandth of it: lines of names that are not there are cheap, but not for nothing."""
    monkeypatch.setattr(find, "_STEPS_MAX", find._STEPS_MAX // 1000)
    lines = [f"lib/gone-{number} 0-4095\n" for number in range(ENTRY_COUNT_MAX // 1000)]
    with pytest.raises(FormatError, match="too many"):
        cover(parse_prefetch("".join(lines)), image_files(LOWER))
    assert len(cover(parse_prefetch("".join(lines[:500])), image_files(LOWER)).missing) == 500


def test_merging_lists_that_cut_each_other_to_pieces_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_module, "_USE_COUNT_MAX", 100)
    pieces = listed(*(f"a {start}-{start}" for start in range(0, 60, 2)))
    assert len(merge([pieces, pieces]).parts) == 30
    with pytest.raises(FormatError, match="too much memory"):
        merge([pieces, listed("a"), listed("a")])
