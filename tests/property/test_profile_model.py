"""Profiles against reference models: any tree, any touches, any runs."""

from __future__ import annotations

import random
import statistics
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.image.erofs import ErofsImage, write_image
from lazyfs.image.model import FileType
from lazyfs.image.prefetch import (
    PrefetchHeader,
    PrefetchList,
    chunks_of,
    exact_pattern,
    format_prefetch,
    literal_path,
    make_entry,
    parse_prefetch,
    wanted_extents,
)
from lazyfs.profile.coverage import cover
from lazyfs.profile.diff import compare
from lazyfs.profile.files import profile_of_recording
from lazyfs.profile.merge import merge
from lazyfs.profile.parts import Part, Profile, distinct, list_of, profile_of
from lazyfs.profile.recording import Recording, Touch, from_json, to_json
from lazyfs.profile.spans import first_come
from tests.erofskit import DEVICE_SIZES, random_tree
from tests.profilekit import CHUNK, digest, files_of

PATHS = st.lists(st.binary(min_size=1, max_size=8).filter(
    lambda name: not {b"/", b"\0"} & {bytes([byte]) for byte in name} and name not in (b".", b"..")),
    min_size=1, max_size=3).map(b"/".join)
RANGES = st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 1 << 40), st.booleans()).map(
    lambda one: (one[0], None if one[2] else one[0] + one[1])), max_size=4)
SHARES = st.integers(1, 10**6).map(lambda share: share / 10**6)
TIMES = st.none() | st.integers(0, 10**9).map(lambda time_us: time_us / 1000)
ENTRIES = st.builds(make_entry, PATHS.map(exact_pattern), RANGES, SHARES, TIMES)
RUN = st.lists(st.tuples(st.sampled_from([b"a", b"b/c"]), st.integers(0, 30), st.integers(1, 12),
                         st.none() | st.integers(0, 50)), max_size=8)


@given(st.lists(ENTRIES, max_size=6), st.integers(1, 1000))
def test_lists_come_back_from_their_text(entries: list, runs: int) -> None:
    made = PrefetchList(tuple(entries), PrefetchHeader("i@sha256:0", "lazyfs 1", runs))
    assert parse_prefetch(format_prefetch(made)) == made
    assert parse_prefetch(format_prefetch(made).encode()) == made


@given(PATHS)
def test_paths_come_back_from_their_patterns(path: bytes) -> None:
    assert literal_path(exact_pattern(path)) == path


