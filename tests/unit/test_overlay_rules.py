"""The rules of OCI layer.md one by one, with the cases that real tools produce; and bounds on time and depth."""

from __future__ import annotations

import sys

import pytest

from converter.overlay import merge
from lazyfs.errors import FormatError
from lazyfs.image.model import Attributes, DataMap, EntryKind, FileType, Inode, LayerEntry

A1, A2 = Attributes(0o700, uid=1), Attributes(0o755, uid=2, xattrs=((b"user.x", b"1"),))


def directory(path: bytes, attributes: Attributes = A1) -> LayerEntry:
    return LayerEntry(path, type=FileType.DIRECTORY, attributes=attributes)


def file(path: bytes, size: int = 1, attributes: Attributes = A1) -> LayerEntry:
    return LayerEntry(path, size=size, attributes=attributes)


def link(path: bytes, target: bytes) -> LayerEntry:
    return LayerEntry(path, type=FileType.SYMLINK, attributes=A1, target=target)


def hard(path: bytes, target: bytes) -> LayerEntry:
    return LayerEntry(path, EntryKind.HARDLINK, target=target)


def gone(path: bytes) -> LayerEntry:
    return LayerEntry(path, EntryKind.WHITEOUT)


def opaque(path: bytes) -> LayerEntry:
    return LayerEntry(path, EntryKind.OPAQUE)


def merged(*layers: list[LayerEntry]) -> Inode:
    return merge(layers, names=[f"layer{number}" for number in range(len(layers))])


def at(root: Inode, path: bytes) -> Inode:
    for name in path.split(b"/"):
        root = root.children[name]
    return root


def names(root: Inode, path: bytes = b"") -> set[bytes]:
    return set((at(root, path) if path else root).children)


def test_nothing_at_all() -> None:
    root = merged()
    assert (root.type, root.implied, root.link_count, root.children) == (FileType.DIRECTORY, True, 2, {})


def test_root_entry_sets_the_root() -> None:
    root = merged([directory(b"", A1)], [directory(b"", A2)], [file(b"x")])
    assert (root.attributes, root.implied) == (A2, False)


def test_parents_nobody_lists_are_implied() -> None:
    root = merged([file(b"a/b/c")])
    assert (at(root, b"a").implied, at(root, b"a").attributes) == (True, Attributes(0o755))
    later = merged([file(b"a/b/c")], [directory(b"a", A2)])
    assert (at(later, b"a").implied, at(later, b"a").attributes) == (False, A2)


def test_parents_of_a_lower_layer_are_kept() -> None:
    root = merged([directory(b"a", A2)], [file(b"a/x")])
    assert (at(root, b"a").attributes, names(root, b"a")) == (A2, {b"x"})


def test_directory_over_directory_replaces_attributes_and_keeps_children() -> None:
    root = merged([directory(b"a", A2), file(b"a/x")], [directory(b"a", A1)])
    assert (at(root, b"a").attributes, names(root, b"a")) == (A1, {b"x"})


def test_types_replace_each_other_with_all_below() -> None:
    assert at(merged([file(b"a/x")], [file(b"a")]), b"a").type is FileType.REGULAR
    root = merged([file(b"a")], [directory(b"a"), file(b"a/y")])
    assert names(root, b"a") == {b"y"}
    root = merged([file(b"a/x")], [file(b"a")], [directory(b"a")])
    assert names(root, b"a") == set()


def test_later_entries_of_a_layer_win() -> None:
    root = merged([file(b"a", 1), file(b"a", 2), link(b"l", b"a"), file(b"l", 3)])
    assert (at(root, b"a").size, at(root, b"l").size) == (2, 3)


@pytest.mark.parametrize("order", [1, -1])
def test_whiteouts_hide_lower_layers_only_wherever_they_stand(order: int) -> None:
    root = merged([file(b"d/old"), file(b"gone"), file(b"e/x")],
                  [gone(b"d"), file(b"d/new"), gone(b"gone"), gone(b"e"), directory(b"e"), gone(b"never")][::order])
    assert names(root) == {b"d", b"e"}
    assert names(root, b"d") == {b"new"}
    assert names(root, b"e") == set()
    assert at(root, b"d").implied


@pytest.mark.parametrize("order", [1, -1])
def test_opaque_hides_what_lower_layers_put_there(order: int) -> None:
    root = merged([directory(b"d", A2), file(b"d/old"), file(b"d/s/old")],
                  [opaque(b"d"), file(b"d/s/new"), file(b"d/new")][::order])
    assert names(root, b"d") == {b"s", b"new"}
    assert names(root, b"d/s") == {b"new"}
    assert at(root, b"d").attributes == A2
    assert names(merged([file(b"a"), file(b"b/c")], [opaque(b""), file(b"d")])) == {b"d"}


def test_whiteout_and_file_of_one_name_in_one_layer() -> None:
    root = merged([file(b"a", 1)], [file(b"a", 2), gone(b"a")])
    assert at(root, b"a").size == 2


def test_whiteout_of_a_directory_that_comes_back_in_a_third_layer() -> None:
    root = merged([file(b"d/a")], [gone(b"d")], [file(b"d/b")])
    assert names(root, b"d") == {b"b"}


def test_opaque_in_a_directory_that_replaces_a_symlink_spares_the_target() -> None:
    """What overlayfs' diff writes when a directory takes a symlink's place."""
    root = merged([file(b"usr/lib/x"), link(b"lib", b"usr/lib")],
                  [directory(b"lib"), opaque(b"lib"), gone(b"lib/x"), file(b"lib/y")])
    assert names(root, b"usr/lib") == {b"x"}
    assert names(root, b"lib") == {b"y"}


def test_whiteout_below_a_symlink_hides_in_its_target() -> None:
    root = merged([file(b"usr/lib/x"), link(b"lib", b"usr/lib")], [gone(b"lib/x")])
    assert names(root, b"usr/lib") == set()


def test_whiteout_of_a_symlink_removes_the_symlink() -> None:
    root = merged([file(b"usr/lib/x"), link(b"lib", b"usr/lib")], [gone(b"lib")])
    assert names(root) == {b"usr"}
    assert names(root, b"usr/lib") == {b"x"}


@pytest.mark.parametrize(
    ("target", "where"),
    [(b"usr/lib", b"usr/lib"), (b"/usr/lib", b"usr/lib"), (b"../../usr/./lib/", b"usr/lib"),
     (b"new/place", b"new/place"),
     (b"missing/../usr", b"usr"), (b"/", b""), (b"..", b""), (b".", b"")],
)
def test_parents_that_are_symlinks_are_followed_inside_the_root(target: bytes, where: bytes) -> None:
    root = merged([directory(b"usr/lib"), link(b"lib", target)], [file(b"lib/x")])
    assert b"x" in names(root, where)
    assert at(root, b"lib").type is FileType.SYMLINK
    assert b"missing" not in names(root)


def test_symlinks_to_symlinks_and_to_no_directory() -> None:
    root = merged([link(b"a", b"b"), link(b"b", b"c"), file(b"c")], [file(b"a/x")])
    assert names(root, b"c") == {b"x"}


def test_forty_symlinks_are_followed_and_forty_one_are_not() -> None:
    chain = [link(b"l%d" % number, b"l%d" % (number - 1)) for number in range(1, 41)] + [directory(b"l0")]
    assert names(merged(chain, [file(b"l40/x")]), b"l0") == {b"x"}
    with pytest.raises(FormatError, match=r"layer1, entry 'l41/x'.*40 symlinks"):
        merged([*chain, link(b"l41", b"l40")], [file(b"l41/x")])
    with pytest.raises(FormatError, match="symlinks"):
        merged([link(b"a", b"b"), link(b"b", b"a"), file(b"a/x")])
    assert names(merged([link(b"a", b"a")], [gone(b"a/x")])) == {b"a"}


def test_the_last_component_is_never_followed() -> None:
    root = merged([directory(b"d"), link(b"l", b"d")], [file(b"l")])
    assert at(root, b"l").type is FileType.REGULAR
    root = merged([directory(b"d"), link(b"l", b"d")], [directory(b"l")])
    assert at(root, b"l").type is FileType.DIRECTORY


def test_hard_links_are_one_inode() -> None:
    root = merged([file(b"a", 5), hard(b"b", b"a"), link(b"l", b"a"), hard(b"m", b"l")], [hard(b"d/c", b"b")])
    assert at(root, b"a") is at(root, b"b") is at(root, b"d/c")
    assert at(root, b"a").link_count == 3
    assert at(root, b"m") is at(root, b"l")
    assert (at(root, b"l").type, at(root, b"l").link_count) == (FileType.SYMLINK, 2)


def test_link_counts_know_what_went_away() -> None:
    root = merged([file(b"d/a", 5), hard(b"b", b"d/a"), hard(b"c", b"b")], [gone(b"d"), file(b"c")])
    assert (at(root, b"b").size, at(root, b"b").link_count, at(root, b"c").link_count) == (5, 1, 1)