@settings(deadline=None, max_examples=40)
@given(rng=st.randoms(use_true_random=False), entries=st.integers(0, 60), count=st.integers(0, 20))
def test_a_list_names_the_touched_bytes_of_files_and_no_others(rng: random.Random, entries: int, count: int) -> None:
    tree = ErofsImage.parse(write_image(random_tree(rng, entries), DEVICE_SIZES), DEVICE_SIZES)
    files = files_of(tree, DEVICE_SIZES)
    touches = tuple(sorted((random_touch(rng) for _ in range(count)), key=lambda touch: touch.ms))
    devices = tuple((digest(index), size) for index, size in enumerate(DEVICE_SIZES))
    recording = from_json(to_json(Recording("i", "t", devices, ("c",), touches)))
    profile = profile_of_recording(recording, files)
    assert distinct(profile.parts) == profile.parts
    prefetch = parse_prefetch(format_prefetch(list_of(profile)))

    held = pages_of_files(tree)
    touched = {(touch.device, page) for touch in touches
               for page in range(touch.start // 4096, -(-touch.end // 4096))} & held
    named = pages(tree, [(tree_nid(tree, path), start, end) for path, start, end in ranges(prefetch)])
    assert named == touched
    chunks = {(device, page * 4096 // CHUNK) for device, page in named}
    assert set(chunks_of(wanted_extents(prefetch, tree, files.tables, []), files.tables)) == chunks
    found = cover(prefetch, files)
    assert (found.missing, found.cut, found.share) == ((), (), 1.0)
    assert found.matched_bytes == profile.size_bytes
    assert compare(found.profile, profile).agreement == 1.0


def random_touch(rng: random.Random) -> Touch:
    """Whole pages, as the kernel reads."""
    device = rng.randrange(len(DEVICE_SIZES))
    first = rng.randrange(DEVICE_SIZES[device] // 4096)
    end = min(first + rng.choice([1, 2, 8, 32]), DEVICE_SIZES[device] // 4096)
    return Touch(device, first * 4096, end * 4096, float(rng.randrange(1000)))


def ranges(prefetch: PrefetchList) -> list[tuple[bytes, int, int]]:
    return [(part.pattern, part.start, part.end) for part in profile_of(prefetch).parts]


def tree_nid(tree: ErofsImage, pattern: bytes) -> int:
    nid = tree.root_nid
    for name in literal_path(pattern).split(b"/"):
        nid = tree.lookup(nid, name)
    return nid


def pages_of_files(tree: ErofsImage) -> set[tuple[int, int]]:
    regular = {nid for _, nid in tree.walk() if tree.stat(nid).type is FileType.REGULAR}
    return pages(tree, [(nid, 0, tree.stat(nid).size) for nid in regular])


def pages(tree: ErofsImage, wanted: list[tuple[int, int, int]]) -> set[tuple[int, int]]:
    found = [extent for nid, start, end in wanted for extent in tree.extents(nid, start, end - start)]
    return {(device, page) for device, place, length in found if device >= 0
            for page in range(place // 4096, -(-(place + length) // 4096))}


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)).map(lambda one: (one[0], sum(one))), max_size=12))
def test_each_byte_is_of_the_first_range_that_has_it(ranges: list[tuple[int, int]]) -> None:
    owner: dict[int, int] = {}
    for index, (start, end) in enumerate(ranges):
        for byte in range(start, end):
            owner.setdefault(byte, index)
    owned = first_come(ranges)
    found = {byte: index for index, parts in enumerate(owned) for start, end in parts for byte in range(start, end)}
    assert found == owner
    for parts in owned:
        assert all(start < end for start, end in parts)
        assert all(before[1] < after[0] for before, after in pairwise(parts))


def run_of(ranges: list[tuple[bytes, int, int, int | None]], runs: int = 1) -> Profile:
    return Profile(distinct(Part(pattern, start, start + size, first_ms=ms) for pattern, start, size, ms in ranges),
                   PrefetchHeader(runs=runs))


@settings(deadline=None)
@given(st.lists(st.tuples(RUN, st.integers(1, 3)), min_size=1, max_size=5), st.sampled_from([0.0, 0.34, 0.5, 1.0]))
def test_merging_is_what_it_is_for_each_byte(made: list, min_share: float) -> None:
    profiles = [run_of(ranges, runs) for ranges, runs in made]
    total = sum(runs for _, runs in made)
    uses: dict[tuple[bytes, int], list[tuple[int, float | None]]] = {}
    for profile in profiles:
        for rank, part in enumerate(profile.parts):
            for byte in range(part.start, part.end):
                uses.setdefault((part.pattern, byte), []).extend([(rank, part.first_ms)] * profile.header.runs)
    expected = {}
    for byte, of_it in uses.items():
        times = [first_ms for _, first_ms in of_it if first_ms is not None]
        share = round(len(of_it) / total, 2)
        if share >= min_share:
            expected[byte] = (share, float(round(statistics.median(times))) if times else None)

    merged = merge(profiles, min_share)
    assert merged.header.runs == total
    assert {(part.pattern, byte): (part.share, part.first_ms)
            for part in merged.parts for byte in range(part.start, part.end)} == expected
    order = [(statistics.median(rank for rank, _ in uses[part.pattern, byte]), part.pattern, byte)
             for part in merged.parts for byte in range(part.start, part.end)]
    assert order == sorted(order)
    shuffled = profiles[:]
    random.Random(1).shuffle(shuffled)
    assert merge(shuffled, min_share) == merged
    again = profile_of(parse_prefetch(format_prefetch(list_of(merged))))
    assert bytes_of(again) == bytes_of(merged)
    assert again.header.runs == total


@settings(deadline=None)
@given(RUN, RUN)
def test_comparing_is_what_it_is_for_each_byte(ours: list, theirs: list) -> None:
    first, second = run_of(ours), run_of(theirs)
    a, b = bytes_of(first), bytes_of(second)
    difference = compare(first, second)
    total = difference.total
    assert (total.common, total.only_a, total.only_b) == (len(a & b), len(a - b), len(b - a))
    assert difference.agreement == (len(a & b) / len(a | b) if a | b else 1.0)
    assert difference.order is None or -1.0 <= difference.order <= 1.0
    assert sum(one.common for _, one in difference.files) == total.common


def bytes_of(profile: Profile) -> set[tuple[bytes, int]]:
    return {(part.pattern, byte) for part in profile.parts for byte in range(part.start, part.end)}