def test_replacing_one_name_leaves_the_others() -> None:
    root = merged([file(b"a", 5), hard(b"b", b"a")], [file(b"a", 6)], [hard(b"c", b"a")])
    assert (at(root, b"a").size, at(root, b"b").size) == (6, 5)
    assert at(root, b"c") is at(root, b"a")
    assert (at(root, b"a").link_count, at(root, b"b").link_count) == (2, 1)


def test_hard_link_prefers_its_own_layer_in_order() -> None:
    root = merged([file(b"a", 1)], [hard(b"b", b"a"), file(b"a", 2), hard(b"c", b"a")])
    assert (at(root, b"b").size, at(root, b"c").size) == (1, 2)


def test_hard_link_through_symlinked_parents() -> None:
    root = merged([file(b"usr/lib/x"), link(b"lib", b"/usr/lib"), hard(b"lib/y", b"lib/x")])
    assert at(root, b"usr/lib/y") is at(root, b"usr/lib/x")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([[directory(b"d"), hard(b"a", b"d")]], "a directory"),
        ([[hard(b"a", b"a")]], "itself"),
        ([[file(b"a")], [hard(b"a", b"a")]], "itself"),
        ([[hard(b"a", b"nothing")]], "which no lower layer and no earlier entry has"),
        ([[hard(b"a", b"b"), file(b"b")]], "no earlier entry"),
        ([[file(b"b")], [hard(b"a", b"b"), gone(b"b")]], "no lower layer"),
        ([[file(b"d/x")], [opaque(b"d"), hard(b"a", b"d/x")]], "no lower layer"),
        ([[file(b"d/x"), hard(b"d", b"d/x")]], "no lower layer"),
        ([[file(b"f"), hard(b"a", b"f/x")]], "no lower layer"),
        ([[hard(b"a", b"")]], "layer0, entry 'a'"),
        ([[link(b"s", b"s"), hard(b"a", b"s/x")]], "no lower layer"),
        ([[LayerEntry(b"", size=1)]], "root directory"),
    ],
)
def test_refused_with_layer_and_entry(layers: list[list[LayerEntry]], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        merged(*layers)
    assert f"layer{len(layers) - 1}, entry" in str(caught.value)


def test_device_is_the_layer() -> None:
    data = DataMap(12, ((0, 1, 0),))
    root = merged([LayerEntry(b"a", data=data), file(b"b")], [file(b"b")])
    assert (at(root, b"a").device, at(root, b"b").device, at(root, b"a").data) == (0, 1, data)


def test_a_chain_of_links_and_many_layers() -> None:
    chain = [file(b"f0"), *[hard(b"f%d" % number, b"f%d" % (number - 1)) for number in range(1, 100_000)]]
    root = merged(chain, *[[file(b"x%d" % number), gone(b"x%d" % (number - 1))] for number in range(128)])
    assert at(root, b"f0").link_count == 100_000
    assert names(root) >= {b"x127"}
    assert b"x126" not in names(root)


def test_depth_needs_no_stack() -> None:
    path = b"/".join([b"d"] * 2048)
    limit = sys.getrecursionlimit()
    root = merged([directory(path)], [gone(path)], [file(path)])
    assert sys.getrecursionlimit() == limit
    depth = 0
    while root.children:
        root, depth = root.children[b"d"], depth + 1
    assert (depth, root.type) == (2048, FileType.REGULAR)


def test_symlinks_cannot_make_the_tree_too_deep_or_its_paths_too_long() -> None:
    deep = b"/".join([b"d"] * 2040)
    with pytest.raises(FormatError, match=r"deeper|longer"):
        merged([directory(deep), link(b"s", deep)], [file(b"s/" + b"/".join([b"e"] * 20))])
    long = b"/".join([b"x" * 255] * 15)
    with pytest.raises(FormatError, match="longer than 4096"):
        merged([directory(long), link(b"s", long)], [file(b"s/" + b"/".join([b"y" * 255] * 2))])


def test_paths_made_to_be_slow_are_refused() -> None:
    """Each entry replaces a symlink, so nothing that was found stays known, and walks 40 links of 2000 names each."""
    long = b"./" * 1900 + b"."
    layer = [link(b"l%d" % number, long + b"/l%d" % (number - 1)) for number in range(1, 40)] + [directory(b"l0")]
    for number in range(300):
        layer += [link(b"z", b"l0"), file(b"l39/x%d" % number)]
    with pytest.raises(FormatError, match="too many symlinks"):
        merged(layer)
